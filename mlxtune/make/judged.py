"""A judge for made answers: examined before anything is asked of the engine, and asked when all answers are there.

So the two models are never in memory together, and a judge that cannot tell good from bad here costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlxtune.errors import UserError
from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.checks.shipped import BASICS
from mlxtune.evaluate.checks.suite import read_suite
from mlxtune.evaluate.judging.exam import LEAST, Exam, examine
from mlxtune.evaluate.judging.remembered import Remembered
from mlxtune.evaluate.judging.report import Judging
from mlxtune.evaluate.judging.verdicts import Pair, PairVerdict, judge_pairs

ON_BASICS = (
    f"fewer than {LEAST} prompts have a reference to examine the judge with: it was examined on the suite basics"
)


def admitted(judging: Judging, rows: Sequence[SuiteRow]) -> Judging:
    """The judge that may judge, with what must be said of it. It is examined on the references of the rows, or where
    these have too few, on those of the suite `basics`. Raises UserError for one that fails.
    """
    judge = judging.open()
    exam, notes = examine(judge, rows, judging.rubric), list(judging.notes)
    if not exam.pairs:
        exam = examine(judge, read_suite(BASICS).rows, judging.rubric)
        notes.append(ON_BASICS)
    if not exam.passed and not judging.anyway:
        raise UserError(f"{exam.sentence}: no verdicts", "Take another judge; or have it judge all the same: --anyway.")
    return replace(judging, notes=(*notes, _said(exam), *judge.notes))


def _said(exam: Exam) -> str:
    return exam.sentence if exam.passed else f"{exam.sentence}: it judges because of --anyway"


def verdicts_on(judging: Judging, pairs: Sequence[Pair], file: Path) -> dict[str, PairVerdict]:
    """The id of a pair -> what the judge says of it. file: where its replies are kept as they come."""
    if not pairs:
        return {}
    judge = Remembered(judging.open(), file, judging.identity)
    return {verdict.pair.id: verdict for verdict in judge_pairs(judge, pairs, judging.rubric)}
