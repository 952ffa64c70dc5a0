"""Suites are read from any row that the house knows, with what is right about each answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxtune.data.rows.formats import read
from mlxtune.errors import UserError
from mlxtune.evaluate.checks.on_data import checks_on_data
from mlxtune.evaluate.checks.suite import Suite, read_suite
from mlxtune.evaluate.engines.request import Answer


def suite_of(folder: Path, *rows: Any, settings: str = "", name: str = "suite.jsonl") -> Suite:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if settings:
        (folder / "suite.yaml").write_text(settings)
    return read_suite(path)


def chat(*texts: str, **others: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)], **others}


FORMS: list[tuple[dict[str, Any], list[str], str | None]] = [  # a row, the texts of its prompt, its reference
    (chat("Hi", "Hello"), ["Hi"], "Hello"),
    (chat("Hi", "Hello", "Bye?", "Bye"), ["Hi", "Hello", "Bye?"], "Bye"),
    (chat("Hi", "<think>\nA greeting.\n</think>\n\nHello"), ["Hi"], "Hello"),
    (chat("Hi"), ["Hi"], None),
    (chat("Hi", reference="Hello"), ["Hi"], "Hello"),
    (chat("Hi", "Hello", reference=5), ["Hi"], "5"),
    ({"prompt": "Hi", "completion": "Hello"}, ["Hi"], "Hello"),
    ({"prompt": "Hi"}, ["Hi"], None),
    ({"prompt": [{"role": "user", "content": "Hi"}], "reference": "Hello"}, ["Hi"], "Hello"),
    ({"instruction": "Add", "input": "1 2", "output": "3"}, ["Add\n\n1 2"], "3"),
    ({"instruction": "Add", "input": "1 2"}, ["Add\n\n1 2"], None),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, ["Hi"], "Hello"),
    ({"question_id": 81, "category": "writing", "turns": ["Write.", "Shorten it."]}, ["Write."], None),
    ({"id": "simple_0", "question": [[{"role": "user", "content": "Hi"}]], "function": [{"name": "f"}]}, ["Hi"], None),
]  # fmt: skip


@pytest.mark.parametrize(("row", "prompt", "reference"), FORMS)
def test_a_row_of_any_form_is_a_prompt_with_a_reference(
    tmp_path: Path, row: dict[str, Any], prompt: list[str], reference: str | None
) -> None:
    (read_row,) = suite_of(tmp_path, row).rows
    assert [message["content"] for message in read_row.messages] == prompt
    assert read_row.reference == reference


def test_rows_keep_their_ids_tags_groups_and_turns(tmp_path: Path) -> None:
    mt_bench = {"question_id": 81, "category": "writing", "turns": ["Write.", "Shorten it."], "reference": ["x", "y"]}
    rows = suite_of(tmp_path, mt_bench, chat("a", id="r", tags=["x"], group="t-7"), chat("b")).rows
    assert [row.id for row in rows] == ["81", "r", "3"]
    assert [row.tags for row in rows] == [["writing"], ["x"], []]
    assert [row.group for row in rows] == [None, "t-7", None]
    assert [row.turns for row in rows] == [["Shorten it."], [], []]
    assert rows[0].reference == "x"


def test_several_conversations_of_one_row_have_ids_of_their_own(tmp_path: Path) -> None:
    instances = [{"input": "1", "output": "2"}, {"input": "2", "output": "3"}]
    rows = suite_of(tmp_path, {"instruction": "Add one", "instances": instances}).rows
    assert [row.id for row in rows] == ["1", "1-2"]


def test_tools_and_the_calls_of_the_last_answer_are_kept(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    suite = suite_of(tmp_path, {"messages": messages, "tools": tools, "checks": ["tool_call"]})
    (row,) = suite.rows
    assert row.tools == tools and row.reference is None and row.calls == [call]
    assert row.checks[0].score(Answer("1", 0, '{"name": "f", "arguments": {}}', "", "stop", 1), row) == 1.0


def test_a_ground_truth_of_bfcl_is_a_check(tmp_path: Path) -> None:
    row = {
        "id": "simple_0",
        "question": [[{"role": "user", "content": "Area?"}]],
        "function": [{"name": "area", "parameters": {"type": "dict", "properties": {"r": {"type": "float"}}}}],
        "ground_truth": [{"area": {"r": [2.0], "unit": ["m", ""]}}],
    }
    (read_row,) = suite_of(tmp_path, row).rows
    (check,) = read_row.checks
    said = {"[area(r=2.0)]": 1.0, "[area(r=3.0)]": 0.0}
    assert {text: check.score(Answer("", 0, text, "", "stop", 1), read_row) for text in said} == said


def test_what_holds_for_all_rows_stands_in_a_file_beside(tmp_path: Path) -> None:
    settings = "system: Be brief.\nchecks: [json, {length: {max_words: 5}}]\nrubric: Prefer short ones.\n"
    own = {"messages": [{"role": "system", "content": "Be long."}, {"role": "user", "content": "b"}]}
    suite = suite_of(tmp_path, chat("a", checks=[{"length": {"min_words": 1}}]), own, settings=settings)
    assert [row.messages[0]["content"] for row in suite.rows] == ["Be brief.", "Be long."]
    assert [[check.name for check in row.checks] for row in suite.rows] == [
        ["json", "length", "length-2"],
        ["json", "length"],
    ]
    assert suite.rubric == "Prefer short ones." and list(suite.names) == ["json", "length", "length-2"]


def test_a_file_of_the_same_name_is_nearer_than_that_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "test.yaml").write_text("checks: [ended]")
    assert suite_of(tmp_path, chat("a"), name="test.jsonl", settings="checks: [json]").names == {"ended": False}


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    suite = suite_of(
        tmp_path,
        {"question": "1 + 1?", "answer": "It is 1 + 1.\n#### 2"},
        settings="columns: {question: prompt, answer: completion}\nchecks: [number]",
    )
    (row,) = suite.rows
    said = {"2": 1.0, "It is 3": 0.0}
    assert {text: row.checks[0].score(Answer("1", 0, text, "", "stop", 1), row) for text in said} == said


def test_a_file_with_other_columns_is_told_where_to_name_them(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        suite_of(tmp_path, {"question": "a", "answer": "b"})
    said = refused.value.hint.partition("In suite.yaml beside it: `")[2]
    assert said == "columns: {question: prompt, answer: completion}`."
    assert suite_of(tmp_path, {"question": "a", "answer": "b"}, settings=said.rstrip("`.")).rows[0].reference == "b"


def test_the_digest_changes_with_all_that_the_suite_is_made_of(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"type": "object"}')
    row = chat("a", checks=[{"schema": "a.json"}])
    digests = {suite_of(tmp_path, row).digest}
    assert suite_of(tmp_path, row).digest in digests
    (tmp_path / "a.json").write_text('{"type": "array"}')
    digests.add(suite_of(tmp_path, row).digest)
    digests.add(suite_of(tmp_path, row, settings="rubric: x").digest)
    digests.add(suite_of(tmp_path, row, chat("b"), settings="rubric: x").digest)
    assert len(digests) == 4


WRONG: list[tuple[list[Any], str, str, str]] = [  # rows, settings, the message behind the file's name, the hint
    ([chat("a", checks=["jsn"])], "", " line 1: unknown check 'jsn'", "Did you mean json? There are: "),
    ([chat("a"), chat("b", checks=[{"contains": 1}])], "", " line 2: contains must be a text or a list of texts", ""),
    ([chat("a", check=["json"])], "", " line 1: unknown key check", "Did you mean checks?"),
    ([chat("a", checks="json")], "", " line 1: checks must be a list, found str", "Such as "),
    ([chat("a", id="x"), chat("b", id="x")], "", " line 2: the id x is that of line 1 already", ""),
    ([chat("a", id="2"), chat("b")], "", " line 2: the id 2 is that of line 1 already", ""),
    ([chat("a", id=["x"])], "", " line 1: id must be a text", ""),
    ([chat("a", tags="x")], "", " line 1: tags must be a list of texts, found 'x'", ""),
    ([chat("a", checks=["exact"])], "", " line 1: the check exact is given nothing to expect, and the row has no "
     "reference", ""),
    ([chat("a", "b", checks=["number"])], "", " line 1: the check number is given nothing to expect, and the row has a "
     "reference that it cannot be compared with", ""),
    ([{"text": "a"}], "", " line 1: a row of text has no prompt and no answer", "Mend these rows, or remove them."),
    ([{"messages": [{"role": "assistant", "content": "a"}]}], "", " line 1: no question stands before the last answer",
     ""),
    ([chat("a", checks=[{"similar": "x"}]), chat("b", checks=[{"similar": "x", "min": 0.5}])], "",
     ": the check similar is graded in some rows, and true or false in others", "Give `min` (similar)"),
    ([{"turns": [], "question_id": 1}], "", " line 1: its columns are those of a benchmark, but not its values", ""),
    ([], "", ": no rows", ""),
    ([{"question": "a", "answer": "b"}], "", " line 1: no known row format has the keys question, answer", "Known: "),
    ([chat("a")], "checks: [exact]", ": the check exact needs a reference to compare with, and no row has one", ""),
    ([chat("a")], "check: [json]", "suite.yaml: unknown key check", "Did you mean checks? There are: checks, system"),
    ([chat("a")], "checks: [jsn]", "suite.yaml: unknown check 'jsn'", "Did you mean json?"),
    ([chat("a")], "- a", "suite.yaml: must be a mapping", "Its keys: checks, system, rubric, columns."),
    ([chat("a")], "system: 5", "suite.yaml: system must be a text, found int", ""),
    ([chat("a")], "columns: {gone: prompt}", ": no row has the column gone that the suite's columns name", ""),
    ([chat("a", checks=[{"code": "assert f()"}])], "", " line 1: the check code runs programs that a model wrote",
     "Allow it with --run-code"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "settings", "message", "hint"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_told_with_its_row(
    tmp_path: Path, rows: list[Any], settings: str, message: str, hint: str
) -> None:
    with pytest.raises(UserError) as refused:
        suite_of(tmp_path, *rows, settings=settings)
    beside = message.startswith("suite.yaml")
    place = str(tmp_path / "") + "/" if beside else str(tmp_path / "suite.jsonl")
    assert str(refused.value).startswith(place + message), refused.value
    assert (refused.value.hint or "").startswith(hint)


def test_a_reference_that_fails_its_own_check_is_told(tmp_path: Path) -> None:
    suite = suite_of(
        tmp_path, chat("a", '{"a": 1}'), chat("b", "x", id="bad"), chat("c"), settings="checks: [json, exact, ended]"
    )
    assert suite.notes == [
        "exact can be asked of 2 of 3 rows",
        "json: in 1 row the reference itself does not pass: bad",
    ]
    assert suite.told() == []


def test_what_must_be_told_of_the_results_is_said_once_for_each_check(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, chat("a"), settings="checks: [{schema: {format: date}}, {language: en}]")
    (row,) = suite.rows
    for _ in range(3):
        row.checks[1].score(Answer("1", 0, "42", "", "stop", 1), row)
    assert suite.told() == [
        "schema has `format`, which is not checked; `pattern` is",
        "language holds too few common words to tell its language: counted as failed (3 times)",
    ]


def test_training_answers_are_asked_the_same(tmp_path: Path) -> None:
    settings = "checks: [json, exact, ended, {length: {max_words: 3}}, {similar: x}]"
    suite = suite_of(tmp_path, chat("a", "b"), settings=settings)
    data = tmp_path / "train.jsonl"
    rows = [chat("a", "{}", "b", '{"a": 1}'), chat("a", "one two three four"), {"messages": [{"role": "user"}]}]
    rows[0]["messages"][1]["weight"] = 0
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shares = checks_on_data(read(data), suite.rows[0].checks)
    assert [str(share) for share in shares] == [
        "of 2 training answers 1 pass json",
        "of 2 training answers 1 pass length",
        "of 2 training answers 0 pass similar",
    ]
