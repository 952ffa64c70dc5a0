"""The last whole state of a run: what its last finished step left, kept until the next step is finished too.

A step replaces weights and moments one by one, and where it is stopped, or the device gives up, the model holds arrays
that were never computed. The arrays of the step before are held here. MLX reuses the memory of an array only when
nobody holds it, inside a compiled function too, so what is held stays as it was.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtune.adapter import adapter_files
from mlxtune.model.arrays import named, save_arrays
from mlxtune.train import checkpoint
from mlxtune.train.checkpoint import State
from mlxtune.train.identity import Identity


@dataclass(frozen=True)
class Kept:
    """One whole state. factors: the adapter's arrays by name; moments: the optimizer's, its step among them."""

    state: State
    factors: dict[str, mx.array]
    moments: dict[str, mx.array]


class LastWhole:
    """`keep` is for the thread that trains, `save` for any thread: it computes nothing and reads nothing of the model.

    run: its folder; keep_last: how many checkpoints stay; saved: the state that the newest checkpoint holds.
    writing: held by whoever writes an adapter or a checkpoint into the run folder.
    """

    def __init__(
        self,
        run: Path,
        identity: Identity,
        keep_last: int,
        adapter_file: str = adapter_files.ADAPTER_FILE,
        saved: State | None = None,
    ) -> None:
        self.run = run
        self.saved = saved
        self.writing = threading.RLock()
        self._identity = identity
        self._keep_last = keep_last
        self._adapter_file = adapter_file
        self._kept = Kept(State(), {}, {})
        self._saved_at = time.monotonic()

    @property
    def state(self) -> State:
        """Where the run stood when its arrays were last kept."""
        return self._kept.state

    @property
    def unsaved_seconds(self) -> float:
        """Since the last checkpoint, or the beginning."""
        return time.monotonic() - self._saved_at

    def keep(self, state: State, parameters: dict[str, mx.array], optimizer_state: Any) -> None:
        """Hold these arrays in place of those held before; they are evaluated first.

        parameters: the adapter's, by their names in its file; optimizer_state: a tree. A step must put new arrays into
        its trees: `a += b` would change what is held.
        """
        moments = named(optimizer_state)
        mx.eval(parameters, moments)
        self._kept = Kept(state, dict(parameters), moments)

    def save(self) -> Path | None:
        """The folder of a new checkpoint; None where nothing was trained yet, or the newest one holds this already.

        Raises UserError or OSError where the disk refuses it.
        """
        with self.writing:
            kept = self._kept
            if kept.state.step == 0 or kept.state == self.saved:
                return None
            folder = checkpoint.save(
                self.run, kept.state, self._identity, kept.factors, kept.moments, self._keep_last, self._adapter_file
            )
            self.saved, self._saved_at = kept.state, time.monotonic()
            return folder

    def save_adapter(self) -> None:
        """Leave the adapter in the run folder."""
        with self.writing:
            save_arrays(self.run / self._adapter_file, self._kept.factors)
