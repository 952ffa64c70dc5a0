"""Checkpoints: everything a run needs to go on with the same bits.

    RUN/checkpoints/step-0000100/adapters.safetensors    the adapter's tensors, under the adapter's own file name
                                 optimizer.safetensors   AdamW's two moments of each, its step and its rate
                                 state.json              `State`, `Identity`, and the digests of the two other files
    RUN/checkpoints/best/        the best adapter (train.keep_by), where RUN holds the last one

A folder appears whole or not at all. The digests show when a checkpoint is torn, and the one before is used.
"""

from __future__ import annotations

import math
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

from mlxtune.adapter import adapter_files
from mlxtune.errors import UserError
from mlxtune.model.arrays import named, save_arrays
from mlxtune.train.identity import Identity

BEST = "best"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
STEP = re.compile(r"step-\d{7,}")
LEFT = re.compile(r"\.(step-\d+|best)\.(partial|old)-\d+(-[0-9a-f]+)?")  # by a process that was killed while it wrote
RESTART = "Start again without --resume, into another folder."
MOST_HALVED = 64  # times that a micro-batch is cut in two; more cuts change nothing


@dataclass(frozen=True)
class State:
    """Where a run stands after `step`."""

    step: int = 0  # steps that were taken, the skipped ones among them; 0: none yet
    evaluated: int = -1  # the last step that was evaluated; -1: none was, 0: the adapter as it began
    best_loss: float | None = None  # validation loss of the best step so far, nats a token; None: not evaluated
    best_step: int = 0  # the best one by train.keep_by: by loss, the one with the lowest
    best_check: float | None = None  # what it has in the check that train.keep_by names; None: kept by loss
    stale: int = 0  # evaluations since the best one
    skipped: int = 0  # steps left out for numbers that were not finite
    halved: int = 0  # how often micro-batches are cut in two for want of memory, as in `Division`
    checkpointed: bool = False  # every block is checkpointed for want of memory, as in `Division`
    in_pieces: bool = False  # and computed in pieces of a row

    def is_beaten_by(self, loss: float, check: float | None) -> bool:
        """Whether an evaluation is better than the best so far. check: what decides first; None: the loss alone."""
        if self.best_loss is None:
            return True
        if check is not None and self.best_check is not None and check != self.best_check:
            return check > self.best_check
        return loss < self.best_loss

    @classmethod
    def of(cls, saved: dict[str, Any]) -> State:
        """The state that state.json holds. Raises TypeError or ValueError for what is none."""
        state = cls(**saved)
        # -1 is the one of them that may be negative: nothing was evaluated.
        counts = (state.step, state.evaluated + 1, state.best_step, state.stale, state.skipped, state.halved)
        for count in counts:
            if type(count) is not int or not 0 <= count < 1 << 63:
                raise ValueError("a count is none")
        divided = (state.checkpointed, state.in_pieces)
        if any(type(each) is not bool for each in divided) or state.halved > MOST_HALVED:
            raise ValueError("no division of steps")
        for best in (state.best_loss, state.best_check):
            if best is not None and not math.isfinite(best):
                raise ValueError("no loss, or no score")
        return state


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint on the disk."""

    folder: Path  # RUN/checkpoints/step-0000100
    state: State  # where the run stood
    identity: Identity  # of the run


def save(
    checkpoints: Path,
    state: State,
    identity: Identity,
    factors: dict[str, mx.array],
    moments: dict[str, mx.array],
    keep_last: int,
    adapter_file: str = adapter_files.ADAPTER_FILE,
) -> Path:
    """Write the checkpoint of `state.step`, then remove all but the newest `keep_last`. Returns its folder.

    factors: the adapter's arrays, moments: the optimizer's, of any shape, by name. All are evaluated: nothing is
    computed here.
    """
    folder = checkpoints / f"step-{state.step:07d}"
    with new_folder(folder, own=True) as work:
        save_arrays(work / adapter_file, factors)
        save_arrays(work / OPTIMIZER_FILE, moments)
        digests = {name: digest(work / name) for name in (adapter_file, OPTIMIZER_FILE)}
        write_json(work / STATE_FILE, {"state": asdict(state), "identity": asdict(identity), "sha256": digests})
    older = [other for other in folders(checkpoints) if other < folder]
    surplus = len(older) - (keep_last - 1)
    for old in older[: max(0, surplus)]:
        shutil.rmtree(old)
    return folder


def save_best(checkpoints: Path, state: State, model: nn.Module, adapter_file: str) -> None:
    """Keep the adapter that scored best so far beside the checkpoints. Its adapter_config.json is the run's."""
    with new_folder(checkpoints / BEST, own=True) as work:
        adapter_files.save_tensors(model, work, adapter_file)
        shutil.copy(checkpoints.parent / adapter_files.CONFIG_FILE, work)
        write_json(work / STATE_FILE, {"state": asdict(state)})


