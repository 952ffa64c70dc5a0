"""Rows of a model that rotates by how long a row is (longrope, dynamic scaling), each computed as it would be alone.

Such a model turns every position of a row otherwise once the row is longer than some limit. In a batch the padding
counts, and the longest row decides for all; run after a prefix, the prefix is turned as the short row that it is. So
rows within the limit keep together and are padded no further than it, longer ones are computed one by one, and no
prefix is shared where there are any.

Example: a limit of 4096, and a batch of rows of 100, 5000, 300 and 6000 tokens, padded to 6000. Its parts are rows 0
and 2, padded to 4097 (a row's last token is seen by nobody), row 1 with its 5000, and row 3 with its 6000.
"""

from __future__ import annotations

import mlx.nn as nn
import numpy as np
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE

from mlxtune.data.dataset.batches import Batch
from mlxtune.model.corrections.corrected import rotary_modules
from mlxtune.model.corrections.rotary import Rotary


def longest_alike(model: nn.Module) -> int | None:
    """The longest row, in tokens that the model sees, whose rotation does not depend on its length; None: any."""
    limits = []
    for _, parent, name in rotary_modules(model):
        module = getattr(parent, name)
        if isinstance(module, Rotary) and module.rotation.limit is not None:
            limits.append(module.rotation.limit)
        elif isinstance(module, DynamicNTKScalingRoPE):
            limits.append(module.max_position_embeddings)
    return min(limits, default=None)


def parts(batch: Batch, limit: int | None) -> list[Batch]:
    """A batch in parts that hold rows of one kind. limit: as `longest_alike` says it.

    A row's last token is seen by nobody, so that a row may have one token more than the limit.
    """
    return [part for _, part in alike(batch, limit)]


def alike(batch: Batch, limit: int | None) -> list[tuple[np.ndarray, Batch]]:
    """([rows] its places in the batch, the part) of each part that holds rows of one kind."""
    if limit is None or batch.ids.shape[1] <= limit + 1:
        return [(np.arange(len(batch.rows)), batch)]
    within = np.flatnonzero(batch.lengths <= limit + 1)
    sets = [within] if len(within) else []
    sets += [np.array([row]) for row in np.flatnonzero(batch.lengths > limit + 1)]
    return [(rows, _narrowed(batch, rows, limit + 1 if rows is within else 0)) for rows in sets]


def _narrowed(batch: Batch, rows: np.ndarray, most: int) -> Batch:
    """Some rows of a batch, padded to `most` tokens or, for 0, to the longest of them, each without a side."""
    width = most or int(batch.lengths[rows].max())
    return Batch(batch.rows[rows], batch.ids[rows, :width], batch.lengths[rows], batch.mask[rows, :width])
