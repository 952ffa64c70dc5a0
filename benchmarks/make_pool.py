"""How long it takes to compare a new text with 10,000 that were kept, exactly.

    python benchmarks/make_pool.py SEEDS [ROWS]

SEEDS: a file of tasks, such as Self-Instruct's 175; texts are drawn from their words and lengths. Three kinds of pools:
tasks as they come (words by how often they are used), rewordings of the seeds (each word kept with a chance of 0.7),
and the worst case for the bounds, one set of twenty words in every order. Prints one JSON document; what was measured
stands in benchmarks/made.md.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mlxtune.evaluate.checks.overlap import rouge_l
from mlxtune.evaluate.checks.words import words_of
from mlxtune.make.pool import Pool
from mlxtune.make.seeds import read_seeds

ROWS, CANDIDATES, CHECKED = 10_000, 200, 5
KEPT = 0.7  # chance that a word of a seed stays in its rewording


def measured(draw: Callable[[], str], rows: int) -> dict[str, float]:
    """Milliseconds of processor time a candidate, for other programs may run here, and the largest difference from the
    plain way on some of them.
    """
    kept = [draw() for _ in range(rows)]
    began = time.process_time()
    pool = Pool(kept)
    adding = time.process_time() - began
    took = []
    for _ in range(CANDIDATES):
        text = draw()
        began = time.process_time()
        pool.nearest(text)
        took.append(1000 * (time.process_time() - began))
    apart = max(abs(pool.nearest(text)[0] - float(rouge_l(text, kept).max())) for text in kept[:CHECKED])
    return {
        "mean_ms": round(statistics.mean(took), 2),
        "median_ms": round(statistics.median(took), 2),
        "worst_ms": round(max(took), 2),
        "add_ms": round(1000 * adding / rows, 3),
        "apart_from_plain": apart,
    }


def main() -> None:
    seeds = [words_of(seed.text) for seed in read_seeds(Path(sys.argv[1]))]
    rows = int(sys.argv[2]) if len(sys.argv) > 2 else ROWS
    words = [word for seed in seeds for word in seed]
    draw = random.Random(0)
    some = list(dict.fromkeys(words))[:20]

    def task() -> str:
        return " ".join(draw.choices(words, k=len(draw.choice(seeds))))

    def reworded() -> str:
        return " ".join(word if draw.random() < KEPT else draw.choice(words) for word in draw.choice(seeds))

    def shuffled() -> str:
        return " ".join(draw.sample(some, len(some)))

    kinds = {"tasks": task, "reworded seeds": reworded, "the same twenty words": shuffled}
    print(json.dumps({name: measured(kind, rows) for name, kind in kinds.items()}, indent=2))


if __name__ == "__main__":
    main()
