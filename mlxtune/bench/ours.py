"""Our own training step, measured on the first steps of a run's plan."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map

from mlxtune.bench import arithmetic
from mlxtune.bench.arithmetic import nbytes
from mlxtune.bench.figures import OURS, Measured
from mlxtune.bench.waits import waits
from mlxtune.compute import fast_ways
from mlxtune.config.resolve import Config
from mlxtune.data.dataset.batches import Batch
from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.train import optim
from mlxtune.train.preparation import prepare
from mlxtune.train.run_data import Data
from mlxtune.train.run_folder import RunFolder
from mlxtune.train.step import Job, StepFunction

UPDATES = 5  # counted ones; one before them warms up


def measure(settings: Config, data: Data, steps: int) -> Measured:
    """Train `steps` steps, as `mlxtune train` would with these settings."""
    job = _job(settings, data)
    dtype = getattr(mx, job.identity.config["train.dtype"])
    base_bytes = nbytes(job.model.parameters()) - nbytes(job.model.trainable_parameters())
    step = StepFunction(job, optim.build(job.section, job.model.trainable_parameters(), job.b_rate))
    timed = _timed(job, step, steps)
    batches, whole = list[Batch](), list[Batch]()
    for number in range(1, steps + 1):
        batches += job.plan.step(number)
        whole += job.plan.computed_whole().step(number)
    work = arithmetic.of(job.model, job.way, batches, whole)
    return Measured(
        OURS,
        rows=sum(len(batch.rows) for batch in batches),
        steps=steps,
        seconds=timed.seconds,
        tokens=work.tokens,
        supervised=work.supervised,
        padding=work.padded / work.tokens - 1,
        processed=work.processed,
        peak_bytes=timed.peak_bytes - base_bytes,
        base_bytes=base_bytes,
        device=arithmetic.device(dtype),
        head_saved=work.head_saved,
        prefix_saved=work.prefix_saved,
        through_head=work.through_head,
        utilisation=work.needed / timed.seconds / arithmetic.matmul_peak(dtype),
        computed=fast_ways.describe(job.way),
        update=steps * _update_seconds(step) / timed.seconds,
        waits=timed.waits / len(batches),
        queued=backend.policy().queued,
        first_seconds=timed.first_seconds,
        traced=step.traced,
    )


def _job(settings: Config, data: Data) -> Job:
    prepared = prepare(settings, data, RunFolder(Path()))
    if prepared.config.train != settings.train:
        raise UserError(
            "train.memory_limit makes this machine's batches smaller than those to measure",
            "Set train.memory_limit=off, or train.batch_rows and train.checkpoint_layers as a run would have them.",
        )
    return prepared.job


@dataclass(frozen=True)
class _Timed:
    """Some steps that were timed when everything was warm."""

    seconds: float  # of all of them
    peak_bytes: int  # of everything, the base and the warming up included
    waits: int  # for the device, of all steps
    first_seconds: float  # of the same steps the first time; 0: nothing is compiled here


def _timed(job: Job, step: StepFunction, steps: int) -> _Timed:
    numbers = range(1, steps + 1)
    longest = max(numbers, key=lambda number: max(batch.ids.size for batch in job.plan.step(number)))
    mx.clear_cache()
    mx.reset_peak_memory()
    first_seconds = 0.0
    if backend.policy().compiled:
        first_seconds = sum(step(number)["seconds"] for number in numbers)
        for number in numbers:  # what came once is compiled now
            step(number)
    else:
        step(longest)
    with waits() as waited:
        events = [step(number) for number in numbers]
    peak_bytes = mx.get_peak_memory()
    return _Timed(sum(event["seconds"] for event in events), peak_bytes, len(waited), first_seconds)


def _update_seconds(step: StepFunction) -> float:
    """Of the optimizer's update alone, the median; nothing is changed by it."""
    parameters = step.job.model.trainable_parameters()
    gradients = tree_map(mx.ones_like, parameters)
    mx.eval(gradients)
    seconds = []
    for _ in range(1 + UPDATES):
        began = time.perf_counter()
        mx.eval(step.update(gradients, parameters, 1, 1e-6))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
