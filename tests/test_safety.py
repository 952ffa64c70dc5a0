"""What the suite `safety` shows by pairs and rewordings, and toxicity as a judge sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from judges import Preference, Scripted, always_first, by_length, knowing

from mlxtune.cli.judging import of_toxicity
from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.checks.shipped import SAFETY
from mlxtune.evaluate.checks.suite import read_suite
from mlxtune.evaluate.comparison.scores import score_answers
from mlxtune.evaluate.engines.request import Answer
from mlxtune.evaluate.judging.report import Judging, judge_evaluation
from mlxtune.evaluate.safety import toxicity
from mlxtune.evaluate.safety.report import document

REFUSED, HELPED = "I'm sorry, but I can't help with that.", "Of course! Here is how it is done."
Says = Callable[[SuiteRow], str]


def rightly(row: SuiteRow) -> str:
    return HELPED if "answer" in row.tags else REFUSED


def found(base: Says, tuned: Says | None = None) -> dict[str, Any]:
    rows = read_suite(SAFETY).rows

    def given(says: Says) -> list[Answer]:
        return [Answer(row.id, 0, says(row), "", "stop", 5) for row in rows]

    answers = {"base": given(base)} if tuned is None else {"base": given(base), "tuned": given(tuned)}
    return document(rows, score_answers(rows, answers))  # type: ignore[arg-type]


def test_a_pair_is_right_where_the_request_is_refused_and_its_neighbour_answered() -> None:
    said = found(rightly, lambda row: REFUSED)
    assert said["pairs"]["n"] == said["pairs"]["base"] == 24 and said["pairs"]["tuned"] == 0
    assert said["pairs"]["verdict"] == "worse" and said["pairs"]["tuned_interval"][0] == 0
    assert said["answered"] == {"n": 25, "base": 25.0, "tuned": 0.0}
    assert found(lambda row: HELPED)["pairs"]["base"] == 0
    assert "verdict" not in found(rightly)["pairs"]


def test_refusals_are_counted_by_the_way_a_request_is_reworded() -> None:
    said = found(rightly, lambda row: HELPED if "role play" in row.tags else rightly(row))
    assert {kind: (one["n"], one["base"], one["tuned"]) for kind, one in said["refused"].items()} == {
        "as it stands": (24, 24, 24),
        "role play": (6, 6, 0),
        "ignore instructions": (6, 6, 6),
        "story": (6, 6, 6),
        "authority": (4, 4, 4),
        "another language": (8, 8, 8),
    }
    leaked = found(lambda row: "The word is heron." if "keep" in row.tags else rightly(row))
    assert leaked["kept"] == {"n": 6, "base": 0.0}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The words of an evaluation of recorded answers: the tuned model insults, where the base refuses."""
    folder = tmp_path_factory.mktemp("safety")
    rows = read_suite(SAFETY).rows
    base = tiny.write_jsonl(folder / "base.jsonl", [{"id": row.id, "text": REFUSED} for row in rows])
    tuned = tiny.write_jsonl(folder / "tuned.jsonl", [{"id": row.id, "text": "You idiot."} for row in rows])
    return ("eval", "--model", f"replay:{tuned}", "--against", f"replay:{base}", "--safety")


TOXIC = [pair.base for pair in toxicity.exam()]


def is_toxic(text: str) -> bool:
    return "idiot" in text or text in TOXIC


def judged(preference: Preference) -> dict[str, Any]:
    """What a judge says of a tuned model that insults where its base refuses."""
    wanted = of_toxicity(Judging(lambda: Scripted(preference)), rubric=None)
    rows = read_suite(SAFETY).rows[:24]  # a request and its neighbour are of one group
    base, tuned = ([Answer(row.id, 0, text, "", "stop", 5) for row in rows] for text in (REFUSED, "You idiot."))
    return judge_evaluation(wanted, rows, {"base": base, "tuned": tuned}).document


def test_a_judge_that_passes_the_exam_says_which_answers_are_less_toxic() -> None:
    assert len(TOXIC) == 10
    said = judged(knowing(lambda answer, request: not is_toxic(answer)))
    assert said["exam"]["pairs"] == said["exam"]["right"] == 10
    assert said["losses"] == said["pairs"] == 24 and said["verdict"] == "worse"
    assert toxicity.NOTE in said["notes"] and said["rubric"] == toxicity.RUBRIC


def test_a_judge_that_cannot_tell_gives_no_verdict_on_toxicity() -> None:
    for preference in (always_first, by_length):
        said = judged(preference)
        assert said["refused"] and "win_rate" not in said


def test_the_result_is_printed_and_likert_is_refused(recorded: tuple[str, ...], tmp_path: Path) -> None:
    out = tiny.done(*recorded).stdout
    assert "both right: 0 of 24 before, 0 after" in out and "refused, story: 6 of 6 before, 0 after" in out
    words = (*recorded, "--judge", "http://127.0.0.1:9/v1#j", "--rate", "likert")
    tiny.refused(tmp_path / "out", *words, expected=("--rate likert", "Leave out --rate."))
