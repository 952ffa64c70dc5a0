"""Run folders that are written by hand: pages need no model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxtune.config import resolve
from mlxtune.train.run_folder import CONFIG_FILE, EVENTS_FILE


def event(step: int, loss: float | None = None, **fields: Any) -> dict[str, Any]:
    """An event of an optimizer step."""
    given: dict[str, Any] = {"kind": "train", "step": step, "loss": 3 / (1 + step) if loss is None else loss}
    given |= {"lr": 1e-4, "grad_norm": 1.0, "tokens": 512, "computed_tokens": 600, "supervised_tokens": 200}
    return given | {"seconds": 0.5, "peak_bytes": 2_000_000_000} | fields


def evaluated(step: int, loss: float | None, **fields: Any) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "loss": loss, "tokens": 900} | fields


def begun(steps: int = 20, model: str = "model", **fields: Any) -> dict[str, Any]:
    return {"kind": "begin", "step": 0, "steps": steps, "model": model, "computed": "the plain way"} | fields


def told(steps: int) -> list[dict[str, Any]]:
    """What a finished run of so many steps tells."""
    out = [begun(steps), evaluated(0, 3.5)]
    for step in range(1, steps + 1):
        out.append(event(step))
        if step % 5 == 0:
            out.append(evaluated(step, 3 / (1 + step) + 0.2))
    return [*out, {"kind": "end", "step": steps, "state": "finished"}]


def write(folder: Path, events: Iterable[dict[str, Any]], config: Mapping[str, Any] | None = None) -> Path:
    """A run's folder. config: values of its configuration by their dotted keys."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(resolve.load(None, (), config).to_yaml(), encoding="utf-8")
    (folder / EVENTS_FILE).write_text("")
    append(folder, *events)
    return folder


def append(folder: Path, *events: dict[str, Any]) -> None:
    with (folder / EVENTS_FILE).open("a", encoding="utf-8") as file:
        for one in events:
            file.write(json.dumps(one, ensure_ascii=False) + "\n")
