"""A few rows out of many: the better ones, of all kinds of instruction in equal shares, none like another.

Kinds take turns. The one of which fewest rows are kept gives its best row that is left; one that is too much like a
kept row, or of a file that has its share, is passed over. Two kinds, four rows to keep, the quality of each row:

    explain    0.9   0.8   0.7   0.6   0.2          kept: 0.9
    compare    0.8   0.3                                        0.8
                                                          0.8         (explain: 2, compare: 1)
                                                          0.7         compare has nothing more above the bar

Equal shares must not buy bad rows: at first only rows above a bar of quality take part, by default the better half of
each kind (`compare` has 0.3 below it). Only where these do not suffice do the others. Where IFD ranks them, rows that
their question explains are as good as each other, and in that half by chance (`quality`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlxtune.make.curation.candidates import Candidate
from mlxtune.make.pool import Pool

LIKE = 0.7  # ROUGE-L of two questions above which the second is too much like the first
BETTER = 0.5  # share of the rows, the best of each kind, among which shares are equal

# Why a row does not stay -> what that means, after a number of rows.
REASONS = {
    "no answer": "end with no answer",
    "equal": "are equal to an earlier row",
    "faulty": "are broken: empty, with broken characters, or with what looks like a secret",
    "unscored": "have no score: data.max_tokens leaves nothing of the answer, or the template refuses them",
    "unrated": "have no rating: the judge's replies could not be read",
    "unexplained": "are not explained by their question (IFD above 1): the answer is as likely without it",
    "alike": "ask nearly what a kept row asks",
    "source": "are of a file that has its share",
    "dropped": "were dropped by a person",
    "lower": "were not needed: those kept of their kind are as good or better",
}

Accept = Callable[[Candidate], Candidate | None]  # as it is to be kept; None: it is dropped


@dataclass(frozen=True)
class Wanted:
    """What is to be chosen."""

    # Rows.
    keep: int
    # ROUGE-L of two questions above which one of them does not stay.
    most_alike: float = LIKE
    # Rows of one file at most; None: as many as come.
    of_one_file: int | None = None


@dataclass
class Chosen:
    """What was chosen."""

    # In the order in which they were chosen.
    kept: list[Candidate] = field(default_factory=list)
    # Key of each other row that was looked at -> why it does not stay, a key of REASONS.
    reasons: dict[str, str] = field(default_factory=dict)
    # Keys of those kept that are below the bar.
    below: set[str] = field(default_factory=set)


def choose(
    candidates: Sequence[Candidate],
    quality: Mapping[str, float],
    wanted: Wanted,
    accept: Accept = lambda candidate: candidate,
) -> Chosen:
    """Choose among candidates. quality: of each, by its key (`quality.qualities`); accept: asked of each row that would
    be kept. The same candidates give the same choice.
    """
    chosen = Chosen()
    pool = Pool()
    files: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    part = max(BETTER, wanted.keep / max(1, len(candidates)))
    above = [candidate for candidate in candidates if quality[candidate.key] >= 1 - part]
    below = [candidate for candidate in candidates if quality[candidate.key] < 1 - part]
    for some in (above, below):
        waiting = _best_first(some, quality)
        while waiting and len(chosen.kept) < wanted.keep:
            kind = min(waiting, key=lambda name: (kinds[name], name))
            candidate = waiting[kind].pop()
            if not waiting[kind]:
                del waiting[kind]
            if reason := _unwanted(candidate, wanted, pool, files):
                chosen.reasons[candidate.key] = reason
                continue
            accepted = accept(candidate)
            if accepted is None:
                chosen.reasons[candidate.key] = "dropped"
                continue
            chosen.kept.append(accepted)
            if some is below:
                chosen.below.add(candidate.key)
            pool.add(candidate.question)
            files[candidate.source] += 1
            kinds[candidate.kind] += 1
    kept = {candidate.key for candidate in chosen.kept}
    for candidate in candidates:
        if candidate.key not in kept:
            chosen.reasons.setdefault(candidate.key, "lower")
    return chosen


def _best_first(candidates: Sequence[Candidate], quality: Mapping[str, float]) -> dict[str, list[Candidate]]:
    """Kind -> its rows, the best one last; of equal ones the first in the files last."""
    ordered = sorted(enumerate(candidates), key=lambda item: (quality[item[1].key], -item[0]))
    found: dict[str, list[Candidate]] = {}
    for _, candidate in ordered:
        found.setdefault(candidate.kind, []).append(candidate)
    return found


def _unwanted(candidate: Candidate, wanted: Wanted, pool: Pool, files: Counter[str]) -> str:
    """Why a row cannot be kept beside those that are; "" where it can."""
    if wanted.of_one_file is not None and files[candidate.source] >= wanted.of_one_file:
        return "source"
    likeness, _ = pool.nearest(candidate.question)
    return "alike" if likeness > wanted.most_alike else ""


def edited(candidate: Candidate, answer: str) -> Candidate:
    """The same row with another answer."""
    messages: list[dict[str, Any]] = [dict(message) for message in candidate.messages]
    messages[-1]["content"] = answer
    return Candidate(replace(candidate.record, messages=messages), candidate.key, candidate.kind)
