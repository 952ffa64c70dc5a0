"""Files of pairs and ratings that cannot be used: one line with the file, the place and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from reading import all_of

from mlxtune.cli import make_refusals
from mlxtune.config.schema import DataSection
from mlxtune.data.dataset import sources
from mlxtune.errors import UserError
from mlxtune.evaluate.checks.suite import read_suite
from mlxtune.evaluate.forgetting import texts
from mlxtune.make.curation import candidates
from mlxtune.make.given_rows import read_conversations
from mlxtune.make.seeds import read_seeds

ASKED = {"role": "user", "content": "Sky?"}
BLUE, RED = ({"role": "assistant", "content": text} for text in ("Blue.", "Red."))
PAIR = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Red."}
WHOLE = {"chosen": [ASKED, BLUE], "rejected": [ASKED, RED]}
RATED = {"prompt": "Sky?", "completion": "Blue.", "label": True}
TURNS = {
    "conversations": [{"from": "human", "value": "Sky?"}],
    "chosen": {"from": "gpt", "value": "Blue."},
    "rejected": {"from": "gpt", "value": "Red."},
}
OPENAI = {"input": {"messages": [ASKED]}, "preferred_output": [BLUE], "non_preferred_output": [RED]}
ORCA = {"question": "Sky?", "chosen": "Blue.", "rejected": "Red."}
TOOL = {"type": "function", "function": {"name": "look"}}


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


# name: (a good first row, the broken second one, what the line must say)
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a missing column": (
        PAIR,
        without(PAIR, "rejected"),
        "rejected must be a text, a message or a non-empty list of messages, found nothing",
    ),
    "a null side": (PAIR, {**PAIR, "chosen": None}, "chosen must be a text, a message or a non-empty list"),
    "a number for a side": (PAIR, {**PAIR, "chosen": 7}, "list of messages, found int"),
    "a number for a prompt": (PAIR, {**PAIR, "prompt": 7}, "prompt must be a text, a message or a non-empty list"),
    "an empty list": (PAIR, {**PAIR, "rejected": []}, "rejected must be .* found an empty list"),
    "a list of texts": (PAIR, {**PAIR, "rejected": ["Red."]}, "rejected: message 1 must be an object"),
    "an unknown role": (
        WHOLE,
        {**WHOLE, "rejected": [ASKED, {"role": "bot", "content": "Red."}]},
        "rejected: message 2 has the role 'bot'; allowed: system, developer, user, assistant, tool",
    ),
    "no content": (WHOLE, {**WHOLE, "chosen": [ASKED, {"role": "assistant"}]}, r"chosen: message 2 .* text content"),
    "an image": (
        PAIR,
        {**PAIR, "chosen": [{"role": "assistant", "content": [{"type": "image"}]}]},
        "chosen: message 1 .* holds an image; text alone is trained on",
    ),
    "a broken call": (
        PAIR,
        {**PAIR, "chosen": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "chosen: message 1: the arguments of f are not valid JSON",
    ),
    "broken tools": (PAIR, {**PAIR, "tools": "{"}, "tools must be a JSON list"),
    "half a character": (PAIR, {**PAIR, "rejected": "Red \ud83d"}, "the text holds half a character"),
    "a side that begins with a question": (
        ORCA,
        {**ORCA, "chosen": [ASKED, BLUE]},
        "chosen begins with a user turn, but must be the answer to the prompt",
    ),
    "one whole conversation and one answer": (
        PAIR,
        {**PAIR, "chosen": [ASKED, BLUE]},
        "chosen is a whole conversation, but rejected an answer",
    ),
    "sides that do not begin with the prompt": (
        PAIR,
        {**WHOLE, "prompt": "Sea?"},
        "chosen and rejected are whole conversations that do not begin with the prompt",
    ),
    "a side that begins with other messages than the prompt": (
        PAIR,
        {**WHOLE, "prompt": [{"role": "user", "content": "Sea?"}]},
        "chosen begins with a question, but not with the messages of prompt",
    ),
    "a prompt that ends with an answer": (
        PAIR,
        {**PAIR, "prompt": [ASKED, BLUE]},
        "prompt ends with an assistant turn: .* put it into chosen and into rejected",
    ),
    "Anthropic's prompt that ends with an answer": (
        PAIR,
        {**PAIR, "prompt": "\n\nHuman: Sky?\n\nAssistant: Well,"},
        "prompt ends with an assistant turn",
    ),
    "a list that is written in Python's way": (
        PAIR,
        {**PAIR, "chosen": str([ASKED, BLUE])},
        "chosen is a list of messages as Python prints it, which is not JSON: write them as JSON text",
    ),
    "no prompt at all": (
        WHOLE,
        {"chosen": [BLUE], "rejected": [RED]},
        "chosen and rejected do not begin with the same question: a pair is two answers to one prompt",
    ),
    "texts without a prompt": (
        WHOLE,
        {"chosen": "Blue.", "rejected": "Red."},
        r"chosen is a text without a prompt: give a column prompt, or .*\\n\\nHuman",
    ),
    "Anthropic's text that begins with the assistant": (
        WHOLE,
        {"chosen": "\n\nAssistant: Blue.", "rejected": "\n\nAssistant: Red."},
        "do not begin with the same question",
    ),
    "OpenAI's input without messages": (
        OPENAI,
        {**OPENAI, "input": {"tools": []}},
        "input.messages must be .* found nothing",
    ),
    "a text for OpenAI's input": (OPENAI, {**OPENAI, "input": "Sky?"}, "input must be an object with messages"),
    "tools that differ": (
        OPENAI,
        {**OPENAI, "input": {"messages": [ASKED], "tools": [TOOL]}, "tools": [{**TOOL, "strict": True}]},
        "tools and the tools of input differ: which of them does the prompt offer",
    ),
    "an unknown speaker": (TURNS, {**TURNS, "chosen": {"from": "me", "value": "x"}}, "chosen: turn 2 is from 'me'"),
    "no turns": (TURNS, {**TURNS, "conversations": []}, "conversations must be a non-empty list of turns"),
    "turns that end with an answer": (
        TURNS,
        {**TURNS, "conversations": [*TURNS["conversations"], TURNS["chosen"]]},
        "prompt ends with an assistant turn",
    ),
    "a label of another kind": (
        RATED,
        {**RATED, "label": "spam"},
        r"label is 'spam'; allowed: true, false \(or 1, 0, desirable, undesirable\), or null",
    ),
    "a score for a label": (RATED, {**RATED, "label": 0.7}, "label is 0.7; allowed: true, false"),
    "a list for a label": (RATED, {**RATED, "label": [True]}, r"label is \[True\]; allowed"),
    "a missing label": (RATED, without(RATED, "label"), "no label, which other rows have; allowed: true, false"),
    "a rating of a question": (
        {"messages": [ASKED, BLUE], "label": True},
        {"messages": [ASKED], "label": True},
        "no answer to rate: the last message is of the user",
    ),
    "a rating of nothing asked": (
        {"messages": [ASKED, BLUE], "label": True},
        {"messages": [BLUE], "label": True},
        "no prompt: a rating is of an answer to something",
    ),
    "a rated text": (
        {"text": "Once", "label": True},
        {"text": "Once", "label": True},
        "label rates the answer of a conversation, and this row holds a plain text",
    ),
    "one label for two answers": (
        {"instruction": "Colour", "instances": [{"input": "sky", "output": "blue"}], "label": True},
        {"instruction": "C", "instances": [{"output": "a"}, {"output": "b"}], "label": True},
        "this row holds 2 conversations",
    ),
    "a rated completion that goes on": (
        RATED,
        {"prompt": [ASKED, BLUE], "completion": [RED], "label": True},
        "prompt ends with an assistant turn",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_broken_row_is_named_with_its_place_and_what_is_allowed(name: str, tmp_path: Path) -> None:
    first, broken, words = ROWS[name]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, broken)))
    with pytest.raises(UserError, match=rf"line .*2: .*{words}") as error:
        sources.require_readable(DataSection(path=str(path)), all_rows=True, preferences=True)
    assert str(path) in error.value.message
    assert "\n" not in error.value.message
    assert error.value.hint == "Mend or remove them; `mlxtune data check` lists every one."


def test_a_file_without_one_of_the_sides_is_told_which_formats_there_are(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Q", "chosen": "A"}])
    with pytest.raises(UserError, match=r"line 1: no known row format has the keys prompt, chosen") as error:
        sources.require_readable(DataSection(path=str(path)), preferences=True)
    assert "prompt + chosen + rejected" in error.value.hint


def test_broken_pairs_are_counted_among_the_rows(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [PAIR, PAIR, {**PAIR, "chosen": 1}, {**PAIR, "chosen": 1}])
    with pytest.raises(UserError, match="2 of 4 rows cannot be used: line 3, 4: chosen must be a text"):
        sources.require_readable(DataSection(path=str(path)), all_rows=True)


def test_columns_that_seem_to_be_sides_are_to_be_renamed_to_them(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Q", "response_chosen": "A", "Rejected": "B"}])
    with pytest.raises(UserError, match="no known row format") as error:
        sources.require_readable(DataSection(path=str(path)))
    assert error.value.hint.endswith("--set 'data.columns={response_chosen: chosen, Rejected: rejected}'.")
    renamed = DataSection(path=str(path), columns={"response_chosen": "chosen", "Rejected": "rejected"})
    sources.require_readable(renamed, all_rows=True)


@pytest.mark.parametrize(
    ("recipe", "name", "expected"),
    [
        ("dpo", "a prompt that ends with an answer", "line 2: prompt ends with an assistant turn"),
        ("kto", "a label of another kind", "line 2: label is 'spam'; allowed: true, false"),
    ],
)
def test_training_refuses_a_broken_row_in_one_line(recipe: str, name: str, expected: str, tmp_path: Path) -> None:
    path, out = tiny.write_jsonl(tmp_path / "d.jsonl", list(ROWS[name][:2])), tmp_path / "run"
    tiny.refused(out, "train", "-c", recipe, "--model", "not-here", "--data", path, "--out", out, expected=(expected,))


def test_pairs_of_which_none_says_what_is_better_are_refused_with_the_reasons(tokenizer: Any, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{**PAIR, "chosen": "Red."}, {**PAIR, "rejected": ""}])
    with pytest.raises(
        UserError, match="none of 2 rows can be used; line 1: chosen and rejected are the same, the rej"
    ):
        all_of(path, tokenizer)


def test_pairs_are_refused_where_every_answer_would_be_taken_for_a_good_one(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [WHOLE])
    unused: Any = None
    readers: list[Callable[[Path], Any]] = [
        lambda file: candidates.read([file], {}),
        lambda file: list(texts._tokenized(file, unused, unused)),
        read_seeds,
        read_conversations,
        read_suite,
    ]
    for reader in readers:
        with pytest.raises(UserError, match="pairs of answers, of which one is preferred, are not read here"):
            reader(path)
    assert make_refusals._rows_of(str(path)) == 1
