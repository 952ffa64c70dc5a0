"""How long the parts of a training step take here, on a model of a size that shows them. Nothing judges these."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import numpy as np

from mlxtune.compute.gradients import Gradients
from mlxtune.config import resolve
from mlxtune.data.dataset.batches import Batch
from mlxtune.machine import backend
from mlxtune.selftest import model, runs
from mlxtune.selftest.outcome import Check, Found, NotHere, Workshop
from mlxtune.train import optim
from mlxtune.train.preparation import prepare
from mlxtune.train.run_data import read_data
from mlxtune.train.run_folder import RunFolder
from mlxtune.train.step import Job, StepFunction

GROUP = "Time"
TIMES, WARM = 7, 3  # counted calls, and calls before them: on a GPU one of these compiles
QUICK = 200  # calls of what takes microseconds
OPERATIONS = 100
# (width, blocks, vocabulary) and rows of a batch: on a GPU large enough that it is not all waiting.
CPU_SHAPE, CPU_ROWS = (128, 2, 8192), 4
GPU_SHAPE, GPU_ROWS = (512, 8, 16384), 8


def checks() -> list[Check]:
    parts: dict[str, Callable[[Workshop], Found]] = {
        "step: trunk, forward and backward": partial(_part, "trunk"),
        "step: head and loss": partial(_part, "head"),
        "step: optimizer, clipping": partial(_part, "optimizer"),
        "compiling one shape of a batch": _compiling,
        "one synchronisation": _synchronising,
        "one operation more": _dispatching,
    }
    return [Check(GROUP, name, run) for name, run in parts.items()]


@dataclass(frozen=True)
class Parts:
    """How long the parts of one training step take."""

    trunk: float  # seconds
    head: float  # seconds, with the loss
    optimizer: float  # seconds, with clipping
    first: list[float]  # seconds beyond those of a warm call, of each call before those that count
    what: str  # the model and the batch, in words


def _part(name: str, shop: Workshop) -> Found:
    parts = shop.once("parts", lambda: _measured(shop))
    return Found(1e3 * getattr(parts, name), unit="ms", said=parts.what if name == "trunk" else "")


def _measured(shop: Workshop) -> Parts:
    """The head is what a batch takes beyond the same batch with a single target in each row, the optimizer what a step
    takes beyond its batch. The fastest of several calls, in turns: other programs disturb them all alike.
    """
    job, what = _job(shop)
    (batch,) = job.plan.step(1)
    gradients = Gradients(job.model, job.way)
    step = StepFunction(job, optim.build(job.section, job.model.trainable_parameters(), job.b_rate))
    works = (
        partial(_called, gradients, _one_target_each(batch)),
        partial(_called, gradients, batch),
        partial(step, 1),
    )
    first = [[_time(work) for work in works] for _ in range(WARM)]
    counted = [[_time(work) for work in works] for _ in range(TIMES)]
    # The fastest call of each work.
    trunk, batch_seconds, step_seconds = (min(times) for times in zip(*counted, strict=True))
    return Parts(
        trunk=trunk,
        head=max(0.0, batch_seconds - trunk),
        optimizer=max(0.0, step_seconds - batch_seconds),
        first=[times[1] - batch_seconds for times in first],
        what=what,
    )


def _called(gradients: Gradients, batch: Batch) -> None:
    value, found = gradients(batch)
    mx.eval(value, found)


def _job(shop: Workshop) -> tuple[Job, str]:
    width, blocks, vocabulary = CPU_SHAPE if backend.kind() == "cpu" else GPU_SHAPE
    rows = CPU_ROWS if backend.kind() == "cpu" else GPU_ROWS
    folder = shop.folder / "larger"
    changes = {
        "hidden_size": width,
        "intermediate_size": 11 * width // 4,
        "num_hidden_layers": blocks,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128,
        "vocab_size": vocabulary,
    }
    model.save(folder / "hf", mx.bfloat16, **changes)
    runs.convert_base(folder / "hf", folder / "model")
    settings = (
        "train.steps=1",
        f"train.batch_rows={rows}",
        "data.cache=off",
        "train.memory_limit=off",
    )
    flags = {"model.path": str(folder / "model"), "data.path": str(runs.data(shop))}
    data, wanted = read_data(resolve.load(None, settings, flags))
    job = prepare(wanted, data, RunFolder(shop.folder)).job
    tokens = sum(batch.tokens for batch in job.plan.step(1))
    where = job.identity.config["train.dtype"]
    return job, f"{tokens} tokens through {blocks} blocks {width} wide, {vocabulary:,} words, {where}"


def _one_target_each(batch: Batch) -> Batch:
    mask = np.zeros_like(batch.mask)
    mask[np.arange(len(mask)), 1 + batch.mask[:, 1:].argmax(axis=1)] = 1
    return replace(batch, mask=mask)


def _compiling(shop: Workshop) -> Found:
    if not backend.policy().compiled:
        raise NotHere("nothing is compiled on the CPU" if backend.kind() == "cpu" else "MLX_DISABLE_COMPILE is set")
    return Found(1e3 * max(shop.once("parts", lambda: _measured(shop)).first), unit="ms")


def _synchronising(_: Workshop) -> Found:
    """From asking for one small sum to its number."""
    array = mx.array(1.0)
    mx.eval(array)
    times = [_time(lambda: (array + 1).item()) for _ in range(QUICK)]
    return Found(1e6 * statistics.median(times), unit="us")


def _dispatching(_: Workshop) -> Found:
    """What one more in a row of small operations adds."""
    array = mx.zeros((64,))
    mx.eval(array)

    def work(operations: int) -> None:
        out = array
        for _ in range(operations):
            out = mx.sin(out)
        mx.eval(out)

    times = [_time(partial(work, 2 * OPERATIONS)) - _time(partial(work, OPERATIONS)) for _ in range(QUICK // 4)]
    return Found(1e6 * statistics.median(times) / OPERATIONS, unit="us")


def _time(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
