"""What a judge thinks of each row's answer, from 1 to 5: the mean of its expected ratings by four criteria."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from mlxtune.errors import UserError
from mlxtune.evaluate.checks.shipped import BASICS
from mlxtune.evaluate.checks.suite import read_suite
from mlxtune.evaluate.judging.exam import exam_pairs, examine
from mlxtune.evaluate.judging.judge import CRITERIA, SCALE, Judge, rating_prompt
from mlxtune.make.curation.candidates import Candidate


def require_passed(judge: Judge, rubric: str, anyway: bool) -> str:
    """What the exam says of a judge, in one line: on mlxtune's own basic questions, whose right answers are known, and
    the same made worse. Raises UserError for one that fails it, unless it is wanted anyway.
    """
    exam = examine(judge, (), rubric, known=exam_pairs(read_suite(BASICS).rows))
    if not exam.passed and not anyway:
        raise UserError(exam.sentence, "Take a larger judge, leave --judge out (IFD scores then), or add --anyway.")
    return exam.sentence


def ratings(judge: Judge, candidates: Sequence[Candidate], rubric: str) -> list[float | None]:
    """The rating of each row's last answer, from 1 to 5; None where no reply could be read. Raises UserError as the
    judge does.
    """
    found: list[list[float]] = [[] for _ in candidates]
    for criterion in CRITERIA:
        prompts = [rating_prompt(one.messages[:-1], one.answer, criterion, rubric=rubric) for one in candidates]
        for place, chances in enumerate(judge.label_probabilities(prompts, SCALE)):
            if chances is not None:
                expected = sum(int(label) * chance for label, chance in zip(SCALE, chances, strict=True))
                found[place].append(expected)
    return [fmean(some) if some else None for some in found]
