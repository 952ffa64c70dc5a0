"""Speed and memory of a training step on this machine, alone or against mlx-lm's own trainer.

Every measurement is a child process that trains on the same rows and prints one JSON line; competitors take turns, so
that a machine's moods fall on both. mlx-lm runs as its own command runs it (its batches, its padding, its loss, MLX's
own limits of memory and cache, TF32 where MLX uses it), with our rank, targets, activation type, BLAS, compile setting
and watchdog variable. What warms up is not counted: one step, or where steps are compiled all of them, as often as it
takes until nothing is compiled any more; what the first time took is told apart.

Legend: D width, V vocabulary.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_map

from mlxtune.adapter.layers import LINEAR, SWITCH, dense_shape
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.compute import fast_ways, prefix
from mlxtune.compute.loss import Way
from mlxtune.config import resolve
from mlxtune.config.resolve import Config
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import DEFAULT_ROWS, Batch, Plan
from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.machine.gpu_errors import recognise
from mlxtune.model.arrays import dtype_name, named, scalar
from mlxtune.model.load import load
from mlxtune.train import optim, session, tuning
from mlxtune.train.step import StepFunction

OURS, THEIRS, CHECKPOINTED = "mlxtune", "mlx-lm", "mlx-lm-checkpointed"  # mlx-lm's default is not to checkpoint
REFUSED = 2  # a child's exit status that says what is wrong


@dataclass(frozen=True)
class Measured:
    """One child's figures. rows: examples trained on, of which a row of the data may give several (unit: what to call
    one); seconds: of the counted steps; tokens: real ones, padding apart; processed: those through the trunk;
    peak_bytes: over the model's own; head_saved, prefix_saved: share of the plain way's arithmetic left out;
    utilisation: needed arithmetic per second over that of a large matrix product.
    update: share of the seconds that the optimizer's update takes when it is computed alone; waits: for the device, in
    each micro-batch of a step, the update's among them; queued: the parts of a step are handed to the device without
    waiting for each (`backend.Policy`); first_seconds: of the same steps the first time, kernels and graphs being
    compiled, 0: nothing is compiled here; traced: graphs compiled until all steps were warm. limits: whose limits of
    MLX's memory and cache held.
    """

    who: str
    rows: int
    steps: int
    seconds: float
    tokens: int
    supervised: int
    processed: int
    padding: float
    peak_bytes: int
    base_bytes: int
    device: str
    head_saved: float = 0.0
    prefix_saved: float = 0.0
    utilisation: float = 0.0
    computed: str = ""
    unit: str = "row"
    update: float = 0.0
    waits: float = 0.0
    queued: bool = False
    first_seconds: float = 0.0
    traced: int = 0
    limits: str = OURS

    @property
    def seconds_per_row(self) -> float:
        return self.seconds / self.rows


def measure(settings: Config, rows: int, who: str) -> Measured:
    """Run one competitor in a child process. Raises UserError with what it says, or its last line, when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.yaml"
        file.write_text(session.anchored(settings).to_yaml(), encoding="utf-8")
        command = [sys.executable, "-m", "mlxtune.bench", who, str(file), str(rows)]
        theirs = {} if who == OURS else backend.as_without_mlxtune()
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **theirs})
    if done.returncode == REFUSED:
        error, hint = json.loads(done.stdout.strip().splitlines()[-1])
        raise UserError(f"the measurement of {who} failed: {error}", hint)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise UserError(f"the measurement of {who} failed: {lines[-1] if lines else 'no reason given'}")
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


