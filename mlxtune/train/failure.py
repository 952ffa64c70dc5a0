"""What a run says when the device failed under it: what happened, what was saved, how to go on."""

from __future__ import annotations

from pathlib import Path

from mlxtune.config.schema import TrainSection
from mlxtune.data.dataset.batches import DEFAULT_ROWS
from mlxtune.errors import UserError
from mlxtune.machine.gpu_errors import ADVICE, DISPLAY, Failure, Kind

CLOSE = "Close programs that hold memory"


def told(failure: Failure, step: int, section: TrainSection, run: Path, in_step: bool) -> UserError:
    """The one line, and what to do. step: the last whole one, which is saved unless it is 0; in_step: whether a step
    failed, and not what happens between two.
    """
    if not step:
        return UserError(f"{failure}; no step was finished, so nothing is saved", _anew(failure, section, in_step))
    return UserError(f"{failure}; step {step}, the last whole one, is saved", _again(failure, section, run, in_step))


def told_of_many(failure: Failure, processes: int, run: Path) -> UserError:
    """The same on a process that writes nothing."""
    return UserError(
        f"{failure}; the run of {processes} processes ends",
        f"The first one saves its last whole step. To go on, with any number of processes: --resume --out {run}",
    )


def _anew(failure: Failure, section: TrainSection, in_step: bool) -> str:
    if not failure.of_memory:
        return ADVICE[failure.kind]
    smaller = [f"--set {setting}" for setting in _smaller(section)] if in_step else []
    return f"{CLOSE}, or begin with {', '.join([*smaller, 'a lower data.max_tokens'])}."


def _smaller(section: TrainSection) -> list[str]:
    """Settings that are not made yet, with which steps need less memory."""
    out = ["train.on_oom=smaller"] if section.on_oom == "stop" else []
    out += ["train.checkpoint_layers=all"] if section.checkpoint_layers not in ("all", 1) else []
    rows = section.batch_rows or (None if section.batch_tokens else DEFAULT_ROWS)
    return [*out, *(["train.batch_rows=1"] if rows and rows > 1 else [])]


def _again(failure: Failure, section: TrainSection, run: Path, in_step: bool) -> str:
    resume = f"mlxtune train --resume --out {run}"
    if failure.of_memory and in_step and section.on_oom == "stop":
        smaller = f"mlxtune train --resume-anyway --out {run} --set train.on_oom=smaller"
        return f"To go on in smaller parts: {smaller}; or close programs that hold memory and go on as before: {resume}"
    first = {
        Kind.WATCHDOG: f"{DISPLAY}, and go on",
        Kind.TIMEOUT: "Close what else uses the GPU, and go on",
        Kind.BUFFERS: "To go on, with none of them taken",
    }
    todo = f"{CLOSE}, and go on" if failure.of_memory else first.get(failure.kind, "To go on")
    return f"{todo}: {resume}" + ("; if it fails again, restart the machine" if failure.final else "")
