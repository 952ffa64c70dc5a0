"""Runs on the tiny model, as `mlxtune train` does them: against the CPU, and taken up again at a checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.adapter import adapter_files
from mlxtune.compute import fast_ways
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.config import resolve as config
from mlxtune.machine import backend
from mlxtune.model import convert
from mlxtune.model.arrays import dtype_name, to_numpy
from mlxtune.selftest import model
from mlxtune.selftest.outcome import Check, Found, Workshop
from mlxtune.selftest.ways import BASES
from mlxtune.train import checkpoint, events
from mlxtune.train.run import tune
from mlxtune.train.run_folder import CHECKPOINTS

GROUP = "Training"
STEPS, SAVED = 20, 10
SETTINGS = (
    *(f"train.steps={STEPS}", "train.lr=2e-3", "train.warmup_steps=2", "train.batch_rows=2", "train.accumulate=2"),
    *(f"train.save_every={SAVED}", "train.eval_every=0", "train.keep=last", f"lora.rank={model.RANK}"),
    *("data.cache=off", "train.keep_awake=off"),
)
PLAIN = ("fast.head=off", "fast.prefix=off", "train.dtype=float32")
# How far a loss may be off, relative: what rounding makes on a CPU (3e-6, 3e-4, 4e-3), about ten times over.
LIMITS = {mx.float32: 1e-4, mx.float16: 5e-3, mx.bfloat16: 4e-2}


def checks() -> list[Check]:
    steps = [
        Check(GROUP, f"{STEPS} steps, {dtype_name(dtype)}, against the CPU", partial(_steps, dtype)) for dtype in LIMITS
    ]
    return [*steps, Check(GROUP, "checkpoint and resume", _resumed)]


@dataclass(frozen=True)
class Made:
    """A finished run."""

    base: Path  # folder of the model that it was trained on
    folder: Path  # what the run left
    config: config.Config  # the run's, as it was resolved


def base(shop: Workshop, dtype: mx.Dtype) -> Path:
    """The tiny model in 4 bits, its scales in `dtype`, as `mlxtune convert` makes it."""

    def make() -> Path:
        source, out = (shop.folder / f"{kind}-{dtype_name(dtype)}" for kind in ("hf", "model"))
        model.save(source, dtype)
        convert_base(source, out)
        return out

    made: Path = shop.once(("base", dtype), make)
    return made


def convert_base(source: Path, out: Path) -> None:
    convert.convert(str(source), out, convert.Quantization.of(model.BITS, model.GROUP_SIZE, None))


def data(shop: Workshop) -> Path:
    def make() -> Path:
        model.save_data(shop.folder / "data")
        return shop.folder / "data"

    made: Path = shop.once("data", make)
    return made


def run(shop: Workshop, dtype: mx.Dtype, *settings: str) -> Made:
    """A finished run on the base for `dtype`; once for the same settings."""

    def make() -> Made:
        flags = {"model.path": str(base(shop, BASES[dtype])), "data.path": str(data(shop))}
        wanted = config.load(None, (*SETTINGS, f"train.dtype={dtype_name(dtype)}", *settings), flags)
        out = shop.folder / f"run-{dtype_name(dtype)}-{len(settings)}-{backend.kind()}"
        tune(wanted, out)
        return Made(Path(wanted.model.path), out, wanted)

    made: Made = shop.once(("run", dtype, settings, backend.kind()), make)
    return made


def _reference(shop: Workshop, dtype: mx.Dtype) -> Made:
    """The plain way in float32 on the CPU, on the base that is run in `dtype`."""
    shared = next(first for first in LIMITS if BASES[first] == BASES[dtype])
    base(shop, BASES[dtype])  # converted on this device
    with model.computing_on_cpu():
        return run(shop, shared, *PLAIN)


def _steps(dtype: mx.Dtype, shop: Workshop) -> Found:
    own, other = run(shop, dtype), _reference(shop, dtype)
    ours, theirs = (_losses(made.folder) for made in (own, other))
    off = np.abs(ours - theirs) / theirs
    worst = int(off.argmax()) if np.isfinite(off).all() else int(np.isnan(off).argmax())
    said = f"step {worst + 1}: {ours[worst]:.4f}, on the CPU {theirs[worst]:.4f}; {_computed(own.folder)}"
    return Found(float(off[worst]), LIMITS[dtype], said=said, wrong=_left_out(own.folder))


def _losses(folder: Path) -> np.ndarray:
    return np.array([event["loss"] for event in events.read(folder) if event["kind"] == "train"])


def _notes(folder: Path) -> list[str]:
    return [event["text"] for event in events.read(folder) if event["kind"] == "note"]


def _computed(folder: Path) -> str:
    return next((note for note in _notes(folder) if note.startswith("computed: ")), "")


def _left_out(folder: Path) -> str:
    """What a run on this model should have used, and found wrong itself: it proves each way before it takes it."""
    wanted = [fast_ways.describe(Way(split=Split(nn.Module(), ""))), "the shared prefix of "]
    if backend.policy().compiled:
        wanted.append(fast_ways.describe(Way(compiled=True)))
    missing = [what for what in wanted if what not in _computed(folder)]
    refused = next((note for note in _notes(folder) if note.startswith("not used")), "")
    return refused or (f"the run did not use: {', '.join(missing)}" if missing else "")


def usual(shop: Workshop) -> Made:
    """The run in the type that such a model is trained in on this device."""
    return run(shop, backend.dtype_for("auto", BASES[mx.bfloat16], True))


def _resumed(shop: Workshop) -> Found:
    """The same run taken up again at its first checkpoint: adapter, moments and losses bit for bit."""
    whole = usual(shop)
    again = shop.folder / "resumed"
    shutil.copytree(whole.folder, again)
    shutil.rmtree(again / CHECKPOINTS / f"step-{STEPS:07d}")
    (again / adapter_files.ADAPTER_FILE).unlink()
    tune(whole.config, again, resume=True)
    last = Path(CHECKPOINTS, f"step-{STEPS:07d}", checkpoint.OPTIMIZER_FILE)
    different = [
        f"{name} of {file.name}"
        for file in (Path(adapter_files.ADAPTER_FILE), last)
        for name in _different(whole.folder / file, again / file)
    ]
    ours, theirs = (_losses(folder).tolist() for folder in (again, whole.folder))
    different += [f"the loss of step {at + 1}" for at in range(STEPS) if ours[at : at + 1] != theirs[at : at + 1]]
    said = f"resumed after step {SAVED}: " + (f"{different[0]} differs" if different else "the same bits")
    return Found(len(different), 0, "different", said)


def _different(one: Path, other: Path) -> list[str]:
    ours, theirs = (_bits(file) for file in (one, other))
    return [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]


def _bits(file: Path) -> dict[str, bytes]:
    tensors: Any = mx.load(str(file))
    return {name: to_numpy(array).tobytes() for name, array in tensors.items()}