def compare(
    settings: Config, rows: int, pairs: int, said: Callable[[str], None], other: str = THEIRS
) -> tuple[list[Measured], Any]:
    """(all measurements, the ratio of median seconds per row with its spread) of alternating pairs."""
    found: list[Measured] = []
    for number in range(pairs):
        for who in (OURS, other)[:: 1 if number % 2 == 0 else -1]:
            found.append(measure(settings, rows, who))
            said(f"pair {number + 1}/{pairs}: {who} {found[-1].seconds_per_row:.3f} s per {found[-1].unit}")
    ours, theirs = ([m.seconds_per_row for m in found if m.who == who] for who in (OURS, other))
    single = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    peaks = [[m.peak_bytes for m in found if m.who == who] for who in (OURS, other)]
    return found, {
        "time": statistics.median(ours) / statistics.median(theirs),
        "time_lowest": single[0],
        "time_highest": single[-1],
        "peak": statistics.median(peaks[0]) / statistics.median(peaks[1]),
        "pairs": pairs,
    }


def _child(who: str, file: str, count: int) -> Measured:
    """The rows are those of the first steps of our plan for the whole data: batched as in a real run."""
    settings = resolve.load(file)
    fast_ways.refuse_idle(settings)
    data, settings = session.read_data(settings)
    plan = Plan(data.train, settings.train, settings.data.group_by_prefix)
    rows, steps = 0, 0
    batches: list[Batch] = []
    while rows < count and steps < plan.steps:
        steps += 1
        rows += len(plan.rows_of_step(steps))
        batches += plan.step(steps)
    chosen = [index for batch in batches for index in batch.rows.tolist()]
    size = settings.train.batch_rows or DEFAULT_ROWS
    if settings.train.batch_tokens:
        size = max(1, len(chosen) // len(batches))
    if len(chosen) < 2 * size:
        raise UserError(f"{settings.data.path}: {rows} usable rows are too few to measure with")
    unit = "row" if plan.rows == len(plan.examples) else "example"
    if who == OURS:
        return replace(_ours(settings, data, steps), unit=unit)
    return replace(_theirs(who, settings, [plan.examples[index] for index in sorted(set(chosen))], size), unit=unit)


def _ours(settings: Config, data: session.Data, steps: int) -> Measured:
    job, fitted, *_ = tuning.prepared(settings, data, Path())
    if fitted.train != settings.train:
        raise UserError(
            "train.memory_limit makes this machine's batches smaller than those to measure",
            "Set train.memory_limit=off, or train.batch_rows and train.checkpoint_layers as a run would have them.",
        )
    plan, way, dtype = job.plan, job.way, getattr(mx, job.identity.config["train.dtype"])
    base = _bytes(job.model.parameters()) - _bytes(job.model.trainable_parameters())
    step = StepFunction(job, optim.build(job.section, job.model.trainable_parameters()))
    batches = [batch for number in range(1, steps + 1) for batch in plan.step(number)]
    longest = max(range(1, steps + 1), key=lambda number: max(batch.ids.size for batch in plan.step(number)))
    mx.clear_cache()
    mx.reset_peak_memory()
    first = 0.0
    if backend.compiles():
        first = sum(step(number)["seconds"] for number in range(1, steps + 1))
        for number in range(1, steps + 1):  # what came once is compiled now
            step(number)
    else:
        step(longest)
    with waits() as waited:
        events = [step(number) for number in range(1, steps + 1)]
    peak = mx.get_peak_memory()
    seconds = sum(event["seconds"] for event in events)
    lengths = [0 if way.prefix is None else prefix.usable(batch, way.prefix) for batch in batches]
    saved = sum(length * (len(batch.rows) - 1) for length, batch in zip(lengths, batches, strict=True))
    padded = sum(batch.ids.size - len(batch.rows) for batch in batches)
    trunk, head = _elements(job.model, way)
    supervised = sum(batch.targets for batch in batches)
    plain = padded * (trunk + head)
    needed = (padded - saved) * trunk + (supervised if way.split else padded) * head
    return Measured(
        OURS,
        rows=sum(len(batch.rows) for batch in batches),
        steps=steps,
        seconds=seconds,
        tokens=sum(batch.tokens - len(batch.rows) for batch in batches),
        supervised=supervised,
        padding=padded / sum(batch.tokens - len(batch.rows) for batch in batches) - 1,
        processed=padded - saved,
        peak_bytes=peak - base,
        base_bytes=base,
        device=_device(dtype),
        head_saved=(padded - supervised) * head / plain if way.split else 0.0,
        prefix_saved=saved * trunk / plain,
        utilisation=4 * needed / seconds / _matmul_peak(dtype),
        computed=fast_ways.describe(way),
        update=steps * _update_seconds(step) / seconds,
        waits=len(waited) / len(batches),
        queued=backend.policy().queued,
        first_seconds=first,
        traced=step.traced,
    )


WAITING = ("item", "tolist", "__array__", "__bool__", "__float__", "__int__", "__index__")  # of mx.array


@contextmanager
def waits() -> Iterator[list[str]]:
    """Inside, the list grows by the name of every call that waits for the device: evaluations, and what reads an array
    into Python. numpy reads through a buffer, so np.array and np.asarray of an mx.array are watched themselves.
    """
    found: list[str] = []

    def watched(name: str, call: Callable[..., Any], counts: Callable[..., bool]) -> Callable[..., Any]:
        def watching(*args: Any, **kwargs: Any) -> Any:
            found.extend([name] if counts(*args) else [])
            return call(*args, **kwargs)

        return watching

    of_array = [(mx.array, name, lambda *args: True) for name in WAITING if hasattr(mx.array, name)]
    of_numpy = [(np, name, lambda *args: isinstance(args[0], mx.array)) for name in ("array", "asarray")]
    places = [(mx, "eval", lambda *args: True), (mx, "synchronize", lambda *args: True), *of_array, *of_numpy]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for (owner, name, counts), (*_, call) in zip(places, before, strict=True):
        setattr(owner, name, watched(name, call, counts))
    try:
        yield found
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)


