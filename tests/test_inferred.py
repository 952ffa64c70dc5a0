"""Checks inferred from answers: they accept those that they were inferred from, and refuse damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from checking import answer_of

from mlxtune.data.rows import formats
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.messages import WEIGHTS
from mlxtune.demo import story
from mlxtune.evaluate.checks.arguments import Place
from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.checks.kinds import read_checks
from mlxtune.evaluate.checks.sandbox.sandbox import Programs
from mlxtune.evaluate.checks.suite import read_suite
from mlxtune.evaluate.inferred.infer import Inferred, infer
from mlxtune.evaluate.inferred.shape import schema_of
from mlxtune.evaluate.inferred.suite_rows import suite_rows, training_answers


def passes(found: Inferred, text: str, reference: str = "", finish: str = "stop") -> bool:
    """Whether an answer passes all checks."""
    row = SuiteRow("1", [{"role": "user", "content": "?"}], reference=reference or text)
    checks = read_checks(found.checks, Place(Path(), Programs()), [], {})
    return all(check.score(answer_of(text, finish=finish), row) == 1.0 for check in checks)


def records_of(file: Path) -> list[Record]:
    return [record for record in formats.read(file) if isinstance(record, Record)]


def demo_answers() -> list[str]:
    answers, _, _ = training_answers(records_of(story.data_folder() / "train.jsonl"))
    return answers


def replies(count: int) -> list[str]:
    """JSON of one form: an enum, a truth value, a number, free text."""
    topics = ("returns", "delivery", "garden")
    found = []
    for number in range(count):
        reply = {"topic": topics[number % 3], "urgent": number % 2 == 0, "days": number, "reply": f"Answer {number}."}
        found.append(json.dumps(reply))
    return found


GOOD = {"topic": "returns", "urgent": False, "days": 3, "reply": "Send it back."}
DAMAGED: dict[str, str] = {
    "cut": json.dumps(GOOD)[:-5],
    "with a word before it": "Sure! " + json.dumps(GOOD),
    "in a fenced block": f"```json\n{json.dumps(GOOD)}\n```",
    "without a key": json.dumps({key: value for key, value in GOOD.items() if key != "urgent"}),
    "with a key more": json.dumps({**GOOD, "mood": "cross"}),
    "with a key misspelt": json.dumps({**{k: v for k, v in GOOD.items() if k != "topic"}, "topik": "returns"}),
    "with a value of no enum": json.dumps({**GOOD, "topic": "refunds"}),
    "with a text for a truth value": json.dumps({**GOOD, "urgent": "no"}),
    "with a text for a number": json.dumps({**GOOD, "days": "three"}),
    "a list": json.dumps([GOOD]),
    "with single quotes": str(GOOD),
    "with a key twice": json.dumps(GOOD)[:-1] + ', "days": 4}',
    "empty": "",
}


def test_json_answers_become_a_schema_that_accepts_them_all_and_no_damaged_one() -> None:
    found = infer(replies(120))
    assert (found.kind, found.not_accepted) == ("json", [])
    assert all(passes(found, text) for text in replies(120))
    assert passes(found, json.dumps(GOOD, indent=2))
    assert [name for name, text in DAMAGED.items() if passes(found, text)] == []
    (check,) = found.checks
    assert isinstance(check, dict)
    properties = check["schema"]["properties"]
    assert properties["topic"] == {"type": "string", "enum": ["delivery", "garden", "returns"]}
    assert properties["urgent"] == {"type": "boolean"}
    assert properties["reply"] == {"type": "string"} and properties["days"] == {"type": "integer"}


def test_the_answers_of_the_demo_become_a_schema_with_its_topics() -> None:
    answers = demo_answers()
    found = infer(answers)
    assert found.kind == "json"
    assert len(found.not_accepted) <= 0.05 * len(answers)
    (check,) = found.checks
    assert isinstance(check, dict)
    topics = {json.loads(text)["topic"] for text in answers}
    assert set(check["schema"]["properties"]["topic"]["enum"]) == topics
    assert "enum" not in check["schema"]["properties"]["reply"]


def test_up_to_one_answer_in_twenty_is_refused_and_named() -> None:
    answers = replies(100)
    answers[7] = "I do not know."
    answers[30] = json.dumps({**json.loads(answers[30]), "urgnet": True})
    answers[60] = json.dumps({**json.loads(answers[60]), "days": "a week"})
    found = infer(answers)
    assert [place for place, _ in found.not_accepted] == [7, 30, 60]
    reasons = [why for _, why in found.not_accepted]
    assert "no JSON" in reasons[0] and "'urgnet'" in reasons[1] and "string under 'days'" in reasons[2]
    assert all(passes(found, text) for place, text in enumerate(answers) if place not in (7, 30, 60))
    for text in (answers[7], answers[30], answers[60]):
        assert not passes(found, text)


def test_what_more_than_one_in_twenty_have_belongs_to_the_form() -> None:
    answers = replies(100)
    for place in range(0, 100, 10):
        answers[place] = json.dumps({**json.loads(answers[place]), "note": "x", "days": None})
    found = infer(answers)
    assert found.not_accepted == [] and all(passes(found, text) for text in answers)
    assert infer([*replies(90), *["no"] * 10]).kind == "text"


def test_a_fenced_block_stays_the_form_where_answers_have_it() -> None:
    answers = [f"```json\n{text}\n```" for text in replies(40)]
    found = infer(answers)
    assert found.kind == "json" and all(passes(found, text) for text in answers)
    assert not passes(found, "```json\n{}\n```")


@pytest.mark.parametrize(
    "labels",
    [
        ["positive", "negative", "neutral"],
        ["yes", "no"],
        ["A", "B", "D"],
        ["B", "C"],
        ["a.*", "a+", "(a|b)"],
        ["New York", "New York City"],
        [f"class-{letter}" for letter in "abcdefghijklmnopq"],
        ["Yes", "yes"],
        ["class 1", "class 2", "class 10"],
    ],
)
def test_labels_become_a_choice_that_tells_each_from_all_others(labels: list[str]) -> None:
    found = infer(labels * 20)
    assert (found.kind, found.not_accepted) == ("choice", [])
    for label in labels:
        assert passes(found, label, label)
        others = [
            other for other in [*labels, "", "perhaps", "none of them", label[:-1], label + "x"] if other != label
        ]
        assert [other for other in others if passes(found, other, label)] == []


def test_a_label_that_nobody_else_has_is_named() -> None:
    found = infer([*["spam", "ham"] * 20, "perhaps spam"])
    assert found.kind == "choice" and "options" in str(found.checks)
    assert [place for place, _ in found.not_accepted] == [40]


def test_ratings_are_numbers() -> None:
    assert infer([str(number % 5) for number in range(50)]).kind == "number"


def test_a_sentence_with_a_number_in_it_is_text_and_a_number_with_a_unit_is_one() -> None:
    assert infer([f"See page {number} there" for number in range(40)]).kind == "text"
    assert infer([f"about {number}.5 km" for number in range(40)]).kind == "number"


def test_a_few_labels_are_not_told_from_free_text() -> None:
    assert infer(["yes", "no"] * 5).kind == "text"


@pytest.mark.parametrize(
    ("answer", "damaged"),
    [
        ("{}", ["", "none", "a lot", "12 or 13 or 14", "1e999999", "twelve"]),
        ("{} kg", ["", "kg", "a few kg"]),
        ("So 3 of 4 are left over, and a half of that.\n#### {}", ["#### none", "So it is 3 of 4.", ""]),
    ],
)
def test_numbers_become_a_check_on_the_right_one(answer: str, damaged: list[str]) -> None:
    answers = [answer.format(number * 7) for number in range(40)]
    found = infer(answers)
    assert (found.kind, found.not_accepted) == ("number", [])
    for place, text in enumerate(answers):
        assert passes(found, text, text)
        assert not passes(found, answers[place - 1], text)
    reference = answer.format(700)
    assert [text for text in [*damaged, reference + " word" * 500] if passes(found, text, reference)] == []


def test_free_text_gets_ended_no_repeat_and_a_length_alone() -> None:
    answers = [f"Dear customer {number}, {'thank you for your patience ' * (number % 3)}." for number in range(60)]
    found = infer(answers)
    assert found.kind == "text"
    assert found.checks == ["ended", "no_repeat", {"length": {"min_words": 1, "max_words": 20}}]
    assert all(passes(found, text) for text in answers)
    assert not passes(found, answers[0], finish="length")
    assert not passes(found, "so it goes on " * 6) and not passes(found, "") and not passes(found, " word1" * 40)


def test_without_answers_nothing_is_said_of_their_length() -> None:
    assert infer([]).checks == ["ended", "no_repeat"]
    assert infer(["A few words.", "And some more of them."]).checks[-1] == {"length": {"min_words": 1, "max_words": 15}}


def test_a_check_that_many_answers_fail_is_left_out() -> None:
    refrains = ["la la la la la la la la la la la la la la la la " + str(number) for number in range(30)]
    found = infer([*refrains, *(f"Text number {number} is another one." for number in range(30))])
    assert found.kind == "text" and "no_repeat" not in found.checks and "ended" in found.checks


def test_thoughts_are_no_part_of_an_answer() -> None:
    assert infer([f"<think>Which one is it?</think>\n\n{text}" for text in replies(40)]).kind == "json"


KEYS = ("$ref", "$id", "pattern", "patternProperties", "unevaluatedProperties", "enum", "format", "properties", "")
HOSTILE: dict[str, Callable[[int], str]] = {
    "huge": lambda number: f"{number} " + "x" * 50_000,
    "nested deeply": lambda number: "[" * 20_000,
    "nested objects": lambda number: '{"a":' * 90 + str(number) + "}" * 90,
    "keywords of JSON Schema": lambda number: json.dumps(dict.fromkeys(KEYS, f"^(a+)+${number}")),
    "patterns without an end": lambda number: json.dumps({"(a+)+$": "(a+)+$", "n": number}),
    "keys that are data": lambda number: json.dumps({f"name {number}": number, f"other {number}": 1}),
    "half a character": lambda number: '{"a": "\\ud83d"}',
    "not a number": lambda number: '{"a": NaN}',
    "control characters": lambda number: f"\x1b[31m{number}\x00\u202e",
    "markup": lambda number: f"[bold]{{{number}}}[/bold] {{% raw %}}",
    "an empty answer": lambda number: "",
    "mixed values": lambda number: json.dumps({"a": [None, True, 1, 1.5, "x", [], {}][number % 7], "b": ""}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_give_checks_that_accept_them(name: str) -> None:
    answers = [HOSTILE[name](number) for number in range(24)]
    found = infer(answers)
    assert found.checks
    assert len(found.not_accepted) <= 0.05 * len(answers)
    read_checks(found.checks, Place(Path(), Programs()), [], {})
    assert len(json.dumps(found.checks)) < 20_000


def test_keys_that_never_recur_are_data_and_their_values_have_the_schema() -> None:
    schema = schema_of([{f"name {number}": number} for number in range(50)])
    assert schema == {"type": "object", "additionalProperties": {"type": "integer"}}


@pytest.mark.parametrize(
    ("values", "few"),
    [
        (["a", "b"] * 20, True),
        (["a", "b"] * 9, False),  # too few to know
        ([f"value {number}" for number in range(20)], False),  # each seen once: the next is new as well
        ([f"value {number % 21}" for number in range(210)], False),
        ([1, 2, 3, 4, 5] * 8, True),
        ([None, "x"] * 20, True),
        (["", "x"] * 20, True),
        ([0.5, 1.5] * 20, False),
        (["x" * 201, "y"] * 20, False),
    ],
)
def test_values_that_are_few_and_recur_are_an_enum(values: list[Any], few: bool) -> None:
    assert ("enum" in schema_of(values)) == few


def conversations(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "system", "content": "You answer for a shop."},
                {"role": "user", "content": f"Question {number}?"},
                {"role": "assistant", "content": text},
            ]
        }
        for number, text in enumerate(replies(count))
    ]


def test_a_suite_of_held_out_rows_is_read_as_it_is_written(tmp_path: Path) -> None:
    records = records_of(tiny.write_jsonl(tmp_path / "test.jsonl", conversations(130)))
    answers, prompts, places = training_answers(records)
    assert len(answers) == len(prompts) == len(places) == 130
    rows = suite_rows(records, infer(answers, prompts).checks, seed=3)
    suite = read_suite(tiny.write_jsonl(tmp_path / "suite.jsonl", rows))
    assert len(suite.rows) == 100 and suite.notes == []
    assert all(row.messages[0]["content"] == "You answer for a shop." for row in suite.rows)
    assert all(row.reference is not None and [check.name for check in row.checks] == ["schema"] for row in suite.rows)
    ids = [row["id"] for row in rows]
    assert ids == [row["id"] for row in suite_rows(records, [], seed=3)]
    assert ids != [row["id"] for row in suite_rows(records, [], seed=4)]


@pytest.mark.parametrize(
    ("usual", "odd"), [("{}", "Nobody knows."), ("class-{}", "another one")], ids=["numbers", "labels"]
)
def test_a_row_with_nothing_to_compare_lacks_that_check_and_the_suite_is_read(
    usual: str, odd: str, tmp_path: Path
) -> None:
    answers = [usual.format(number % 3) for number in range(60)] + [odd]
    asked = [f"Number {number}?" for number in range(61)]
    rows = [
        [{"role": "user", "content": ask}, {"role": "assistant", "content": text}]
        for ask, text in zip(asked, answers, strict=True)
    ]
    data = tiny.write_jsonl(tmp_path / "test.jsonl", [{"messages": messages} for messages in rows])
    found = infer(answers)
    assert [place for place, _ in found.not_accepted] == [60]
    made = suite_rows(records_of(data), found.checks)
    assert len(made[-1]["checks"]) < len(made[0]["checks"])
    assert len(read_suite(tiny.write_jsonl(tmp_path / "suite.jsonl", made)).rows) == 61


def test_an_answer_that_calls_tools_is_asked_for_its_calls(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    calling = {
        "messages": [
            {"role": "user", "content": "Find it."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ],
        "tools": [tool],
    }
    records = records_of(tiny.write_jsonl(tmp_path / "test.jsonl", [calling, *conversations(3)]))
    rows = suite_rows(records, ["ended"])
    assert [row["checks"] for row in rows] == [["tool_call"], ["ended"], ["ended"], ["ended"]]
    suite = read_suite(tiny.write_jsonl(tmp_path / "suite.jsonl", rows))
    assert suite.rows[0].calls and suite.rows[0].tools


def test_a_prompt_that_many_rows_answer_is_asked_once_and_those_that_share_a_question_are_a_group(
    tmp_path: Path,
) -> None:
    def asking(ask: str, answer: str, system: str, **more: Any) -> dict[str, Any]:
        said = [("system", system), ("user", ask), ("assistant", answer)]
        messages = [{"role": role, "content": text} for role, text in said]
        messages[-1].update(more)
        return {"messages": messages}

    rows = [asking(f"Question  {number % 4}?", f"Answer {number}", "Be kind.") for number in range(40)]
    rows += [asking("question 3?", "Answer 3", "Be kind."), asking("Question 3?", "Aye", "Be a pirate.")]
    rows += [asking("Question 5?", "No.", "Be kind.", **{name: 0}) for name in WEIGHTS]
    made = suite_rows(records_of(tiny.write_jsonl(tmp_path / "test.jsonl", rows)), ["ended"])
    assert [row["messages"][-1]["content"] for row in made] == ["Answer 0", "Answer 1", "Answer 2", "Answer 3", "Aye"]
    groups = [row.group for row in read_suite(tiny.write_jsonl(tmp_path / "suite.jsonl", made)).rows]
    assert groups[:3] == [None] * 3 and groups[3] == groups[4] is not None
