"""One optimizer step, a pure function of (parameters, optimizer state, seed, number of the step).

Its loss is the sum over its supervised tokens divided once by their number, over all of its micro-batches and all
processes: accumulating changes memory, not the gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as Folder
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxtune.data.batches import Batch, Plan
from mlxtune.model import lora
from mlxtune.model.dropout import DropoutKeys
from mlxtune.sections import TrainSection
from mlxtune.train import optim
from mlxtune.train.gradients import Gradients
from mlxtune.train.identity import Identity
from mlxtune.train.loss import Path
from mlxtune.train.ranks import ALONE, Ranks

COMPILED_FROM = 2  # a signature used once is computed as it comes: compiling would cost more than it saves


class Scored(Protocol):
    """An evaluation's result, as far as the loop looks at it: mean loss and number of tokens."""

    @property
    def loss(self) -> float: ...

    @property
    def tokens(self) -> int: ...


class NonFinite(Exception):
    """The loss or gradient of a step is not finite; nothing was updated. rows: the places to look at."""

    def __init__(self, loss: float, rows: str) -> None:
        super().__init__(f"the loss or gradient is not finite (loss {loss}); rows in the step: {rows}")


@dataclass(frozen=True)
class Job:
    """Everything a run works with. path: how the loss is computed; evaluate: scores the current model, calling what it
    is given now and then; samples: answers to train.sample_prompts; place: what to call a training row in messages;
    spec: of the adapter.
    """

    model: nn.Module
    path: Path
    dropout: DropoutKeys
    plan: Plan
    section: TrainSection
    run: Folder
    evaluate: Callable[[Callable[[], None]], Scored]
    place: Callable[[int], str]
    identity: Identity
    spec: lora.Spec
    samples: Callable[[], list[dict[str, str]]] = list
    ranks: Ranks = ALONE


class StepFunction:
    """One optimizer step: call it with the step's number, get the fields of its `train` event.

    between: called between two micro-batches, and may raise to give the step up.
    """

    def __init__(self, job: Job, optimizer: Any, between: Callable[[], None] = lambda: None) -> None:
        self.job = job
        self.optimizer = optimizer
        self.between = between
        self.layers = len(lora.adapters(job.model))
        self._gradients = Gradients(job.model, job.path, COMPILED_FROM)
        self._update = optim.Update(optimizer, job.section.clip_norm)
        self._added = optim.compiled(lambda one, other: tree_map(mx.add, one, other))
        self._known = 0  # the last step whose micro-batches' signatures are known

    def __call__(self, number: int) -> dict[str, Any]:
        """Raises NonFinite before anything is updated."""
        began = time.perf_counter()
        self._recall(number)
        batches = self.job.plan.step(number)
        targets = sum(batch.targets for batch in batches)
        losses, gradients = self._accumulate(number, self.job.ranks.share(batches))
        rate = optim.learning_rate(self.job.section, number, self.job.plan.steps)
        gradients, before = self.job.ranks.total(gradients), self.job.model.trainable_parameters()
        parameters, state, norm = self._update(gradients, before, targets, rate)
        del gradients, before  # the update takes the gradients' memory
        numbers = mx.stack([norm, *losses])
        mx.eval(parameters, state, numbers)
        read: Any = numbers.tolist()
        norm_value, *values = read
        mean = self.job.ranks.sums(sum(values))[0] / targets
        if not (math.isfinite(mean) and math.isfinite(norm_value)):
            raise NonFinite(mean, self.rows(number, values))
        self.job.model.update(parameters)
        self.optimizer.state = state
        return {
            "step": number,
            "loss": mean,
            "lr": rate,
            "grad_norm": norm_value,
            "tokens": sum(batch.tokens for batch in batches),
            "supervised_tokens": targets,
            "seconds": time.perf_counter() - began,
            "peak_bytes": mx.get_peak_memory(),
        }

    def rows(self, number: int, losses: list[float] | None = None) -> str:
        """The places of a step's rows: of the micro-batches whose own loss is not finite, where there are any."""
        batches = self.job.plan.step(number)
        if losses is not None and len(losses) == len(batches):
            bad = [batch for batch, value in zip(batches, losses, strict=True) if not math.isfinite(value)]
            batches = bad or batches
        return ", ".join([self.job.place(row) for batch in batches for row in batch.rows][:16])

    def _recall(self, number: int) -> None:
        """Know the micro-batches of the steps before, where a run goes on: see Gradients.note."""
        if self.job.path.compiled:
            for before in range(self._known + 1, number):
                for batch in self.job.ranks.share(self.job.plan.step(before)):
                    self._gradients.note(batch)
        self._known = max(self._known, number)

    def _accumulate(self, number: int, batches: list[Batch]) -> tuple[list[mx.array], Any]:
        """(summed loss of each micro-batch, summed gradients) of a step, computed: one wait a micro-batch."""
        losses: list[mx.array] = []
        gradients: Any = tree_map(mx.zeros_like, self.job.model.trainable_parameters()) if not batches else None
        try:
            for batch in batches:
                if losses:
                    self.between()
                lengths = (batch.lengths - 1).tolist()  # a row's last token predicts nothing
                self.job.dropout.set(self.job.section.seed, number, batch.rows.tolist(), lengths, self.layers)
                value, new = self._gradients(batch)
                gradients = new if gradients is None else self._added(gradients, new)
                del new
                mx.eval(value, gradients)
                losses.append(value)
        finally:
            self.job.dropout.clear()
        return losses, gradients