def _update_seconds(step: StepFunction) -> float:
    """Of the optimizer's update alone, the median of five; nothing is changed by it."""
    parameters = step.job.model.trainable_parameters()
    gradients = tree_map(mx.ones_like, parameters)
    mx.eval(gradients)
    taken = []
    for _ in range(6):
        began = time.perf_counter()
        mx.eval(step.update(gradients, parameters, 1, 1e-6))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def _mlx_limits() -> tuple[int, int]:
    """MLX's limits of memory and cache, in bytes."""
    found = mx.set_memory_limit(1 << 40), mx.set_cache_limit(1 << 40)
    _set_limits(found)
    return found


def _set_limits(limits: tuple[int, int]) -> None:
    mx.set_memory_limit(limits[0])
    mx.set_cache_limit(limits[1])


def _theirs(who: str, settings: Config, examples: list[Example], rows: int) -> Measured:
    """mlx-lm's trainer with the loss on answers only, its batches in its own order, every batch once."""
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.utils import linear_to_lora_layers

    limits = _mlx_limits()  # which loading changes; how much is wired mlx-lm's trainer says itself
    loaded = load(settings.model.path, settings.train.dtype, as_mlx_lm=True)
    _set_limits(limits)
    base = _bytes(loaded.model.parameters())
    plan = AdapterPlan.of(loaded.model, settings.lora)
    if plan.last_blocks is None:
        raise UserError(
            "lora.ranks: mlx-lm's trainer has one rank for all layers", "Leave out --against, or lora.ranks."
        )
    loaded.model.freeze()
    own = plan.config
    parameters = {"rank": own.rank, "scale": own.scale, "dropout": own.dropout, "keys": list(own.keys)}
    linear_to_lora_layers(loaded.model, own.num_layers, parameters)
    seen: list[Any] = []

    class Rows:
        def __len__(self) -> int:
            return len(examples)

        def __getitem__(self, index: int) -> dict[str, Example]:
            return {"row": examples[index]}

        def process(self, row: dict[str, Example]) -> tuple[list[int], int]:
            example = row["row"]
            return list(example.ids), list(example.mask).index(1)

    def warmed(**options: Any) -> Iterator[Any]:
        found = list(trainer.iterate_batches(**{**options, "loop": False}))
        seen.extend(found)
        yield from found if backend.compiles() else [max(found, key=lambda batch: batch[0].size)]
        yield from found

    class Clock(TrainingCallback):
        seconds: list[float] = []  # noqa: RUF012  # one per child process

        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            self.seconds.append(1 / train_info["iterations_per_second"])

    steps = len(examples) // rows
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer.TrainingArgs(
            batch_size=rows,
            iters=steps + (steps if backend.compiles() else 1),
            steps_per_report=1,
            steps_per_save=10**9,
            max_seq_length=settings.data.max_tokens,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
            grad_checkpoint=who == CHECKPOINTED,
        )
        optimizer = optimizers.AdamW(settings.train.lr)
        dataset = CacheDataset(Rows())
        mx.reset_peak_memory()
        with waits() as waited:
            trainer.train(loaded.model, optimizer, dataset, None, arguments, trainer.default_loss, warmed, Clock())
    offsets, lengths = (sum(int(scalar(batch[1][:, side].sum())) for batch in seen) for side in (0, 1))
    used = lengths - steps * rows  # as for ours: a row's last token predicts nothing
    padded = sum(batch[0].shape[0] * (batch[0].shape[1] - 1) for batch in seen)
    return Measured(
        who,
        rows=steps * rows,
        steps=steps,
        seconds=sum(Clock.seconds[-steps:]),
        tokens=used,
        supervised=lengths - offsets,
        processed=padded,
        padding=padded / used - 1,
        peak_bytes=mx.get_peak_memory() - base,
        base_bytes=base,
        device=_device(loaded.dtype),
        waits=waited.count("eval") / len(Clock.seconds),  # the others are its reports', and not timed
        queued=backend.policy().queued,
        first_seconds=sum(Clock.seconds[:steps]) if backend.compiles() else 0.0,
        limits=THEIRS,
    )


