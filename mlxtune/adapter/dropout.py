"""Dropout masks and NEFTune noise keyed by (seed, step, row, layer): there is no random state to save or to lose.

Example: row 17 of the data at step 40, in the 3rd adapted layer, has the key hash(seed, 40, 17, 3). Whatever batch it
is in, however that is padded, on which of several machines, and again after a resume: it gets the same mask.

Legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.splitmix import GOLDEN, scrambled


class DropoutKeys:
    """The random keys of the current micro-batch, shared by all adapter layers; none outside training."""

    def __init__(self, rate: float, noise_alpha: float = 0.0) -> None:
        self.rate = rate
        self.noise_alpha = noise_alpha
        # [layers + 1, B + 1, 2] uint32; the last layer is the embedding, the last row's key is for the batch as a whole
        self._keys: mx.array | None = None
        self._lengths: list[int] = []  # [B] positions of each row that are not padding

    def set(self, seed: int, step: int, rows: Sequence[int], lengths: Sequence[int], layers: int) -> None:
        """Take the keys of a micro-batch.

        step: of the optimizer; rows: [B] numbers of the rows in the data; lengths: [B] tokens of each row that are not
        padding; layers: adapted ones of the model.
        """
        if self.rate > 0 or self.noise_alpha > 0:
            self._keys = mx.array(keys_for(seed, step, rows, layers + 1))
            self._lengths = list(lengths)

    def clear(self) -> None:
        """From here on nothing is dropped and no noise is added."""
        self._keys = None

    def apply(self, x: mx.array, layer: int) -> mx.array:
        """x with a share `rate` of its entries zeroed and the rest scaled up.

        Each row of x [B, T, in] has its own key, and its mask does not depend on the padding or on what shares its
        batch. Where the model has already mixed the rows (tokens sorted by expert), one key serves them all.
        """
        if self._keys is None or not self.rate:
            return x
        keep = 1.0 - self.rate
        if x.ndim == 3 and x.shape[0] == len(self._lengths):
            mask = mx.stack([self._row_mask(x, layer, row, keep) for row in range(x.shape[0])])
        else:
            mask = mx.random.bernoulli(keep, x.shape, key=self._keys[layer, -1])
        return x * mx.stop_gradient(mask.astype(x.dtype)) * (1.0 / keep)

    def noise(self, x: mx.array) -> mx.array:
        """Embeddings x [B, T, D] plus uniform noise of up to alpha / sqrt(L D), L a row's length without padding.

        NEFTune, Jain et al. 2023 (arXiv:2310.05914).
        """
        if self._keys is None or not self.noise_alpha:
            return x
        _, width, size = x.shape
        rows = []
        for row, length in enumerate(min(length, width) for length in self._lengths):
            drawn = mx.random.uniform(-1, 1, (length, size), key=self._keys[-1, row])
            scaled = drawn * (self.noise_alpha / (length * size) ** 0.5)
            rows.append(mx.pad(scaled, [(0, width - length), (0, 0)]))
        return x + mx.stop_gradient(mx.stack(rows).astype(x.dtype))

    def _row_mask(self, x: mx.array, layer: int, row: int, keep: float) -> mx.array:
        assert self._keys is not None
        _, width, inputs = x.shape
        length = min(self._lengths[row], width)
        mask = mx.random.bernoulli(keep, (length, inputs), key=self._keys[layer, row])
        return mx.pad(mask, [(0, width - length), (0, 0)])


def add_noise(model: nn.Module, keys: DropoutKeys) -> None:
    """Make the model's token embedding add `keys.noise`: its class is extended, so no parameter changes its name."""
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    embedding = next(module for _, module in reversed(model.named_modules()) if isinstance(module, kinds))
    kind = type(embedding)
    embedding.__class__ = type(
        kind.__name__, (kind,), {"__call__": lambda self, ids: keys.noise(kind.__call__(self, ids))}
    )


def keys_for(seed: int, step: int, rows: Sequence[int], layers: int) -> np.ndarray:
    """[layers, B + 1, 2] uint32 keys; each a hash of (seed, step, row, layer), the last column of all rows together."""
    mixed = _mix(np.uint64(seed) << np.uint64(32) | np.uint64(step))
    row = np.array([*rows, 0], np.uint64)
    per_row = _mix(mixed ^ _mix(row + np.uint64(1)))
    per_row[-1] = _mix(np.bitwise_xor.reduce(per_row[:-1]))
    layer = _mix(np.arange(layers, dtype=np.uint64) + np.uint64(1 << 40))
    keys = _mix(layer[:, None] ^ per_row[None, :])
    return np.stack([keys >> np.uint64(32), keys & np.uint64(0xFFFFFFFF)], -1).astype(np.uint32)


def _mix(value: Any) -> Any:
    """The next number of splitmix64 after each `value`."""
    with np.errstate(over="ignore"):
        return scrambled(np.asarray(value, np.uint64) + np.uint64(GOLDEN))
