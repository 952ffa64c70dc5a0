"""Where the border lies between answers that their question explains and answers that it does not.

IFD (`ifd`) has no scale of its own: a model finds one answer in two likely whatever was asked, and another one only
behind its question. So the border is measured. Some rows get the question of another row, and are scored like any:

    question                   answer               IFD
    Capital of France?         It is Paris.         0.43    a row
    How do I cook rice?        Rinse it, then ...   0.84    a row
    Capital of France?         Rinse it, then ...   1.05    a stranger: made here
    How do I cook rice?        It is Paris.         0.98    a stranger

A row above what 99 of 100 strangers reach at least is as well explained by a question that is not its own. Where all
rows are sound, hardly one is; where half of them have a wrong answer, nearly that half is.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from mlxtune.data.dataset import duplicates
from mlxtune.make.curation.candidates import Candidate
from mlxtune.make.curation.losses import Losses

AT_MOST = 200  # strangers: of 5,000 rows they cost 4% more time
AT_LEAST = 20  # below so many, the lowest of them says little
ROUNDS = 50  # of drawing pairs: where 98 of 100 answers are the same, 4% of the pairs are strangers
SHARE_BELOW = 0.01  # of the strangers: how many of them may be taken for rows that their question explains
NO_LIKELIER = 1.0  # the IFD from which on a question makes its answer no likelier at all


def strangers(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Rows made of the answer of one candidate and the question of another, the same each time and in any order of the
    candidates; none where fewer than AT_LEAST can be made. Their keys differ, and are none of the candidates'.

    An answer that the other question has too is none of a stranger: a label, a refusal in the same words.
    """
    ordered = sorted(candidates, key=lambda one: one.key)
    most = min(AT_MOST, len(ordered))
    taken = {one.key for one in ordered}
    found: list[Candidate] = []
    for one, other in _pairs(ordered, most):
        if len(found) == most:
            break
        if one.question == other.question or one.answer.strip() == other.answer.strip():
            continue  # the answer may well be right
        record = replace(other.record, messages=[*other.messages[:-1], one.messages[-1]])
        key = f"{duplicates.content_hash(record):016x}"
        if key not in taken:
            taken.add(key)
            found.append(Candidate(record, key, other.kind))
    return found if len(found) >= AT_LEAST else []


def _pairs(candidates: Sequence[Candidate], count: int) -> Iterator[tuple[Candidate, Candidate]]:
    """ROUNDS times that many pairs, by chance; in each round no row is twice the first or twice the second of one."""
    chance = random.Random(0)
    for _ in range(ROUNDS):
        drawn = chance.sample(candidates, count)
        yield from zip(drawn, [*drawn[1:], *drawn[:1]], strict=True)


def border(losses: Iterable[Losses | None]) -> float | None:
    """The IFD above which a question explains no more than a stranger's does; None where too few strangers have one.
    losses: of the strangers.
    """
    scores = [one.ifd for one in losses if one is not None]
    if len(scores) < AT_LEAST:
        return None
    return min(NO_LIKELIER, float(np.quantile(scores, SHARE_BELOW)))
