"""What became of each run in a folder."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from mlxtune.train import events
from mlxtune.train.lock import is_locked
from mlxtune.train.session import CONFIG_FILE


@dataclass(frozen=True)
class Run:
    """state: running, finished, interrupted (by a signal, or because its GPU failed), failed, killed (it ended without
    a word), or unreadable (its events.jsonl is damaged); steps: of the whole plan, 0 unknown; best_loss: lowest
    validation loss; bytes: on the disk.
    """

    path: Path
    state: str
    step: int
    steps: int
    best_loss: float | None
    bytes: int
    model: str


def find(folder: Path) -> list[Run]:
    """The run that `folder` is, or those directly inside it, by name."""
    if (folder / CONFIG_FILE).is_file():
        return [_examined(folder)]
    return [_examined(file.parent) for file in sorted(folder.glob(f"*/{CONFIG_FILE}"))]


def _examined(run: Path) -> Run:
    try:
        return _read(run)
    except (KeyError, ValueError, OSError):
        return Run(run, "unreadable", 0, 0, None, _bytes(run), "")


def _read(run: Path) -> Run:
    happened = events.read(run) if (run / events.FILE).is_file() else []
    begun = next((event for event in reversed(happened) if event["kind"] == "begin"), {})
    last = happened[-1] if happened else {}
    state = "running" if is_locked(run) else str(last["state"]) if last.get("kind") == "end" else "killed"
    evaluated = [event["loss"] for event in happened if event["kind"] == "eval" and event["step"]]
    return Run(
        path=run,
        state=state,
        step=max((event["step"] for event in happened if event["kind"] == "train"), default=0),
        steps=begun.get("steps", 0),
        best_loss=min((loss for loss in evaluated if loss is not None), default=None),
        bytes=_bytes(run),
        model=Path(str(begun.get("model", ""))).name,
    )


def _bytes(run: Path) -> int:
    """Of all files that are there; a run in progress takes some away meanwhile."""
    total = 0
    for folder, _, names in os.walk(run):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total
