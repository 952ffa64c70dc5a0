"""The error that ends a run when the device failed: what happened, what was saved, how to go on."""

from __future__ import annotations

from pathlib import Path

from mlxtune.config.schema import TrainSection
from mlxtune.data.dataset.batches import DEFAULT_ROWS
from mlxtune.errors import UserError
from mlxtune.machine.gpu_errors import ADVICE, DISPLAY, Failure, Kind

CLOSE = "Close programs that hold memory"


def of_one(failure: Failure, step: int, section: TrainSection, run: Path, in_step: bool) -> UserError:
    """Of the process that writes the run. step: the last whole one, which is saved unless it is 0; in_step: whether a
    step failed, and not what happens between two.
    """
    if not step:
        return UserError(f"{failure}; no step was finished, so nothing is saved", _anew(failure, section, in_step))
    return UserError(f"{failure}; step {step}, the last whole one, is saved", _again(failure, section, run, in_step))


def of_many(failure: Failure, processes: int, run: Path) -> UserError:
    """Of another process of a run of several: it writes nothing."""
    return UserError(
        f"{failure}; the run of {processes} processes ends",
        f"The first one saves its last whole step. To go on, with any number of processes: --resume --out {run}",
    )


def _anew(failure: Failure, section: TrainSection, in_step: bool) -> str:
    """What to do where the run must begin anew."""
    if not failure.of_memory:
        return ADVICE[failure.kind]
    less = ["a lower data.max_tokens"]
    if in_step:
        less = [f"--set {setting}" for setting in _smaller(section)] + less
    return f"{CLOSE}, or begin with {', '.join(less)}."


def _smaller(section: TrainSection) -> list[str]:
    """Settings that are not made yet, with which steps need less memory."""
    settings = []
    if section.on_oom == "stop":
        settings.append("train.on_oom=smaller")
    if section.checkpoint_layers not in ("all", "pieces", "nested", 1):
        settings.append("train.checkpoint_layers=all")
    rows = section.batch_rows
    if rows is None and not section.batch_tokens:
        rows = DEFAULT_ROWS
    if rows is not None and rows > 1:
        settings.append("train.batch_rows=1")
    return settings


def _again(failure: Failure, section: TrainSection, run: Path, in_step: bool) -> str:
    """What to do where the run can be resumed."""
    resume = f"mlxtune train --resume --out {run}"
    if failure.of_memory and in_step and section.on_oom == "stop":
        smaller = f"mlxtune train --resume-anyway --out {run} --set train.on_oom=smaller"
        return f"To go on in smaller parts: {smaller}; or close programs that hold memory and go on as before: {resume}"
    first = "To go on"
    if failure.of_memory:
        first = f"{CLOSE}, and go on"
    elif failure.kind == Kind.WATCHDOG:
        first = f"{DISPLAY}, and go on"
    elif failure.kind == Kind.TIMEOUT:
        first = "Close what else uses the GPU, and go on"
    elif failure.kind == Kind.BUFFERS:
        first = "To go on, with none of them taken"
    then = "; if it fails again, restart the machine" if failure.final else ""
    return f"{first}: {resume}{then}"
