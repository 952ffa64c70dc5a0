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
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from mlxtune.data.dataset import duplicates
from mlxtune.make.curation.candidates import Candidate
from mlxtune.make.curation.losses import Losses

AT_MOST = 200  # strangers: of 5,000 rows they cost 4% more time
AT_LEAST = 20  # below so many, the lowest of them says little
SHARE_BELOW = 0.01  # of the strangers: how many of them may be taken for rows that their question explains
NO_LIKELIER = 1.0  # the IFD from which on a question makes its answer no likelier at all


def strangers(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Rows made of the answer of one candidate and the question of another, the same each time; none where there are
    too few candidates. Their keys are none of the candidates', but for those that a candidate equals.
    """
    drawn = random.Random(0).sample(list(candidates), min(AT_MOST, len(candidates)))
    if len(drawn) < AT_LEAST:
        return []
    found = []
    for one, other in zip(drawn, [*drawn[1:], drawn[0]], strict=True):
        if one.question == other.question:
            continue  # its answer may well be right
        record = replace(other.record, messages=[*other.messages[:-1], one.messages[-1]])
        found.append(Candidate(record, f"{duplicates.content_hash(record):016x}", other.kind))
    return found


def border(losses: Iterable[Losses | None]) -> float | None:
    """The IFD above which a question explains no more than a stranger's does; None where too few strangers have one.
    losses: of the strangers.
    """
    scores = [one.ifd for one in losses if one is not None]
    if len(scores) < AT_LEAST:
        return None
    return min(NO_LIKELIER, float(np.quantile(scores, SHARE_BELOW)))
