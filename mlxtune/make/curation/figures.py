"""What a set of rows is like, to be said before and after some are chosen of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlxtune.evaluate.checks.overlap import rouge_l
from mlxtune.evaluate.checks.words import words_of
from mlxtune.make.curation.candidates import Candidate
from mlxtune.make.curation.losses import Losses
from mlxtune.make.pool import compared

LOOKED_AT = 300  # rows whose likeness is measured: each is compared with all others of them
KINDS = 6  # kinds of instruction that a set should have (LIMA, arXiv:2305.11206, lives by its variety)


def figures(rows: Sequence[Candidate], losses: Mapping[str, Losses | None], sample: int) -> dict[str, Any]:
    """rows: one at least; losses: of rows that were scored by a model, by their keys; sample: how many rows likeness is
    measured on, which must be the same for sets that are compared: among more rows there are nearer ones.
    """
    counts: dict[str, Any] = {
        "rows": len(rows),
        "kinds": dict(Counter(row.kind for row in rows).most_common()),
        "files": dict(Counter(row.source for row in rows).most_common()),
        "likeness": likeness(rows, sample),
        "words": sum(len(words_of(row.question)) + len(words_of(row.answer)) for row in rows),
    }
    scored = [found for row in rows if (found := losses.get(row.key)) is not None]
    if scored:
        counts["tokens"] = sum(found.row_tokens for found in scored)
        counts["answer_tokens"] = sum(found.tokens for found in scored)
        counts["ifd"] = [float(value) for value in np.quantile([found.ifd for found in scored], (0.1, 0.5, 0.9))]
    return counts


def likeness(rows: Sequence[Candidate], sample: int) -> float | None:
    """The mean ROUGE-L of a question with the nearest other one, among `sample` rows drawn by chance, the same each
    time; None for fewer than two. 1: each has a twin.
    """
    if sample < 2 or len(rows) < 2:
        return None
    drawn = random.Random(0).sample(list(rows), min(sample, len(rows)))
    questions = [" ".join(compared(row.question)) for row in drawn]
    nearest = []
    for place, question in enumerate(questions):
        others = questions[:place] + questions[place + 1 :]
        nearest.append(float(rouge_l(question, others).max()))
    return float(np.mean(nearest))
