"""mlx-lm's trainer with the loss on answers only, its batches in its own order, every batch once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx_lm.tuner import trainer
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlxtune.adapter.plan import AdapterPlan
from mlxtune.bench import arithmetic
from mlxtune.bench.arithmetic import nbytes
from mlxtune.bench.figures import CHECKPOINTED, THEIRS, Measured
from mlxtune.bench.limits import mlx_limits_kept
from mlxtune.bench.waits import waits
from mlxtune.config.resolve import Config
from mlxtune.data.chat.masking import Example
from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.model.arrays import scalar
from mlxtune.model.load import Loaded, load

NEVER = 10**9  # steps: that it saves nothing


def measure(who: str, settings: Config, examples: Sequence[Example], rows: int) -> Measured:
    """Train on these examples, `rows` of them in a batch."""
    with mlx_limits_kept():  # how much is wired mlx-lm's trainer says itself
        loaded = load(settings.model.path, settings.train.dtype, as_mlx_lm=True)
    base_bytes = nbytes(loaded.model.parameters())
    _attach(loaded.model, settings)
    steps = len(examples) // rows
    batches = _Batches()
    clock = _Clock()
    mx.reset_peak_memory()
    with waits() as waited:
        _train(who, loaded, settings, examples, rows, batches, clock)
    padded = sum(batch[0].shape[0] * (batch[0].shape[1] - 1) for batch in batches.seen)
    # Of each batch's second part, [rows, 2]: where the answer begins in each row, and where it ends.
    offsets = sum(int(scalar(batch[1][:, 0].sum())) for batch in batches.seen)
    lengths = sum(int(scalar(batch[1][:, 1].sum())) for batch in batches.seen)
    tokens = lengths - steps * rows  # as for ours: a row's last token predicts nothing
    return Measured(
        who,
        rows=steps * rows,
        steps=steps,
        seconds=sum(clock.seconds[-steps:]),
        tokens=tokens,
        supervised=lengths - offsets,
        processed=padded,
        through_head=padded,
        padding=padded / tokens - 1,
        peak_bytes=mx.get_peak_memory() - base_bytes,
        base_bytes=base_bytes,
        device=arithmetic.device(loaded.dtype),
        waits=waited.count("eval") / len(clock.seconds),  # the others are its reports', and not timed
        queued=backend.policy().queued,
        first_seconds=sum(clock.seconds[:steps]) if backend.policy().compiled else 0.0,
        limits=THEIRS,
    )


def _attach(model: nn.Module, settings: Config) -> None:
    """mlx-lm's own adapter, on the layers that ours would have. Raises UserError where its trainer has no such one."""
    plan = AdapterPlan.of(model, settings.lora)
    if plan.last_blocks is None:
        raise UserError("lora.ranks: mlx-lm's trainer has one rank for all layers", "Leave it out, or --against.")
    own = plan.config
    model.freeze()
    parameters = {"rank": own.rank, "scale": own.scale, "dropout": own.dropout, "keys": list(own.keys)}
    linear_to_lora_layers(model, own.num_layers, parameters)


def _train(
    who: str,
    loaded: Loaded,
    settings: Config,
    examples: Sequence[Example],
    rows: int,
    batches: _Batches,
    clock: _Clock,
) -> None:
    steps = len(examples) // rows
    warming_up = steps if backend.policy().compiled else 1
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer.TrainingArgs(
            batch_size=rows,
            iters=warming_up + steps,
            steps_per_report=1,
            steps_per_save=NEVER,
            max_seq_length=settings.data.max_tokens,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
            grad_checkpoint=who == CHECKPOINTED,
        )
        optimizer = optimizers.AdamW(settings.train.lr)
        dataset = CacheDataset(_Rows(examples))
        trainer.train(loaded.model, optimizer, dataset, None, arguments, trainer.default_loss, batches, clock)


class _Rows:
    """Examples as a dataset of mlx-lm, which asks for them in a dict."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Example]:
        return {"row": self._examples[index]}

    def process(self, row: dict[str, Example]) -> tuple[list[int], int]:
        """(token ids, where the answer begins)."""
        example = row["row"]
        return list(example.ids), list(example.mask).index(1)


class _Batches:
    """mlx-lm's batches, each once, after those that warm up."""

    def __init__(self) -> None:
        self.seen: list[Any] = []  # mlx-lm's batches: (ids [rows, width], where answers begin and end [rows, 2])

    def __call__(self, **options: Any) -> Iterator[Any]:
        found = list(trainer.iterate_batches(**{**options, "loop": False}))
        self.seen += found
        if backend.policy().compiled:
            yield from found
        else:
            yield max(found, key=lambda batch: batch[0].size)
        yield from found


class _Clock(TrainingCallback):
    """Notes how long each step took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.seconds.append(1 / train_info["iterations_per_second"])
