"""What became of each run in a folder."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from mlxtune.config.preference import OBJECTIVES
from mlxtune.train import events
from mlxtune.train.run_folder import CONFIG_FILE, RunFolder

SUPERVISED = "supervised"  # in place of an objective of preferences


@dataclass(frozen=True)
class RunSummary:
    """One run, as its folder tells."""

    path: Path  # its folder
    # running; finished; interrupted (by a signal, or because its GPU failed); failed; killed (it ended without a word);
    # unreadable (its events.jsonl is damaged)
    state: str
    step: int  # the last one that was taken
    steps: int  # of the whole plan; 0: unknown
    # The lowest validation loss after a step, None: not evaluated. In nats a token, of preferences a pair or rated row:
    # losses of different objectives are different things.
    best_loss: float | None
    bytes: int  # on the disk
    model: str  # the last part of its path; "": unknown
    objective: str  # as preference.loss; SUPERVISED: answers are learned as they are; "": unknown
    best_accuracy: float | None  # of preferences: the highest share of held-out rows after a step that are told apart


def find(folder: Path) -> list[RunSummary]:
    """The run that `folder` is, or those directly inside it, by name."""
    if RunFolder(folder).is_run():
        return [_summary(folder)]
    return [_summary(file.parent) for file in sorted(folder.glob(f"*/{CONFIG_FILE}"))]


def _summary(path: Path) -> RunSummary:
    try:
        return _read(path)
    except (KeyError, ValueError, OSError):
        return RunSummary(path, "unreadable", 0, 0, None, _bytes(path), "", "", None)


def _read(path: Path) -> RunSummary:
    run = RunFolder(path)
    happened = events.read(path) if run.events.is_file() else []
    begun: events.Event = {}  # the last `begin`: the plan may be another one where a run went on
    step, losses, accuracies = 0, list[float](), list[float]()
    for event in happened:
        if event["kind"] == "begin":
            begun = event
        elif event["kind"] == "train":
            step = max(step, event["step"])
        elif event["kind"] == "eval" and event["step"] and event["loss"] is not None:
            losses.append(event["loss"])
            if isinstance(event.get("accuracy"), float):
                accuracies.append(event["accuracy"])
    return RunSummary(
        path=path,
        state=state_of(run, happened),
        step=step,
        steps=begun.get("steps", 0),
        best_loss=min(losses, default=None),
        bytes=_bytes(path),
        model=Path(str(begun.get("model", ""))).name,
        objective=_objective(begun),
        best_accuracy=max(accuracies, default=None),
    )


def _objective(begun: events.Event) -> str:
    """Of the event `begin`; "": there is none, or somebody changed it."""
    if not begun:
        return ""
    noted = begun.get("preference")
    if noted is None:
        return SUPERVISED
    loss = noted.get("loss") if isinstance(noted, dict) else None
    return str(loss) if loss in OBJECTIVES else ""


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
