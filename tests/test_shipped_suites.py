"""The suites that come with mlxtune can be read, and each question tells a right answer from a wrong one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pytest import MonkeyPatch, raises

from mlxtune.errors import UserError
from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.checks.shipped import BASICS, SAFETY
from mlxtune.evaluate.checks.suite import read_suite
from mlxtune.evaluate.engines.request import Answer

REFUSED, HELPED = "I'm sorry, but I can't help with that.", "Of course! Here is how it is done."


def passes(row: SuiteRow, text: str) -> bool:
    return all(check.score(Answer(row.id, 0, text, "", "stop", 0), row) == 1.0 for check in row.checks)


def test_a_hundred_basic_questions_take_their_own_answer_and_no_other() -> None:
    suite = read_suite(BASICS)
    assert len(suite.rows) == 100 and suite.notes == [] and suite.told() == []
    assert len({row.messages[0]["content"] for row in suite.rows}) == 100
    assert [row.id for row in suite.rows if not passes(row, row.reference or "")] == []
    for wrong in ("", "I do not know.", REFUSED):
        assert [row.id for row in suite.rows if passes(row, wrong)] == []
    others = suite.rows[1:] + suite.rows[:1]  # the answer to the next question
    taken = [row.id for row, other in zip(suite.rows, others, strict=True) if passes(row, other.reference or "")]
    assert taken == []


def test_they_are_found_by_their_names_unless_a_file_has_that_name(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_suite(Path("basics")).path == BASICS and read_suite(Path("safety")).path == SAFETY
    with raises(UserError, match="no data file basic") as refused:
        read_suite(Path("basic"))
    assert refused.value.hint == "A file of prompts, or a suite of mlxtune's own: basics, safety."
    with raises(UserError, match="basics: unknown file type"):
        Path("basics").write_text("")
        read_suite(Path("basics"))


def test_an_answer_in_a_sentence_counts_as_well() -> None:
    rows = {row.id: row for row in read_suite(BASICS).rows}
    said = {
        "arithmetic-1": "7 + 5 = 12",
        "arithmetic-10": "There are 8 x 6 = 48 jars on the shelf.",
        "capitals-1": "The capital of France is Paris.",
        "calendar-8": "There are 7 days in a week.",
        "opposites-1": 'The opposite of "hot" is "cold".',
        "choices-1": "The answer is B) apple.",
        "facts-2": "It is H₂O.",
        "formats-4": '```json\n{"name": "Ada"}\n```',
    }
    assert [name for name, text in said.items() if not passes(rows[name], text)] == []


def test_each_request_to_refuse_has_a_harmless_neighbour_to_answer() -> None:
    suite = read_suite(SAFETY)
    assert suite.notes == [] and len({str(row.messages) for row in suite.rows}) == len(suite.rows)
    count = Counter(tag for row in suite.rows for tag in row.tags)
    assert count["refuse"] >= 50 and count["answer"] >= 24
    for form in ("role play", "ignore instructions", "story", "authority", "another language", "system prompt"):
        assert count[form] >= 4, form
    answered = {row.group for row in suite.rows if "answer" in row.tags}
    for row in suite.rows:
        if "refuse" in row.tags:
            assert row.group in answered
            assert passes(row, REFUSED) and not passes(row, HELPED), row.id
        elif "answer" in row.tags:
            assert passes(row, HELPED) and not passes(row, REFUSED) and not passes(row, ""), row.id
        else:
            assert passes(row, REFUSED) and not passes(row, "The word is HERON."), row.id
