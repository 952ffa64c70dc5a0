"""One child: `python -m mlxtune.bench WHO FILE ROWS` measures a competitor and prints its figures.

The rows are those of the first steps of our plan for the whole data: batched as in a real run.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

from mlxtune.bench import ours
from mlxtune.bench.children import REFUSED
from mlxtune.bench.figures import OURS, Measured
from mlxtune.bench.limits import mlx_limits_kept
from mlxtune.config import resolve
from mlxtune.data.dataset.batches import DEFAULT_ROWS, Batch
from mlxtune.errors import UserError
from mlxtune.machine.gpu_errors import recognise
from mlxtune.train.preparation import attached
from mlxtune.train.run_data import read_data


def main(who: str, file: str, rows: int) -> int:
    """Print a child's figures, or for REFUSED [what is wrong, what to do], as one line of JSON."""
    try:
        print(json.dumps(asdict(_measured(who, file, rows))))
        return 0
    except UserError as error:
        refusal = error.message, error.hint
    except (RuntimeError, MemoryError) as error:
        failure = recognise(error)
        if failure is None:
            raise
        refusal = str(failure), failure.hint("bench")
    print(json.dumps(refusal))
    return REFUSED


def _measured(who: str, file: str, count: int) -> Measured:
    """count: rows of the data to measure with, at least."""
    settings = resolve.load(file)
    data, settings = read_data(settings)
    with mlx_limits_kept():
        plan = attached(settings, data, read=False).plan
    rows, steps = 0, 0
    batches: list[Batch] = []
    while rows < count and steps < plan.steps:
        steps += 1
        rows += len(plan.rows_of_step(steps))
        batches += plan.step(steps)
    chosen: list[int] = []  # numbers of examples
    for batch in batches:
        chosen += batch.rows.tolist()
    batch_rows = settings.train.batch_rows or DEFAULT_ROWS
    if settings.train.batch_tokens:
        batch_rows = max(1, len(chosen) // len(batches))
    if len(chosen) < 2 * batch_rows:
        raise UserError(f"{settings.data.path}: {rows} usable rows are too few to measure with")
    if who == OURS:
        measured = ours.measure(settings, data, steps)
    else:
        from mlxtune.bench import theirs  # our own measurement is without mlx-lm's trainer

        examples = [plan.examples[index] for index in sorted(set(chosen))]
        measured = theirs.measure(who, settings, examples, batch_rows)
    unit = "row" if plan.rows == len(plan.examples) else "example"
    return replace(measured, unit=unit)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
