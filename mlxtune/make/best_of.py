"""The best of several answers to one prompt, and one that is shown to be worse.

Each row is decided by the most certain thing that it has:

    checks       answers that fail a check of the row are out: a program that fails its tests, a number that is known
                 to be wrong, what is no JSON
    a majority   of the others, where a check tells what an answer comes to (number, choice, json, schema): the answers
                 that come to what most of them come to (self-consistency, Wang et al. 2022, arXiv:2203.11171)
    a judge      between those that are left: each against each, both ways round

Example: five answers come to 72, 72, 70, 72 and 18, and nobody knows which is right. Three agree on 72, so one of those
three is taken; by the judge, or without one the first. Three answers that come to 1, 2 and 3 have no majority, and
without a judge the row is not kept.

What is worse must be shown too, before anybody learns from the pair: it fails a check that the best one passes, or the
judge prefers the best one in both orders. That it is in the minority shows nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.engines.request import Answer
from mlxtune.evaluate.judging.verdicts import Pair, PairVerdict

LEAST_VOTES = 2  # for what most answers come to; one answer agrees with itself
TESTS = "code"  # the kind of check that runs a program's tests
NO_MAJORITY, FAILS = "no majority", "check"  # reasons why no answer to a row is kept


@dataclass(frozen=True)
class Narrowed:
    """The answers to one prompt, as far as rules decide. Places are those in the list of answers."""

    how: str  # what decided: "tests", "checks", "majority"; "" for nothing so far
    left: list[int]  # places of those that may be the best, in their order
    failing: list[int]  # places of those that fail a check
    why: str = ""  # the reason why none is left; "" where some are
    scores: dict[str, int] = field(default_factory=dict)  # of those that are left: how many passed, or agree


@dataclass(frozen=True)
class Best:
    """The answer that is kept."""

    place: int  # in the list of answers
    how: str  # what decided: "tests", "checks", "majority", "judge", "first"
    scores: dict[str, float]  # what speaks for it
    worse: int | None  # the place of an answer that is shown to be worse; None: there is none


def kinds_of(row: SuiteRow) -> set[str]:
    """The kinds of a row's checks."""
    return {check.name.partition("-")[0] for check in row.checks}


def can_decide(row: SuiteRow) -> bool:
    """Whether the row's own checks may tell which of several answers is best."""
    return any(not check.graded for check in row.checks)


def narrowed(row: SuiteRow, answers: Sequence[Answer], has_judge: bool, of_several: bool = True) -> Narrowed:
    """What the row's checks and the answers' agreement leave. answers: at least one; has_judge: one decides after;
    of_several: more than one was asked for, so that they can agree.
    """
    passing: list[int] = []
    failing: list[int] = []
    is_checked = False
    for place, answer in enumerate(answers):
        scores = [check.score(answer, row) for check in row.checks if not check.graded]
        is_checked = is_checked or any(score is not None for score in scores)
        (failing if 0.0 in scores else passing).append(place)
    if not passing:
        return Narrowed("", [], failing, FAILS)
    how, counts = "", {}
    if is_checked:
        how = "tests" if TESTS in kinds_of(row) else "checks"
        counts = {"passed": len(passing), "of": len(answers)}
    can_agree = of_several and any(check.rule.meanings is not None for check in row.checks)
    is_alone_right = is_checked and len(passing) == 1
    if not can_agree or is_alone_right:
        return Narrowed(how, passing, failing, scores=counts)
    agreeing = majority(row, [answers[place] for place in passing])
    if agreeing:
        return Narrowed(
            "majority",
            [passing[number] for number in agreeing],
            failing,
            scores={"agree": len(agreeing), "of": len(answers)},
        )
    if has_judge:
        return Narrowed(how, passing, failing, scores=counts)
    return Narrowed("", [], failing, NO_MAJORITY)


def majority(row: SuiteRow, answers: Sequence[Answer]) -> list[int]:
    """The places of the answers that come to what most of them come to; [] where fewer than LEAST_VOTES do, or where
    another party is as large.

    "1,234" may be 1234 or 1.234, and is of both parties: with "1234" beside it, the first has two answers, the second
    one.
    """
    readers = [check.rule.meanings for check in row.checks if check.rule.meanings is not None]
    parties: dict[tuple[str, ...], list[int]] = {}  # what is meant, by each check that can tell -> who means it
    for place, answer in enumerate(answers):
        for meant in itertools.product(*(reader(answer, row) for reader in readers)):
            parties.setdefault(meant, []).append(place)
    largest = max(parties.values(), key=len, default=[])
    has_rival = any(len(party) == len(largest) and party != largest for party in parties.values())
    return [] if has_rival or len(largest) < LEAST_VOTES else largest


def contests(row: SuiteRow, answers: Sequence[Answer], left: Sequence[int]) -> Iterator[Pair]:
    """What a judge is asked of a row: each of the answers that are left against each later one. The earlier one stands
    as the "tuned" side, which is only a name here.
    """
    for number, place in enumerate(left):
        for other in left[number + 1 :]:
            yield Pair(f"{row.id}/{place}/{other}", row.messages, base=answers[other].text, tuned=answers[place].text)


def best_of(
    row: SuiteRow, answers: Sequence[Answer], found: Narrowed, verdicts: Mapping[str, PairVerdict] | None
) -> Best:
    """The best of the answers that are left, of which there is at least one. verdicts: a judge's, by the ids that
    `contests` gives; None where nobody judges.
    """
    first_failing = found.failing[0] if found.failing else None
    if verdicts is None or len(found.left) == 1:
        return Best(found.left[0], found.how or "first", dict(found.scores), first_failing)
    preferences = {place: _preference(row, place, found.left, verdicts) for place in found.left}
    place = max(found.left, key=lambda one: preferences[one])  # of equals, the first
    beaten = [other for other in found.left if _beats(row, place, other, verdicts)]
    worse = min(beaten, key=lambda one: preferences[one]) if beaten else None
    if first_failing is not None:
        worse = first_failing  # what fails a check is worse for certain
    return Best(place, "judge", {**found.scores, "judge": round(preferences[place], 4)}, worse)


def _preference(row: SuiteRow, place: int, left: Sequence[int], verdicts: Mapping[str, PairVerdict]) -> float:
    """How much the judge prefers an answer to the others, from 0 to 1: the mean over them. A reply that could not be
    read speaks for neither.
    """
    total = 0.0
    for other in left:
        if other < place:
            total += 1 - _read(verdicts[f"{row.id}/{other}/{place}"])
        elif other > place:
            total += _read(verdicts[f"{row.id}/{place}/{other}"])
    return total / (len(left) - 1)


def _read(verdict: PairVerdict) -> float:
    return 0.5 if verdict.failed else verdict.preference


def _beats(row: SuiteRow, place: int, other: int, verdicts: Mapping[str, PairVerdict]) -> bool:
    """Whether the judge prefers one answer to another in both orders."""
    if place == other:
        return False
    if place < other:
        verdict, wanted = verdicts[f"{row.id}/{place}/{other}"], "win"
    else:
        verdict, wanted = verdicts[f"{row.id}/{other}/{place}"], "loss"
    return not verdict.failed and verdict.outcome == wanted