def _bytes(parameters: Any) -> int:
    return sum(array.nbytes for array in named(parameters).values())


def _elements(model: Any, way: Way) -> tuple[int, int]:
    """(matrix elements that a token meets in the blocks, V * D of the head where it is run apart).

    A token costs 4 operations per element: multiply and add, forward and back to the input. Attention's own products,
    the adapter's and what checkpointing computes again are left out.
    """
    chosen = int(getattr(model.args, "num_experts_per_tok", None) or 1)
    trunk = 0
    for block in model.layers:
        for _, layer in block.named_modules():
            if isinstance(layer, LINEAR + SWITCH):
                *_, outputs, inputs = dense_shape(layer)
                trunk += outputs * inputs * (chosen if isinstance(layer, SWITCH) else 1)
    if way.split is None:
        return trunk, 0
    return trunk, way.split.vocabulary * way.split.hidden(mx.array([[0]])).shape[-1]


def _matmul_peak(dtype: mx.Dtype) -> float:
    """Operations per second of a product of two 2048-square matrices, the best of five."""
    a = mx.random.normal((2048, 2048)).astype(dtype)
    mx.eval(a @ a)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        mx.eval(a @ a)
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def _device(dtype: mx.Dtype) -> str:
    return f"{backend.kind()} ({backend.chip()}), {dtype_name(dtype)}, MLX {version('mlx')}"


def _main(who: str, file: str, rows: int) -> int:
    """Print a child's figures, or for REFUSED [what is wrong, what to do], as one line of JSON."""
    try:
        print(json.dumps(asdict(_child(who, file, rows))))
        return 0
    except UserError as error:
        said = error.message, error.hint
    except (RuntimeError, MemoryError) as error:
        failure = recognise(error)
        if failure is None:
            raise
        said = str(failure), failure.hint("bench")
    print(json.dumps(said))
    return REFUSED


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
