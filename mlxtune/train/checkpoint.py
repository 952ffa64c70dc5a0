"""Checkpoints: everything a run needs to go on with the same bits.

RUN/checkpoints/step-0000100/ holds the adapter's tensors, optimizer.safetensors and state.json. A folder appears whole
or not at all; state.json carries the digests of the two other files, so a torn checkpoint is recognised and the one
before is used.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_unflatten
from mlxtune_convert.files import contents, digest, new_folder, read_json, write_json
from mlxtune_convert.tensors import read_header

from mlxtune.adapter import lora
from mlxtune.data.template import tokenizer_changes
from mlxtune.errors import UserError
from mlxtune.model.arrays import named, save_arrays
from mlxtune.train import events, lock
from mlxtune.train.identity import Identity

FOLDER = "checkpoints"
BEST = "best"  # RUN/checkpoints/best: the adapter with the lowest validation loss, where RUN holds the last one
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"
STEP = re.compile(r"step-\d{7,}")
LEFT = re.compile(r"\.(step-\d+|best)\.(partial|old)-\d+(-[0-9a-f]+)?")  # by a process that was killed while it wrote
RESTART = "Start again without --resume, into another folder."
# All that a run writes before it saved anything.
OWN = (lock.FILE, CONFIG_FILE, events.FILE, lora.CONFIG_FILE, tokenizer_changes.FILE, FOLDER, "tensorboard", "wandb")


MOST_HALVED = 64  # times that a micro-batch is cut in two: more has no effect on any


@dataclass(frozen=True)
class State:
    """Where a run stands after `step`.

    evaluated: the last step that was evaluated; best_loss: the lowest validation loss so far (None: not evaluated), at
    best_step; stale: evaluations since then; skipped: steps left out for numbers that were not finite; halved,
    checkpointed: how steps are divided for want of memory, as in `Division`.
    """

    step: int = 0
    evaluated: int = -1
    best_loss: float | None = None
    best_step: int = 0
    stale: int = 0
    skipped: int = 0
    halved: int = 0
    checkpointed: bool = False

    @classmethod
    def of(cls, saved: dict[str, Any]) -> State:
        """As it was saved. Raises TypeError or ValueError for what is none."""
        state = cls(**saved)
        counts = (state.step, state.evaluated + 1, state.best_step, state.stale, state.skipped, state.halved)
        if not all(type(count) is int and 0 <= count < 1 << 63 for count in counts):
            raise ValueError("a count is none")
        if type(state.checkpointed) is not bool or state.halved > MOST_HALVED:
            raise ValueError("no division of steps")
        if state.best_loss is not None and not math.isfinite(state.best_loss):
            raise ValueError("no loss")
        return state


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
    factors: dict[str, mx.array],
    moments: dict[str, mx.array],
    keep_last: int,
    adapter_file: str = lora.ADAPTER_FILE,
) -> Path:
    """Write the checkpoint of `state.step`, then remove all but the newest `keep_last`.

    factors: the adapter's arrays; moments: the optimizer's. Both evaluated: nothing is computed here.
    """
    folder = run / FOLDER / f"step-{state.step:07d}"
    with new_folder(folder, own=True) as work:
        save_arrays(work / adapter_file, factors)
        save_arrays(work / OPTIMIZER_FILE, moments)
        digests = {name: digest(work / name) for name in (adapter_file, OPTIMIZER_FILE)}
        write_json(work / STATE_FILE, {"state": asdict(state), "identity": asdict(identity), "sha256": digests})
    older = [other for other in _folders(run) if other < folder]
    for old in older[: max(0, len(older) - (keep_last - 1))]:
        shutil.rmtree(old)
    return folder


def save_best(run: Path, state: State, model: nn.Module, adapter_file: str) -> None:
    """Keep the adapter that scored best so far beside the checkpoints."""
    with new_folder(run / FOLDER / BEST, own=True) as work:
        lora.save_factors(model, work, adapter_file)
        shutil.copy(run / lora.CONFIG_FILE, work)
        write_json(work / STATE_FILE, {"state": asdict(state)})


def newest(run: Path, skipped: Callable[[str], None]) -> Saved:
    """The newest whole checkpoint; `skipped` hears of torn ones, which are removed together with what a killed process
    left half written. Raises UserError when there is none.
    """
    refuse_links(run)
    for left in (run / FOLDER).glob(".*"):
        if LEFT.fullmatch(left.name):
            shutil.rmtree(left)
    broken: list[Path] = []
    found = None
    for folder in reversed(_folders(run)):
        try:
            saved = read_json(folder / STATE_FILE, "a checkpoint")
            state, identity = State.of(saved["state"]), Identity.of_saved(saved["identity"])
            _require_own(folder, state, saved["sha256"])
            torn = [name for name, expected in saved["sha256"].items() if digest(folder / name) != expected]
            if not torn:
                found = Saved(folder, state, identity)
                break
            broken.append(folder)
        except (UserError, FileNotFoundError):
            torn = [STATE_FILE]
            broken.append(folder)
        except OSError as error:
            torn = [f"it cannot be read: {error.strerror}"]
        except (KeyError, TypeError, AttributeError, ValueError):
            torn = [f"{STATE_FILE}, of another version"]  # and not ours to remove
        skipped(f"{folder} is incomplete ({torn[0]}): using the checkpoint before it")
    if found is None:
        torn_ones = f": {len(broken)} are there, none of them whole" if broken else ""
        raise UserError(f"{run} has no checkpoint to resume from{torn_ones}", RESTART)
    for torn_folder in broken:
        shutil.rmtree(torn_folder)
    return found


def restore(saved: Saved, model: nn.Module, optimizer: Optimizer) -> None:
    """Load a checkpoint's tensors into model and optimizer, whose state is made already. Raises UserError for tensors
    that are not of this run: whoever changes a file can write its digest too.
    """
    file = lora.adapter_file(saved.folder)
    if file is None:
        raise UserError(f"{saved.folder} holds no adapter", RESTART)
    lora.load_factors(model, file)
    moments = saved.folder / OPTIMIZER_FILE
    read_header(moments)
    tensors: Any = mx.load(str(moments))
    mx.eval(tensors)
    wanted = {name: (array.shape, array.dtype) for name, array in named(optimizer.state).items()}
    if {name: (array.shape, array.dtype) for name, array in tensors.items()} != wanted:
        raise UserError(f"{moments} is not the optimizer's state of this run", RESTART)
    optimizer.state = tree_unflatten(list(tensors.items()))


def refuse_links(run: Path) -> None:
    """Raise UserError where a file or folder of a run is a link: what it leads to is another's, and would be written to
    or removed.
    """
    for name in (*OWN, lora.ADAPTER_FILE):
        if (run / name).is_symlink():
            raise UserError(f"{run / name} is a link", "A run's files are its own: choose another --out, or remove it.")
    if (run / FOLDER).is_dir():
        for path in (run / FOLDER).iterdir():
            if path.is_symlink() and _is_of_ours(path.name):
                raise UserError(f"{path} is a link", "Checkpoints are never linked: remove it.")


def _is_of_ours(name: str) -> bool:
    """Whether a checkpoint is called so."""
    return name == BEST or bool(STEP.fullmatch(name) or LEFT.fullmatch(name))


def exists(run: Path) -> bool:
    """Whether a run holds anything worth keeping: an adapter or a checkpoint."""
    return lora.adapter_file(run) is not None or resumable(run)


def resumable(run: Path) -> bool:
    """Whether there is a checkpoint."""
    return bool(_folders(run))


def free(run: Path) -> bool:
    """Whether a run may begin here: there is nothing, or one of ours was killed here before it saved anything."""
    if run.is_symlink() or not run.is_dir():
        return not os.path.lexists(run)
    there = contents(run)
    if not there:
        return True
    known = all(path.name in OWN and not path.is_symlink() for path in there)
    return known and lock.is_marked(run) and not exists(run) and not lock.is_locked(run)


def remove(run: Path) -> None:
    """Take away what a run wrote that saved nothing; what others put there stays. Only where a run began."""
    if not lock.is_marked(run):
        return
    for name in OWN:
        path = run / name
        if name == FOLDER:
            _remove_own(path)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if run.is_dir() and not contents(run):
        shutil.rmtree(run, ignore_errors=True)


def _remove_own(folder: Path) -> None:
    """Remove a folder of checkpoints, but for what others put into it."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if _is_of_ours(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    if not contents(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _folders(run: Path) -> list[Path]:
    return sorted(path for path in (run / FOLDER).glob("step-*") if STEP.fullmatch(path.name) and path.is_dir())


def _require_own(folder: Path, state: State, digests: dict[str, str]) -> None:
    """Raise ValueError for a step or for names of files that no checkpoint of ours has. Another file would be read, or
    a pipe that never ends.
    """
    if folder.name != f"step-{state.step:07d}":
        raise ValueError("another step's state")
    if set(digests) not in ({lora.ADAPTER_FILE, OPTIMIZER_FILE}, {lora.OWN_FILE, OPTIMIZER_FILE}):
        raise ValueError("other files' digests")
    if any((folder / name).exists() and not (folder / name).is_file() for name in digests):
        raise ValueError("something else in place of a file")
