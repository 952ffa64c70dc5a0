"""Short runs on the tiny model, and how two of them are compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from rich.console import Console

from mlxtune.cli.display import Display
from mlxtune.compute.gradients import Gradients
from mlxtune.config import resolve
from mlxtune.data.dataset.batches import Batch
from mlxtune.train import checkpoint, events, step
from mlxtune.train.run import tune as train

SETTINGS = (
    *("train.steps=24", "train.lr=5e-3", "train.batch_rows=2", "train.accumulate=2", "train.seed=5"),
    *("train.eval_every=4", "train.save_every=2", "train.keep_last=3", "lora.rank=4"),
)
NOISE = ("lora.dropout=0.2", "train.neftune_alpha=5", "train.epochs=3")  # 24 rows: 18 steps


def options(model: Path, data: Path, out: Path, *settings: str) -> list[str]:
    chosen = [setting for setting in SETTINGS if not ("epochs" in str(settings) and "steps" in setting)]
    flags = ["--model", model, "--data", data, "--out", out]
    return ["train", *map(str, flags), *(word for setting in (*chosen, *settings) for word in ("--set", setting))]


def tune(model: Path, data: Path, out: Path, *settings: str, resume: bool = False, anyway: bool = False) -> list[dict]:
    """Train in this process; return the run's events."""
    flags = {"model.path": str(model), "data.path": str(data)}
    with Display(Console(quiet=True)) as display:
        train(resolve.load(None, (*SETTINGS, *settings), flags), out, display, resume, anyway)
    return events.read(out)


def losses(run: Path) -> dict[tuple[str, int], float]:
    """Training and validation losses by step, the ones that count."""
    return {(e["kind"], e["step"]): e["loss"] for e in events.read(run) if e["kind"] in ("train", "eval")}


def tensors(file: Path) -> dict[str, bytes]:
    return {name: np.array(array).tobytes() for name, array in mx.load(str(file)).items()}  # type: ignore[union-attr]


def arrays_in(tree: Any) -> list[mx.array]:
    """The arrays of any tree, in its order."""
    return [leaf for _, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)]


def same_bits(one: Path, other: Path) -> None:
    """Adapter, newest optimizer state and every loss of two runs."""
    assert (one / "adapters.safetensors").read_bytes() == (other / "adapters.safetensors").read_bytes()
    newest = [sorted((run / "checkpoints").glob("step-*"))[-1] for run in (one, other)]
    assert newest[0].name == newest[1].name
    states = [tensors(folder / checkpoint.OPTIMIZER_FILE) for folder in newest]
    assert states[0] == states[1]
    assert losses(one) == losses(other)


def scale_losses(patch: pytest.MonkeyPatch, factor: Callable[[int], float]) -> None:
    """Multiply the loss and gradients of a run's n-th micro-batch, counted from 1, by factor(n)."""

    class Scaled(Gradients):
        count = 0

        def __call__(self, batch: Batch) -> tuple[mx.array, Any]:
            self.count += 1
            by = factor(self.count)
            value, gradients = super().__call__(batch)
            return value * by, tree_map(lambda gradient: gradient * by, gradients)

    patch.setattr(step, "Gradients", Scaled)
