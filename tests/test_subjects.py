"""What `data check` says that conversations ask for, are, and how they are written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import tiny

from mlxtune.config.resolve import load
from mlxtune.data.chat.renderer import Renderer
from mlxtune.data.rows.formats import Record
from mlxtune.data.survey import subjects
from mlxtune.data.survey.consistency import Style, differences
from mlxtune.data.survey.lint import RowTexts, has_short_answers
from mlxtune.data.survey.survey import survey

ASKED = {  # as people write it: what it asks for
    "Explain photosynthesis to a child.": "explain",
    "How do tides come about?": "explain",
    "Summarise the article below in two sentences.": "summarise",
    "Write a summary of the meeting.": "summarise",
    "Write a poem about the sea.": "generate",
    "Suggest three names for a cat.": "generate",
    "Write a review of a blender.": "generate",
    "Is the following review positive or negative? Classify it.": "classify",
    "Tell me whether the behaviour is ethical.": "classify",
    "Compare tea and coffee, and explain which is better.": "compare",
    "What is the difference between a list and a tuple?": "compare",
    "Explain the difference between a list and a tuple.": "compare",
    "How do I fix this error message in my program?": "debug",
    "Debug this function: def f(x) return x": "debug",
    "Critique my cover letter.": "critique",
    "Assess the strengths and weaknesses of this plan.": "critique",
    "Translate the sentence into Chinese.": "translate",
    "Rewrite this sentence so that it is polite.": "rewrite",
    "Extract all place names from the paragraph.": "extract",
    "How many apples are left?": "calculate",
    "Write a Python function that sorts a list.": "code",
    "Generate the regular expression for a date.": "code",  # and no critique: "rate the"
    "Which river flows through Paris?": "answer",
    "Nenne drei Farben.": "other",
    "": "other",
}


@pytest.mark.parametrize(("question", "task"), ASKED.items())
def test_the_earliest_word_of_a_question_says_what_it_asks_for(question: str, task: str) -> None:
    assert subjects.task_in(question) == task


def talk(*texts: str, **answer: Any) -> Record:
    messages: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        messages.append({"role": "assistant" if number % 2 else "user", "content": text})
    messages[-1] |= answer
    return Record("d.jsonl", 1, "messages", messages)


LONG = "It is so because the water follows the moon around the earth."
SUM = "She has 4 / 2 = 2 apples.\nThen 2 + 5 = 7 apples."


@pytest.mark.parametrize(
    ("record", "kinds"),
    [
        (talk("Which sea?", "The North Sea."), ["closed question"]),
        (talk("Which sea?", LONG), ["open question"]),
        (talk("Which sea?", "", "Yes?", "The North Sea."), ["closed question", "conversation"]),
        (talk("Which sea?", ""), []),
        (talk("¿Qué mar es?", LONG), ["open question"]),
        (talk("Name a sea.", "The North Sea."), []),
        (talk("Name a sea.", SUM), ["reasoning"]),
        (talk("Name a sea.", "2 - 1 = 1", reasoning_content="Hm."), ["reasoning"]),
        (talk("Prove it step by step.", LONG), ["reasoning"]),
        (talk("Show me.", "```\nprint(1)\n```"), ["coding"]),
        (talk("Name one.", "Sea.", "And another.", "Lake."), ["conversation"]),
        (Record("d", 1, "text", text="Once?"), []),
    ],
)
def test_a_conversation_is_of_the_kinds_that_its_texts_show(record: Record, kinds: list[str]) -> None:
    assert subjects.kinds_of(record) == kinds
    assert set(kinds) <= subjects.KINDS.keys()


@pytest.mark.parametrize("text", ["1", "1-", "is this ", "how ", "what do ", "1,", "$1 ", "| "])
def test_long_texts_cost_no_more_than_their_length(text: str) -> None:
    record = talk(text * (100_000 // len(text)), text * (100_000 // len(text)))
    began = time.process_time()
    subjects.kinds_of(record)
    Style().add(record)
    assert time.process_time() - began < 1


def style_of(*answers: str, question: str = "Which sea is it?") -> Style:
    style = Style()
    for answer in answers:
        style.add(talk(question, answer))
    return style


def test_a_source_that_is_written_otherwise_than_the_first_is_described_against_it() -> None:
    marked = "# Seas\n\n" + "- a sea of many words\n" * 9
    styles = {
        "train 1": style_of(*["The North Sea."] * 20),
        "train 2": style_of(*["The Dead Sea."] * 20),
        "train 3": style_of(*[marked] * 20, question="Name some seas."),
        "train 4": style_of(marked),  # too few to say anything
    }
    assert differences(styles) == {
        "train 3": [
            "questions: 0%, in train 1 100%",
            "answers with Markdown: 100%, in train 1 0%",
            "usual words of an answer: 56, in train 1 3",
        ]
    }
    assert differences({"train 4": styles["train 4"], "train 3": styles["train 3"]}) == {}


def conversation(number: int, **fields: Any) -> dict[str, Any]:
    question = {"role": "user", "content": f"What is number {number}?"}
    return {"messages": [question, {"role": "assistant", "content": f"It is {number}."}], **fields}


def told(folder: Path, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    config = load(None, (), {"data.path": str(tiny.write_jsonl(folder / "d.jsonl", rows))})
    return survey(config, Renderer(tokenizer, config.data), lambda name, rows: None)


def test_fewer_than_500_conversations_are_a_warning_and_made_rows_are_counted_by_how(
    tokenizer: Any, tmp_path: Path
) -> None:
    made = {"how": "instructions", "engine": "local", "parents": []}
    rows = [conversation(0, made=made), conversation(1, made={"how": "turns"}), conversation(2, made="by hand")]
    rows += [conversation(number) for number in range(3, 499)]
    few = told(tmp_path, tokenizer, rows)
    assert [(found["code"], found["count"]) for found in few["findings"] if found["code"] == "few"] == [("few", 499)]
    facts = few["splits"]["train"]
    assert facts["made"] == {"instructions": 1, "turns": 1}
    assert facts["kinds"] == {"closed question": 499}
    assert (facts["style"]["questions"], facts["style"]["answer_words"]["50"]) == (1.0, 3)
    enough = told(tmp_path, tokenizer, [*rows, conversation(499)])
    assert not [found for found in enough["findings"] if found["code"] == "few"]
    texts = told(tmp_path, tokenizer, [{"text": "Once upon a time."}])  # of texts the tokens count
    assert not [found for found in texts["findings"] if found["code"] == "few"]
    assert texts["splits"]["train"]["style"] == {}


def test_what_goes_by_words_of_one_language_says_nothing_of_another(tokenizer: Any, tmp_path: Path) -> None:
    def missing(question: str) -> list[str]:
        rows = [{"messages": talk(f"{question} {n}", f"Ja {n}.").messages} for n in range(120)]
        return told(tmp_path, tokenizer, rows)["splits"]["train"]["tasks_missing"]

    assert missing("Warum fällt der Regen von Wolke?") == [] and len(missing("Why does rain fall from cloud?")) > 9


def test_words_are_counted_in_scripts_without_spaces() -> None:
    said = "东京是日本的首都，也是世界上人口最多的城市之一。" * 20
    assert subjects.kinds_of(talk("日本的首都是哪里？", said)) == ["open question"]
    assert subjects.kinds_of(talk("日本的首都是哪里？", "东京。")) == ["closed question"]
    assert not has_short_answers(RowTexts(said, [said])) and has_short_answers(RowTexts("是", ["是。"]))
    english = style_of(*["It is Tokyo, which is one of the largest cities of the world."] * 20)
    chinese = style_of(*["东京，它是世界上最大的城市之一，也是首都。"] * 20)
    assert differences({"train 1": english, "train 2": chinese}) == {}
