"""Rows of preferences, and short runs on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import tiny
import training
from rich.console import Console

from mlxtune.cli.display import Display
from mlxtune.config import resolve
from mlxtune.train import events
from mlxtune.train.preference.reference_file import FACTS
from mlxtune.train.run import tune as train
from mlxtune.train.run_folder import REFERENCE_FILE

SETTINGS = (
    *("train.lr=5e-3", "train.warmup_steps=0", "train.schedule=constant", "train.eval_every=0", "train.save_every=0"),
    *("train.batch_rows=2", "train.accumulate=2", "lora.rank=4", "train.report=off", "train.seed=5"),
)
NUMBERS = ("loss", "margin", "accuracy", "reward_chosen", "reward_rejected", "drift", "baseline", "grad_norm")


def pairs(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Each with another question; the chosen answer is the shorter one of every second pair."""
    rows = []
    for number in range(first, first + count):
        short, long = f"It is {number}.", f"I think that it may be {number}, " + "or not" * (1 + number % 3)
        chosen, rejected = (short, long) if number % 2 else (long + "!", short + "?")
        rows.append({"prompt": f"Which number is {number}?", "chosen": chosen, "rejected": rejected})
    return rows


def rated(count: int, first: int = 0) -> list[dict[str, Any]]:
    rows = []
    for row in pairs(count, first):
        good = len(rows) % 3 > 0
        rows.append({"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good})
    return rows


def write(folder: Path, train: Sequence[Any], valid: Sequence[Any]) -> Path:
    """A data folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_jsonl(folder / "train.jsonl", list(train))
    tiny.write_jsonl(folder / "valid.jsonl", list(valid))
    return folder


def options(model: Path, data: Path, out: Path, *settings: str) -> list[str]:
    """A command that trains on preferences."""
    flags = ["train", "--model", str(model), "--data", str(data), "--out", str(out)]
    return [*flags, *(word for setting in (*SETTINGS, *settings) for word in ("--set", setting))]


def tune(model: Path, data: Path, out: Path, *settings: str, resume: bool = False, anyway: bool = False) -> list[dict]:
    """Train in this process; return the run's events."""
    flags = {"model.path": str(model), "data.path": str(data)}
    with Display(Console(quiet=True)) as display:
        train(resolve.load(None, (*SETTINGS, *settings), flags), out, display, resume, anyway)
    return events.read(out)


def of_kind(found: list[dict], kind: str) -> list[dict]:
    return [event for event in found if event["kind"] == kind]


def numbers(found: list[dict]) -> list[list[float]]:
    """Those of each step."""
    return [[event[name] for name in NUMBERS if name in event] for event in of_kind(found, "train")]


def reference(run: Path) -> dict[str, bytes]:
    """What a run keeps of its reference."""
    return training.tensors(run / REFERENCE_FILE)


def values(run: Path) -> dict[str, Any]:
    """The same as numbers, [A] each."""
    found: Any = mx.load(str(run / REFERENCE_FILE))
    return {name: np.array(array) for name, array in found.items() if name != FACTS}
