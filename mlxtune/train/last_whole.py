"""The last whole state of a run: what its last finished step left, kept until the next step is finished too.

A step replaces weights and moments one by one, and where it is stopped, or the device fails, the model holds arrays
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
from mlxtune.train.run_folder import RunFolder


@dataclass(frozen=True)
class Kept:
    """One whole state."""

    state: State  # where the run stood
    factors: dict[str, mx.array]  # the adapter's arrays by their names in its file, of any shape
    moments: dict[str, mx.array]  # the optimizer's, of any shape, its step and its rate among them


class LastWhole:
    """`keep` is for the thread that trains, `save` for any: it computes nothing and reads nothing of the model."""

    def __init__(
        self,
        folder: RunFolder,
        identity: Identity,
        keep_last: int,
        adapter_file: str = adapter_files.ADAPTER_FILE,
        saved: State | None = None,
    ) -> None:
        """keep_last: how many checkpoints stay; saved: the state that the newest one holds, None: there is none."""
        self.folder = folder
        self.saved = saved
        self.writing = threading.RLock()  # held by whoever writes an adapter or a checkpoint into the run folder
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

        parameters: the adapter's, by their names in its file; optimizer_state: a tree; all of any shape. A step must
        put new arrays into its trees: `a += b` would change what is held.
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
                self.folder.checkpoints,
                kept.state,
                self._identity,
                kept.factors,
                kept.moments,
                self._keep_last,
                self._adapter_file,
            )
            self.saved, self._saved_at = kept.state, time.monotonic()
            return folder

    def save_adapter(self) -> None:
        """Leave the adapter in the run folder."""
        with self.writing:
            save_arrays(self.folder.path / self._adapter_file, self._kept.factors)
