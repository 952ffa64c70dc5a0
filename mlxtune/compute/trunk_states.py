"""What the frozen blocks give for each row of a run: computed once, then kept, in memory first and then on the disk.

Row 17 of 300 tokens, in a model of width 576 in float32, gives 299 x 576 numbers, 0.69 MB. With room for 1.5 MB in
memory and 1 MB on the disk:

    1st epoch   row 17: computed, kept in memory    row 4: in memory    row 9: on the disk    row 2: not kept, no room
    2nd epoch   row 2: computed again    row 17, 9, 4: at hand

What is kept stays: each row comes once in an epoch, and one that made way for another would be wanted before that one.

Every row is computed alone and without padding, in the first epoch as in any other. So its states are a function of
the row and the base, whatever it shared a batch with; kept or computed again they have the same bits, and a run that is
resumed with nothing kept goes on as one that never stopped. They are kept in the type of the activations, bit by bit.
The key is the row's tokens, so that rows that are equal share their states, and no row gets another's.

What is on the disk lies in one file without a name in the folder for temporary files: nobody else can open it, and it
goes with the process, however that ends. A disk that is full costs time alone.

Legend: B rows, T tokens, L tokens of one row, D width.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlxtune_convert.sizes import size

from mlxtune.compute import attention, parts
from mlxtune.compute.loss import Way
from mlxtune.compute.trunk import padded, states_of
from mlxtune.data.dataset.batches import Batch
from mlxtune.model.linux_cpu import as_powers_of_two


@dataclass(frozen=True)
class Budget:
    """Bytes that the states of rows may take."""

    memory: int = 0  # the first ones
    disk: int = 0  # the ones after those


NOTHING = Budget()  # all states are computed whenever they are wanted


class _OnDisk(NamedTuple):
    """States in the file."""

    begin: int  # of their bytes
    shape: tuple[int, ...]  # [L - 1, D]
    dtype: mx.Dtype


class Store:
    """States of rows by the digest of their tokens, as many as there is room for."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.notes: list[str] = []  # what went wrong, for people, until somebody takes it
        self._in_memory: dict[bytes, mx.array] = {}  # [L - 1, D] each
        self._on_disk: dict[bytes, _OnDisk] = {}
        self._memory_taken = 0  # bytes
        self._disk_taken = 0  # bytes, and where the next states begin in the file
        self._file: IO[bytes] | None = None  # made when it is first wanted
        self._disk_fails = False  # nothing more is written

    def get(self, key: bytes) -> mx.array | None:
        """[L - 1, D], the bits that were put; None: they are not here."""
        if key in self._in_memory:
            return self._in_memory[key]
        if key in self._on_disk:
            return self._read(key)
        return None

    def put(self, key: bytes, states: mx.array) -> None:
        """Keep the states of a row, [L - 1, D] and computed, where there is room for them."""
        if self._memory_taken + states.nbytes <= self.budget.memory:
            self._in_memory[key] = states
            self._memory_taken += states.nbytes
        elif self._disk_taken + states.nbytes <= self.budget.disk and not self._disk_fails:
            self._write(key, states)

    def close(self) -> None:
        """Forget everything."""
        self._in_memory.clear()
        self._on_disk.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, key: bytes, states: mx.array) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`, or with the store)
                weakref.finalize(self, self._file.close)
            _write_all(self._file.fileno(), np.array(states.view(mx.uint8)).data, self._disk_taken)
        except OSError as error:
            self._give_up(f"cannot be written ({error.strerror})")
            return
        self._on_disk[key] = _OnDisk(self._disk_taken, states.shape, states.dtype)
        self._disk_taken += states.nbytes

    def _read(self, key: bytes) -> mx.array | None:
        """None where the disk fails."""
        begin, shape, dtype = self._on_disk[key]
        count = int(np.prod(shape)) * dtype.size
        assert self._file is not None
        try:
            read = _read_all(self._file.fileno(), count, begin)
        except OSError as error:
            self._give_up(f"cannot be read ({error.strerror})")
            del self._on_disk[key]
            return None
        return mx.array(np.frombuffer(read, np.uint8)).view(dtype).reshape(shape)

    def _give_up(self, why: str) -> None:
        """Write no more, and say so once."""
        if not self._disk_fails:
            kept = f"after {size(self._disk_taken)}: other rows are computed anew in each epoch"
            self.notes.append(f"train.trunk_cache: the temporary file {why} {kept}")
        self._disk_fails = True


class RowStates:
    """The states of a run's micro-batches."""

    def __init__(self, model: nn.Module, way: Way, budget: Budget = NOTHING) -> None:
        """way: the run's, with `way.frozen` of the first blocks left out; budget: of what is kept."""
        self._model = model
        self._way = way
        self.store = Store(budget)
        self.computed = 0  # rows, so far

    def of(self, batch: Batch) -> mx.array:
        """[B, T, D], padded as the batch is; T without each row's last token, which predicts nothing."""
        width = batch.ids.shape[1] - 1
        rows = []
        for ids, length in zip(batch.ids, batch.lengths.tolist(), strict=True):
            rows.append(padded(self._of_row(ids[: length - 1])[None], width))
        states = mx.concatenate(rows)
        mx.eval(states)
        return states

    def _of_row(self, ids: np.ndarray) -> mx.array:
        """[L - 1] tokens -> [L - 1, D]."""
        key = hashlib.blake2b(np.ascontiguousarray(ids, np.int32).tobytes(), digest_size=16).digest()
        states = self.store.get(key)
        if states is None:
            states = self._computed(ids)
            self.store.put(key, states)
        return states

    def _computed(self, ids: np.ndarray) -> mx.array:
        training = self._model.training
        self._model.train()  # as in a step: some layers compute otherwise where they generate
        try:
            with self._as_said():
                states, _ = states_of(self._model, self._way.frozen, mx.array(ids[None]))
                mx.eval(states)
        finally:
            self._model.train(training)
        self.computed += 1
        return states[0]

    @contextmanager
    def _as_said(self) -> Iterator[None]:
        """Inside, the model computes its blocks as the way says, and as the run's memory is counted: of a long row, the
        scores of all its attention would be more than the run has. Nothing goes back, so nothing is checkpointed.
        """
        names = [name for name in self._way.parts if name != "last_block"]  # which is not among the frozen ones
        with (
            parts.within(self._model, names),
            as_powers_of_two(self._way.powers),
            attention.in_chunks(self._way.queries),
        ):
            yield


def _write_all(file: int, data: memoryview, begin: int) -> None:
    rest = data.cast("B")
    while rest:
        written = os.pwrite(file, rest, begin)
        rest, begin = rest[written:], begin + written


def _read_all(file: int, count: int, begin: int) -> bytes:
    """Raises OSError where there are fewer bytes."""
    read = []
    while count:
        part = os.pread(file, count, begin)
        if not part:
            raise OSError(0, "it is shorter than what was written")
        read.append(part)
        count, begin = count - len(part), begin + len(part)
    return b"".join(read)
