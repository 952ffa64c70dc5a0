"""Several processes training one adapter, data-parallel, under `mlx.launch`: MLX's own distributed layer.

Each optimizer step is that of one process: its examples are dealt to the ranks, and summed losses and gradients are
added up. Rank 0 alone reads and writes the run folder; the others get what it read. Alone, everything here does
nothing.

What is added up is sealed: the ranks compare a checksum of it, and every small message carries its number. MLX's JACCL
(RDMA over Thunderbolt) does not look at whether a message arrived: when a machine is gone, what lies in the buffer is
taken for it.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlxtune.compute.prefix import forest_of_batch, is_simple
from mlxtune.data.dataset.batches import Batch
from mlxtune.data.dataset.beginnings import common
from mlxtune.errors import UserError
from mlxtune.model.arrays import named, to_numpy
from mlxtune.train.patience import Patience

TOGETHER = 32 << 20  # bytes that are sent as one array, where tensors are smaller
WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint32}  # bytes of a number -> integers to read its bits as
NUMBERS = 1 << 20  # of messages before they begin again: float32 holds them exactly


class Torn(RuntimeError):
    """What this process received is not what the others sent."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and this one among them."""

    group: Any = None  # MLX's group; None: this process trains alone
    patience: Patience = field(default_factory=Patience)  # of its waits for the others
    messages: Iterator[int] = field(default_factory=itertools.count)  # numbers the small messages

    @classmethod
    def here(cls) -> Ranks:
        """Raises UserError when the processes do not find each other: without a word, each would train alone."""
        try:
            group = mx.distributed.init()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the processes do not find each other ({error})",
                "The hostfile must name an IP address of every machine that the others reach, and each machine's "
                "firewall must let Python in.",
            ) from error
        if group.size() == 1 and os.environ.get("MLX_RANK", "0") != "0":
            raise UserError(
                "this process was started as one of several, but MLX found no other",
                "Launch with --backend ring; jaccl needs RDMA over Thunderbolt between all machines.",
            )
        return cls(group if group.size() > 1 else None)

    @property
    def size(self) -> int:
        return 1 if self.group is None else int(self.group.size())

    @property
    def number(self) -> int:
        """This process, counted from 1."""
        return 1 if self.group is None else int(self.group.rank()) + 1

    @property
    def first(self) -> bool:
        """Whether this process writes and draws."""
        return self.group is None or self.group.rank() == 0

    def own_batches(self, batches: Sequence[Batch], of_run: int | None = None) -> list[Batch]:
        """This rank's part of a step: whole micro-batches, or where there are fewer than ranks, some examples of each.

        of_run: tokens that all rows begin with, as `Way.prefix` has them; None: examples are computed whole.
        """
        if self.group is None:
            return list(batches)
        if len(batches) >= self.size:
            return self._whole_batches(batches, of_run)
        return self._parts_of_each(batches, of_run)

    def _whole_batches(self, batches: Sequence[Batch], of_run: int | None) -> list[Batch]:
        """Those of the micro-batches that are this rank's: the largest first, each to the rank that has least to do."""
        computed = [batch.ids.size if of_run is None else forest_of_batch(batch, of_run).computed for batch in batches]
        mine = []
        tokens = [0] * self.size  # that each rank computes so far, padding included
        for number in sorted(range(len(batches)), key=lambda number: -computed[number]):
            idle = tokens.index(min(tokens))
            tokens[idle] += computed[number]
            if idle == self.group.rank():
                mine.append(batches[number])
        return mine

    def _parts_of_each(self, batches: Sequence[Batch], of_run: int | None) -> list[Batch]:
        """Every n-th example of the micro-batches, counted through all of them, that is this rank's. Of a micro-batch
        whose examples share more than one beginning, or are answers to compare, examples that follow each other: they
        are those that belong together.

        two ranks, batches of 3 and 2 examples:  a b c | d e  ->  rank 0 takes a c | e,  rank 1 takes b | d
        """
        mine = []
        dealt = 0  # examples of the batches before
        for batch in batches:
            if not batch.sides.any() and is_simple(forest_of_batch(batch, of_run)):
                first = (self.group.rank() - dealt) % self.size
                part = batch.part(slice(first, None, self.size))
                dealt += len(batch.rows)
            else:
                part = batch.part(_run_of(batch, self.group.rank(), self.size))
            if len(part.rows):
                mine.append(part)
        return mine

    def own_items(self, items: Sequence[Any]) -> Sequence[Any]:
        """This rank's part of a list."""
        return items if self.group is None else items[self.group.rank() :: self.size]

    def sum_tree(self, tree: Any) -> Any:
        """The sum over the ranks of a tree of arrays, the same bits on every rank."""
        if self.group is None:
            return tree
        arrays = _ordered(tree)
        mx.eval(arrays)  # this process's own work, before it waits
        summed, received = {}, []
        for names in _together(arrays):
            flat = mx.concatenate([arrays[name].reshape(-1) for name in names])
            received.append(self._added(flat))
            ends = np.cumsum([arrays[name].size for name in names])[:-1].tolist()
            parts = mx.split(received[-1], ends)
            for name, part in zip(names, parts, strict=True):
                summed[name] = part.reshape(arrays[name].shape)
        self._seal(received)
        return tree_unflatten(list(summed.items()))

    def sum_numbers(self, *numbers: float) -> list[float]:
        """The sums over the ranks of some numbers, in double precision as far as they are added here."""
        if self.group is None:
            return list(numbers)
        # float32 pairs: MLX's ring adds no float64. The parts of a number are exact; only their few sums are rounded.
        high = [float(np.float32(number)) for number in numbers]
        low = [number - rounded for number, rounded in zip(numbers, high, strict=True)]
        gathered = self._gathered(mx.array([*high, *low])).astype(np.float64)  # [ranks, 2N]
        summed = gathered.sum(axis=0)
        return (summed[: len(numbers)] + summed[len(numbers) :]).tolist()

    def highest(self, number: int) -> int:
        """The largest of the ranks' numbers: what one of them must stop for, all stop for."""
        if self.group is None:
            return number
        return int(self._gathered(mx.array([number])).max())

    def lowest(self, number: int) -> int:
        """The smallest of the ranks' numbers: what one of them has not, none may use."""
        return -self.highest(-number)

    def broadcast_tree(self, tree: Any) -> Any:
        """Rank 0's tree of arrays, on every rank."""
        if self.group is None:
            return tree
        out = {}
        for name, array in _ordered(tree).items():
            out[name] = self._added(array if self.first else mx.zeros_like(array))
        self._seal(list(out.values()))
        return tree_unflatten(list(out.items()))

    def meet(self) -> None:
        """Wait until every process is here: between two parts of what one of them does alone, so that the others wait
        for a part only.
        """
        self.highest(0)

    def broadcast_text(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        if self.group is None:
            return text
        own = text.encode() if self.first else b""
        letters = np.zeros(self.highest(len(own)), np.uint8)
        letters[: len(own)] = np.frombuffer(own, np.uint8)
        return to_numpy(self._added(mx.array(letters))).tobytes().decode()  # the others added zeros

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Around everything that waits for the others."""
        with self.patience.waiting():
            try:
                yield
            except ValueError as error:  # JACCL's, of a message that it could not send
                raise Torn(str(error)) from error

    def _added(self, array: mx.array) -> mx.array:
        """The sum over the ranks of an array of any shape."""
        with self._exchange():
            summed = mx.distributed.all_sum(array, group=self.group)
            mx.eval(summed)
        return summed

    def _gathered(self, numbers: mx.array) -> np.ndarray:
        """[ranks, N]: the N numbers of every rank. Raises Torn when a message is not the one that was due."""
        due = next(self.messages) % NUMBERS
        sent = mx.concatenate([numbers, mx.array([due], numbers.dtype)])
        with self._exchange():
            gathered = to_numpy(mx.distributed.all_gather(sent[None], group=self.group))  # [ranks, N + 1]
        if (gathered[:, -1] != due).any():
            raise Torn("a message is not the one that was due")
        return gathered[:, :-1]

    def _seal(self, arrays: list[mx.array]) -> None:
        """Raise Torn, on every rank, unless all have the same bits."""
        # Sums of integers: exact in any order, so equal on chips of different kinds.
        bits = [array.reshape(-1).view(WORDS[array.dtype.size]) for array in arrays]
        sums = [part.astype(mx.uint32).sum() for part in bits]
        gathered = self._gathered(mx.stack(sums).sum()[None].view(mx.int32))  # [ranks, 1]
        if (gathered != gathered[0]).any():
            raise Torn("the sums are not the same on all of them")

    @contextmanager
    def explained(self, run: Path) -> Iterator[None]:
        """Turn MLX's error about a dead process, and a torn sum, into one clear line. run: its folder."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, Torn) or str(error).startswith(("[ring]", "[jaccl]"))
            if self.group is None or not lost:
                raise
            raise UserError(
                f"the connection to another of the {self.size} processes is gone, and with it the run ({error})",
                f"What was saved is whole: --resume --out {run} goes on from there, with any number of processes.",
            ) from error

    def require_same(self, **facts: str) -> None:
        """Raise UserError, on every rank, when the ranks differ in one of these."""
        if self.group is None:
            return
        for name, fact in facts.items():
            digest = np.frombuffer(hashlib.sha256(fact.encode()).digest()[:8], np.int32)
            gathered = self._gathered(mx.array(digest))  # [ranks, 2]
            if (gathered != gathered[0]).any():
                raise UserError(
                    f"the {self.size} processes do not have the same {name}",
                    "Give every machine the same files, options and versions.",
                )


def _run_of(batch: Batch, rank: int, ranks: int) -> slice:
    """The examples of a micro-batch that one of several ranks takes: each about as many tokens that its example before
    does not begin with.

    Lengths of 100, 300, 310 and 200 tokens, which share 90, 300 and 0 with the one before: 100 + 210 | 10 + 200.
    Answers that are compared go to one rank: what is dealt are then pairs.

    The last rank takes all that are left: where the last example is equal to the one before it has nothing new, so its
    middle lies on the last border.
    """
    new = batch.lengths.copy()
    for row in range(1, len(new)):
        before = batch.ids[row - 1, : batch.lengths[row - 1]]
        new[row] -= common(before, batch.ids[row, : batch.lengths[row]])
    starts = [part.start for part in batch.whole_parts]
    new = np.add.reduceat(new, starts)
    middles = np.cumsum(new) - new / 2
    borders = np.searchsorted(middles, np.arange(ranks + 1) * new.sum() / ranks)
    borders[0], borders[-1] = 0, len(new)
    examples = np.append(starts, len(batch.rows))[borders]
    return slice(int(examples[rank]), int(examples[rank + 1]))


def _ordered(tree: Any) -> dict[str, mx.array]:
    """Every rank sends in the order of the names; trees that were loaded have another one than trees that were made."""
    return dict(sorted(named(tree).items()))


def _together(arrays: dict[str, mx.array]) -> Iterator[list[str]]:
    """The names of arrays of one type that are sent as one, of TOGETHER bytes or little more."""
    by_dtype: dict[str, list[str]] = {}
    for name, array in arrays.items():
        by_dtype.setdefault(str(array.dtype), []).append(name)
    for dtype in sorted(by_dtype):
        together: list[str] = []
        for name in by_dtype[dtype]:
            together.append(name)
            if sum(arrays[one].nbytes for one in together) >= TOGETHER:
                yield together
                together = []
        if together:
            yield together


ALONE = Ranks()
