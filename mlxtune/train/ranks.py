"""Several processes training one adapter, data-parallel, under `mlx.launch`: MLX's own distributed layer.

Each optimizer step is that of one process: its examples are dealt to the ranks, and summed losses and gradients are
added up. Rank 0 alone reads and writes the run folder; the others get what it read. Alone, everything here does
nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlxtune.data.batches import Batch
from mlxtune.errors import UserError
from mlxtune.model.arrays import named, scalar, to_numpy


@dataclass(frozen=True)
class Ranks:
    """The group of processes. group None: this process trains alone."""

    group: Any = None

    @classmethod
    def here(cls) -> Ranks:
        group = mx.distributed.init()
        return cls(group if group.size() > 1 else None)

    @property
    def size(self) -> int:
        return 1 if self.group is None else int(self.group.size())

    @property
    def first(self) -> bool:
        """Whether this process writes and draws."""
        return self.group is None or self.group.rank() == 0

    def share(self, batches: Sequence[Batch]) -> list[Batch]:
        """This rank's part of a step: whole micro-batches, the largest first, each to the rank that has least to do;
        where there are fewer than ranks, every n-th example of them.
        """
        if self.group is None:
            return list(batches)
        rank, mine = self.group.rank(), []
        if len(batches) >= self.size:
            tokens = [0] * self.size
            for batch in sorted(batches, key=lambda batch: -batch.ids.size):
                idle = tokens.index(min(tokens))
                tokens[idle] += batch.ids.size
                mine += [batch] if idle == rank else []
            return mine
        dealt = 0
        for batch in batches:
            part = batch.part(slice((rank - dealt) % self.size, None, self.size))
            dealt += len(batch.rows)
            mine += [part] if len(part.rows) else []
        return mine

    def deal(self, things: Sequence[Any]) -> Sequence[Any]:
        """This rank's part of a list."""
        return things if self.group is None else things[self.group.rank() :: self.size]

    def total(self, tree: Any) -> Any:
        """The sum over the ranks of a tree of arrays, the same bits on every rank."""
        if self.group is None:
            return tree
        arrays = _ordered(tree)
        means = nn.average_gradients(list(arrays.values()), self.group)
        return tree_unflatten([(name, mean * self.size) for name, mean in zip(arrays, means, strict=True)])

    def sums(self, *numbers: float) -> list[float]:
        """The sums over the ranks of some numbers, in double precision as far as they are added here."""
        if self.group is None:
            return list(numbers)
        # float32 pairs: MLX's ring adds no float64. The parts of a number are exact; only their few sums are rounded.
        high = [float(np.float32(number)) for number in numbers]
        low = [number - whole for number, whole in zip(numbers, high, strict=True)]
        parts = mx.distributed.all_gather(mx.array([[*high, *low]]), group=self.group)
        found = to_numpy(parts).astype(np.float64).sum(axis=0)
        return (found[: len(numbers)] + found[len(numbers) :]).tolist()

    def highest(self, number: int) -> int:
        """The largest of the ranks' numbers: what one of them must stop for, all stop for."""
        if self.group is None:
            return number
        return int(scalar(mx.distributed.all_gather(mx.array([number]), group=self.group).max()))

    def lowest(self, number: int) -> int:
        """The smallest of the ranks' numbers: what one of them has not, none may use."""
        return -self.highest(-number)

    def from_first(self, tree: Any) -> Any:
        """Rank 0's tree of arrays, on every rank."""
        if self.group is None:
            return tree
        out = []
        for name, array in _ordered(tree).items():
            mine = array if self.first else mx.zeros_like(array)
            out.append((name, mx.distributed.all_sum(mine, group=self.group)))
            mx.eval(out[-1][1])
        return tree_unflatten(out)

    def tell(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        if self.group is None:
            return text
        said = text.encode() if self.first else b""
        letters = np.zeros(self.highest(len(said)), np.uint8)
        letters[: len(said)] = np.frombuffer(said, np.uint8)
        return to_numpy(mx.distributed.all_sum(mx.array(letters), group=self.group)).tobytes().decode()

    @contextmanager
    def explained(self, run: Path) -> Iterator[None]:
        """Turn MLX's error about a dead process into one clear line."""
        try:
            yield
        except RuntimeError as error:
            if self.group is None or "peer" not in str(error):
                raise
            raise UserError(
                f"another of the {self.size} processes ended, and with it the run ({error})",
                f"The last checkpoint is whole; to go on, with any number of processes: --resume --out {run}",
            ) from error

    def require_same(self, **facts: str) -> None:
        """Raise UserError, on every rank, when the ranks differ in one of these."""
        for name, fact in facts.items():
            digest = np.frombuffer(hashlib.sha256(fact.encode()).digest()[:8], np.int32)
            if self.group is not None:
                every = to_numpy(mx.distributed.all_gather(mx.array(digest)[None], group=self.group))
                if (every != every[0]).any():
                    raise UserError(
                        f"the {self.size} processes do not have the same {name}",
                        "Give every machine the same files, options and versions.",
                    )


def _ordered(tree: Any) -> dict[str, mx.array]:
    """Every rank sends in the order of the names; trees that were loaded have another one than trees that were made."""
    return dict(sorted(named(tree).items()))


ALONE = Ranks()
