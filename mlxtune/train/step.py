"""One optimizer step, a pure function of (parameters, optimizer state, seed, number of the step).

Its loss is the sum over its supervised tokens divided once by their number, over all of its micro-batches and all
processes: accumulating changes memory, not the gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxtune.adapter import attach
from mlxtune.adapter.dropout import DropoutKeys
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.compute.division import Division, TooLarge
from mlxtune.compute.gradients import Gradients
from mlxtune.compute.loss import Way
from mlxtune.config.schema import TrainSection
from mlxtune.data.dataset.batches import Batch, Plan
from mlxtune.machine import backend
from mlxtune.machine.gpu_errors import Failure, Kind, recognise
from mlxtune.model.corrections import extent
from mlxtune.train import optim
from mlxtune.train.identity import Identity
from mlxtune.train.ranks import ALONE, Ranks

AHEAD = 1.05  # of the predicted peak: what queued work may take
WRONG = 1.3  # of it: a prediction that is further off does not hold for this model
COMPILED_FROM = 2  # a signature used once is computed as it comes: compiling would cost more than it saves


class Scored(Protocol):
    """An evaluation's result, as far as the loop looks at it: mean loss and number of tokens."""

    @property
    def loss(self) -> float: ...

    @property
    def tokens(self) -> int: ...


class NonFinite(Exception):
    """The loss or gradient of a step is not finite; nothing was updated. rows: the places to look at;
    dtype: of the activations.
    """

    def __init__(self, loss: float, rows: str, dtype: str) -> None:
        what = f"the gradient is not finite in {dtype} (the loss is, {loss:.4g})"
        if not math.isfinite(loss):
            what = f"the loss is not finite in {dtype} ({loss})"
        super().__init__(f"{what}; rows in the step: {rows}")


@dataclass(frozen=True)
class Job:
    """Everything a run works with. way: how the loss is computed; evaluate: scores the current model, calling what it
    is given now and then; samples: answers to train.sample_prompts, calling it too, none on ranks but the first; place:
    what to call a training row in messages; spec: of the adapter; predicted: bytes at the run's peak, None where nobody
    can say.
    """

    model: nn.Module
    way: Way
    dropout: DropoutKeys
    plan: Plan
    section: TrainSection
    run: Path
    evaluate: Callable[[Callable[[], None]], Scored]
    place: Callable[[int], str]
    identity: Identity
    spec: AdapterPlan
    samples: Callable[[Callable[[], None]], list[dict[str, str]]] = lambda between: []
    ranks: Ranks = ALONE
    predicted: int | None = None