class _Torn(Exception):
    """A checkpoint is not whole. The text: which of its files is at fault."""


class _Unusable(Exception):
    """A checkpoint cannot be used, and may not be ours to remove. The text: why."""


def newest(checkpoints: Path, skipped: Callable[[str], None]) -> Saved:
    """The newest whole checkpoint. Torn ones are removed, together with what a killed process left half written.

    skipped: called with a line on each checkpoint that cannot be used. Raises UserError when there is none that can;
    then the torn ones stay.
    """
    _remove_half_written(checkpoints)
    torn: list[Path] = []
    for folder in reversed(folders(checkpoints)):
        try:
            saved = _read(folder)
        except _Torn as error:
            torn.append(folder)
            problem = f"is incomplete ({error})"
        except _Unusable as error:
            problem = f"cannot be used ({error})"
        else:
            for broken in torn:
                shutil.rmtree(broken)
            return saved
        skipped(f"{folder} {problem}: using the checkpoint before it")
    none_whole = f": {len(torn)} are there, none of them whole" if torn else ""
    raise UserError(f"{checkpoints.parent} has no checkpoint to resume from{none_whole}", RESTART)


def _read(folder: Path) -> Saved:
    """What a checkpoint says of itself, its files compared with their digests. Raises _Torn or _Unusable."""
    try:
        saved = read_json(folder / STATE_FILE, "a checkpoint")
        state, identity = State.of(saved["state"]), Identity.of_saved(saved["identity"])
        digests = saved["sha256"]
        _require_own(folder, state, digests)
        for name, expected in digests.items():
            if digest(folder / name) != expected:
                raise _Torn(name)
        return Saved(folder, state, identity)
    except (UserError, FileNotFoundError) as error:
        raise _Torn(STATE_FILE) from error
    except OSError as error:
        raise _Unusable(f"it cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _Unusable(f"{STATE_FILE}, of another version") from error


def _require_own(folder: Path, state: State, digests: dict[str, str]) -> None:
    """Raise ValueError for a step or for names of files that no checkpoint of ours has. Another file would be read, or
    a pipe that never ends.
    """
    if folder.name != f"step-{state.step:07d}":
        raise ValueError("another step's state")
    if set(digests) not in ({adapter_files.ADAPTER_FILE, OPTIMIZER_FILE}, {adapter_files.OWN_FILE, OPTIMIZER_FILE}):
        raise ValueError("other files' digests")
    for name in digests:
        path = folder / name
        if path.exists() and not path.is_file():
            raise ValueError("something else in place of a file")


def load_into(saved: Saved, model: nn.Module, optimizer: Optimizer) -> None:
    """Load a checkpoint's tensors into model and optimizer, whose state is made already. Raises UserError for tensors
    that are not of this run: whoever changes a file can write its digest too.
    """
    file = adapter_files.adapter_file(saved.folder)
    if file is None:
        raise UserError(f"{saved.folder} holds no adapter", RESTART)
    adapter_files.load_tensors(model, file)
    moments = saved.folder / OPTIMIZER_FILE
    read_header(moments)
    tensors: Any = mx.load(str(moments))
    mx.eval(tensors)
    if _shapes(tensors) != _shapes(named(optimizer.state)):
        raise UserError(f"{moments} is not the optimizer's state of this run", RESTART)
    optimizer.state = tree_unflatten(list(tensors.items()))


def _shapes(arrays: dict[str, mx.array]) -> dict[str, tuple[Any, ...]]:
    """Shape and type of each array, by name."""
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


def folders(checkpoints: Path) -> list[Path]:
    """The folders of checkpoints, whole or not, the oldest first."""
    found = [path for path in checkpoints.glob("step-*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found)


def is_own_name(name: str) -> bool:
    """Whether a folder of ours among the checkpoints is called so."""
    return name == BEST or bool(STEP.fullmatch(name) or LEFT.fullmatch(name))


def remove_all(checkpoints: Path) -> None:
    """Remove the checkpoints and their folder, but for what others put into it."""
    if checkpoints.is_symlink() or not checkpoints.is_dir():
        return
    for path in checkpoints.iterdir():
        if is_own_name(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    if not contents(checkpoints):
        shutil.rmtree(checkpoints, ignore_errors=True)


def _remove_half_written(checkpoints: Path) -> None:
    for left in checkpoints.glob(".*"):
        if LEFT.fullmatch(left.name):
            shutil.rmtree(left)
