"""What became of each run in a folder."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from mlxtune.train import events
from mlxtune.train.run_folder import CONFIG_FILE, RunFolder


@dataclass(frozen=True)
class RunSummary:
    """One run, as its folder tells."""

    path: Path  # its folder
    # running; finished; interrupted (by a signal, or because its GPU failed); failed; killed (it ended without a word);
    # unreadable (its events.jsonl is damaged)
    state: str
    step: int  # the last one that was taken
    steps: int  # of the whole plan; 0: unknown
    best_loss: float | None  # the lowest validation loss after a step, nats a token; None: not evaluated
    bytes: int  # on the disk
    model: str  # the last part of its path; "": unknown


def find(folder: Path) -> list[RunSummary]:
    """The run that `folder` is, or those directly inside it, by name."""
    if RunFolder(folder).is_run():
        return [_summary(folder)]
    return [_summary(file.parent) for file in sorted(folder.glob(f"*/{CONFIG_FILE}"))]


def _summary(path: Path) -> RunSummary:
    try:
        return _read(path)
    except (KeyError, ValueError, OSError):
        return RunSummary(path, "unreadable", 0, 0, None, _bytes(path), "")


def _read(path: Path) -> RunSummary:
    run = RunFolder(path)
    happened = events.read(path) if run.events.is_file() else []
    begun: events.Event = {}  # the last `begin`: the plan may be another one where a run went on
    step, losses = 0, []
    for event in happened:
        if event["kind"] == "begin":
            begun = event
        elif event["kind"] == "train":
            step = max(step, event["step"])
        elif event["kind"] == "eval" and event["step"] and event["loss"] is not None:
            losses.append(event["loss"])
    return RunSummary(
        path=path,
        state=state_of(run, happened),
        step=step,
        steps=begun.get("steps", 0),
        best_loss=min(losses, default=None),
        bytes=_bytes(path),
        model=Path(str(begun.get("model", ""))).name,
    )


def state_of(run: RunFolder, happened: list[events.Event]) -> str:
    """`RunSummary.state` of a run whose events can be read. Whoever holds the lock runs, whatever an earlier process
    wrote. Raises KeyError for an end without a state.
    """
    if run.is_training():
        return "running"
    if happened and happened[-1]["kind"] == "end":
        return str(happened[-1]["state"])
    return "killed"


def _bytes(folder: Path) -> int:
    """Of all files that are there; a run in progress takes some away meanwhile."""
    total = 0
    for inside, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(inside, name)).st_size
    return total