class StepFunction:
    """One optimizer step: call it with the step's number, get the fields of its `train` event.

    between: called between two micro-batches, and may raise to give the step up.
    """

    def __init__(self, job: Job, optimizer: Any, between: Callable[[], None] = lambda: None) -> None:
        self.job = job
        self.optimizer = optimizer
        self.between = between
        self.layers = len(attach.adapted_layers(job.model))
        self.update = optim.Update(optimizer, job.section.clip_norm)
        self._added = optim.compiled(lambda one, other: tree_map(mx.add, one, other))
        self._longest_alike = extent.longest_alike(job.model)
        self._computing = 0  # examples in the part under way
        self._trusted = True  # the predicted peak: no step was far beyond it
        self.divide(Division())

    def divide(self, division: Division) -> None:
        """Compute steps in these parts from here on."""
        self.division = division
        self._gradients = Gradients(self.job.model, division.way(self.job.way), COMPILED_FROM)
        self._known = 0  # the last step whose parts' signatures are known

    def __call__(self, number: int) -> dict[str, Any]:
        """Raises NonFinite, or with `train.on_oom: smaller` TooLarge, before anything is updated."""
        began, peak = time.perf_counter(), mx.get_peak_memory()
        self._recall(number)
        batches = self.job.plan.step(number)
        targets = sum(batch.targets for batch in batches)
        with backend.memory_held_to(self._most()):
            losses, gradients = self._summed(number, self.job.ranks.share(batches))
        rate = optim.learning_rate(self.job.section, number, self.job.plan.steps)
        gradients, before = self.job.ranks.total(gradients), self.job.model.trainable_parameters()
        parameters, state, norm = self.update(gradients, before, targets, rate)
        del gradients, before  # the update takes the gradients' memory
        numbers = mx.stack([norm, *losses])
        mx.eval(parameters, state, numbers)
        read: Any = numbers.tolist()
        self._judge_prediction(peak)
        norm_value, *values = read
        mean = self.job.ranks.sums(sum(values))[0] / targets
        if not (math.isfinite(mean) and math.isfinite(norm_value)):
            raise NonFinite(mean, self.rows(number, values), self.job.identity.config["train.dtype"])
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

    @property
    def traced(self) -> int:
        """Graphs of micro-batches compiled so far."""
        return self._gradients.traced

    def rows(self, number: int, losses: list[float] | None = None) -> str:
        """The places of a step's rows: of the micro-batches whose own loss is not finite, where there are any."""
        batches = self.job.plan.step(number)
        if losses is not None and len(losses) == len(batches):
            bad = [batch for batch, value in zip(batches, losses, strict=True) if not math.isfinite(value)]
            batches = bad or batches
        return ", ".join([self.job.place(row) for batch in batches for row in batch.rows][:16])

    def _most(self) -> int | None:
        """Bytes that queued work may take. None: nothing is queued, or nobody knows, and MLX would wait and wait."""
        known = self.job.predicted
        if known is None or not self._trusted or not backend.policy().queued:
            return None
        return int(AHEAD * known)

    def _judge_prediction(self, before: int) -> None:
        """Trust it no longer where a step raised the peak far beyond it. before: the peak when the step began."""
        known = self.job.predicted
        if known is not None and mx.get_peak_memory() > max(before, WRONG * known):
            self._trusted = False

    def _summed(self, number: int, batches: list[Batch]) -> tuple[list[mx.array], Any]:
        """As `_accumulate`. Raises TooLarge, on every process, where the memory of one of them did not suffice."""
        if self.job.section.on_oom == "stop":
            return self._accumulate(number, batches)
        losses, gradients, found = list[mx.array](), None, None
        try:
            losses, gradients = self._accumulate(number, batches)
        except (RuntimeError, MemoryError) as error:
            found = recognise(error)  # the error itself would hold on to all that was computed
            if found is None or not found.of_memory:
                raise
        if examples := self.job.ranks.highest(self._computing if found else 0):
            raise TooLarge(found or Failure(Kind.OUT_OF_MEMORY, "in another of the processes"), examples)
        return losses, gradients

    def _recall(self, number: int) -> None:
        """Know the parts of the steps before, where a run goes on or steps were divided: see Gradients.note."""
        if self.job.way.compiled:
            for before in range(self._known + 1, number):
                for batch in self.job.ranks.share(self.job.plan.step(before)):
                    for part in self._parts(batch):
                        self._gradients.note(part)
        self._known = max(self._known, number)

    def _parts(self, batch: Batch) -> list[Batch]:
        """A micro-batch as it is computed."""
        alike = extent.parts(batch, self._longest_alike)
        return [part for rows in alike for part in self.division.parts(rows)]

    def _accumulate(self, number: int, batches: list[Batch]) -> tuple[list[mx.array], Any]:
        """(summed loss of each micro-batch, summed gradients) of a step, computed: one wait for each part."""
        losses: list[mx.array] = []
        gradients: Any = tree_map(mx.zeros_like, self.job.model.trainable_parameters()) if not batches else None
        try:
            for batch in batches:
                parts: list[mx.array] = []
                for part in self._parts(batch):
                    if gradients is not None:
                        self.between()
                    self._computing = len(part.rows)
                    lengths = (part.lengths - 1).tolist()  # a row's last token predicts nothing
                    self.job.dropout.set(self.job.section.seed, number, part.rows.tolist(), lengths, self.layers)
                    value, new = self._gradients(part)
                    gradients = new if gradients is None else self._added(gradients, new)
                    del new
                    mx.eval(value, gradients)
                    parts.append(value)
                losses.append(sum(parts[1:], parts[0]))
        finally:
            self.job.dropout.clear()
        return losses, gradients
