"""Checkpoints: everything a run needs to go on with the same bits.

RUN/checkpoints/step-0000100/ holds the adapter's tensors, optimizer.safetensors and state.json. A folder appears whole
or not at all; state.json carries the digests of the two other files, so a torn checkpoint is recognised and the one
before is used.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_unflatten
from mlxtune_convert.files import new_folder, read_json, write_json

from mlxtune.errors import UserError
from mlxtune.model import lora
from mlxtune.model.arrays import named, save_arrays
from mlxtune.train.identity import Identity
from mlxtune.train.lock import FILE, is_locked

FOLDER = "checkpoints"
BEST = "best"  # RUN/checkpoints/best: the adapter with the lowest validation loss, where RUN holds the last one
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


@dataclass(frozen=True)
class State:
    """Where a run stands after `step`.

    evaluated: the last step that was evaluated; best_loss: the lowest validation loss so far (None: not evaluated), at
    best_step; stale: evaluations since then; skipped: steps left out for numbers that were not finite.
    """

    step: int = 0
    evaluated: int = -1
    best_loss: float | None = None
    best_step: int = 0
    stale: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint on the disk."""

    folder: Path
    state: State
    identity: Identity


def save(
    run: Path,
    state: State,
    identity: Identity,
    model: nn.Module,
    optimizer: Optimizer,
    keep_last: int,
    adapter_file: str = lora.ADAPTER_FILE,
) -> Path:
    """Write the checkpoint of `state.step`, then remove all but the newest `keep_last`."""
    folder = run / FOLDER / f"step-{state.step:07d}"
    with new_folder(folder, force=True) as work:
        lora.save_factors(model, work, adapter_file)
        save_arrays(work / OPTIMIZER_FILE, named(optimizer.state))
        digests = {name: _digest(work / name) for name in (adapter_file, OPTIMIZER_FILE)}
        write_json(work / STATE_FILE, {"state": asdict(state), "identity": asdict(identity), "sha256": digests})
    older = [other for other in _folders(run) if other < folder]
    for old in older[: max(0, len(older) - (keep_last - 1))]:
        shutil.rmtree(old)
    return folder


def save_best(run: Path, state: State, model: nn.Module, adapter_file: str) -> None:
    """Keep the adapter that scored best so far beside the checkpoints."""
    with new_folder(run / FOLDER / BEST, force=True) as work:
        lora.save_factors(model, work, adapter_file)
        shutil.copy(run / lora.CONFIG_FILE, work)
        write_json(work / STATE_FILE, {"state": asdict(state)})


def newest(run: Path, skipped: Callable[[str], None]) -> Saved:
    """The newest whole checkpoint; `skipped` hears of torn ones, which are removed together with what a killed process
    left half written. Raises UserError when there is none.
    """
    for left in (run / FOLDER).glob(".*"):
        shutil.rmtree(left)
    broken: list[Path] = []
    for folder in reversed(_folders(run)):
        try:
            found = read_json(folder / STATE_FILE, "a checkpoint")
            torn = [name for name, digest in found["sha256"].items() if _digest(folder / name) != digest]
            saved = Saved(folder, State(**found["state"]), Identity(**found["identity"]))
        except (UserError, OSError, KeyError, TypeError, AttributeError):
            torn = [STATE_FILE]
        if torn:
            skipped(f"{folder} is incomplete ({torn[0]}): using the checkpoint before it")
            broken.append(folder)
            continue
        for torn_folder in broken:
            shutil.rmtree(torn_folder)
        return saved
    raise UserError(f"{run} has no checkpoint to resume from", "Start again without --resume, into another folder.")


def restore(saved: Saved, model: nn.Module, optimizer: Optimizer) -> State:
    """Load a checkpoint's tensors into model and optimizer."""
    file = lora.adapter_file(saved.folder)
    assert file is not None  # state.json names it among the digests
    lora.load_factors(model, file)
    tensors: Any = mx.load(str(saved.folder / OPTIMIZER_FILE))
    mx.eval(tensors)
    optimizer.state = tree_unflatten(list(tensors.items()))
    return saved.state


def exists(run: Path) -> bool:
    """Whether a run holds anything worth keeping: an adapter or a checkpoint."""
    return lora.adapter_file(run) is not None or bool(_folders(run))


def free(run: Path) -> bool:
    """Whether a run may begin here: there is nothing, or one was killed here before it saved anything."""
    if not run.is_dir():
        return not run.exists()
    return not any(run.iterdir()) or ((run / FILE).is_file() and not is_locked(run) and not exists(run))


def _folders(run: Path) -> list[Path]:
    return sorted((run / FOLDER).glob("step-*"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
