"""The training loop: one optimizer step at a time, each a pure function of (state, seed, step).

The loss of a step is the sum over its supervised tokens divided once by their number, over all of its micro-batches:
accumulating changes memory, not the gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path as Folder
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxtune.data.batches import Batch, Plan
from mlxtune.errors import Interrupted, UserError
from mlxtune.model import lora
from mlxtune.model.arrays import scalar
from mlxtune.model.dropout import DropoutKeys
from mlxtune.model.recompute import recomputed
from mlxtune.sections import TrainSection
from mlxtune.train import checkpoint, loss, optim
from mlxtune.train.checkpoint import State
from mlxtune.train.events import Events
from mlxtune.train.loss import Path
from mlxtune.train.signals import StopRequest


class Scored(Protocol):
    """An evaluation's result, as far as the loop looks at it: mean loss and number of tokens."""

    @property
    def loss(self) -> float: ...

    @property
    def tokens(self) -> int: ...


@dataclass(frozen=True)
class Job:
    """Everything a run works with. path: how the loss is computed; evaluate: scores the current model;
    place: what to call a training row in messages; data: digest of the examples; adapter_file: lora.Spec.file."""

    model: nn.Module
    path: Path
    dropout: DropoutKeys
    plan: Plan
    section: TrainSection
    run: Folder
    evaluate: Callable[[], Scored]
    place: Callable[[int], str]
    data: str
    adapter_file: str = lora.ADAPTER_FILE


def run(job: Job, events: Events, resume: bool = False) -> State:
    """Train to the end of the plan and leave RUN/adapters.safetensors. Returns the last state.

    Raises Interrupted after a signal (everything saved), UserError on a non-finite loss (the last good adapter kept).
    """
    optimizer = optim.build(job.section, job.model.trainable_parameters())
    state = State(data=job.data)
    if resume:
        state = checkpoint.restore(job.run, job.model, optimizer, lambda text: events.emit("note", text=text))
        if state.data != job.data:
            raise UserError(f"{job.run}: the data is not what the run began with", "Resume with the same data.")
        events.emit("note", text=f"resumed after step {state.step}")
    else:
        first = job.evaluate()
        events.emit("eval", step=0, loss=first.loss, tokens=first.tokens)
    step_function = StepFunction(job, optimizer)
    section = job.section
    with StopRequest() as stop:
        while state.step < job.plan.steps:
            number = state.step + 1
            try:
                events.emit("train", **step_function(number))
            except UserError:
                events.emit("end", step=state.step, state="failed")
                raise
            state = replace(state, step=number)
            last = number == job.plan.steps
            if last or (section.eval_every and number % section.eval_every == 0):
                state = _evaluate(job, events, state)
            if stop.exit_code or (section.save_every and number % section.save_every == 0):
                folder = checkpoint.save(job.run, state, job.model, optimizer, section.keep_last, job.adapter_file)
                events.emit("checkpoint", step=number, path=str(folder.relative_to(job.run)))
            if stop.exit_code and not last:
                _keep(job, state)
                events.emit("end", step=number, state="interrupted")
                raise Interrupted(
                    f"stopped after step {number}; to go on: mlxtune train --resume --out {job.run}",
                    stop.exit_code,
                )
    _keep(job, state)
    events.emit("end", step=state.step, state="finished", best_loss=state.best_loss, best_step=state.best_step)
    return state


def _evaluate(job: Job, events: Events, state: State) -> State:
    """Score the current adapter and keep it when it is the best so far."""
    scored = job.evaluate()
    events.emit("eval", step=state.step, loss=scored.loss, tokens=scored.tokens)
    if not math.isfinite(scored.loss):
        events.emit("note", text=f"step {state.step}: the validation loss is not finite")
    elif state.best_loss is None or scored.loss < state.best_loss:
        if job.section.keep == "best":
            lora.save_factors(job.model, job.run, job.adapter_file)
        return replace(state, best_loss=scored.loss, best_step=state.step)
    return state


def _keep(job: Job, state: State) -> None:
    """Leave the last adapter in the run folder, unless the best one is already there."""
    if job.section.keep == "last" or state.best_loss is None:
        lora.save_factors(job.model, job.run, job.adapter_file)


class StepFunction:
    """One optimizer step: call it with the step's number, get the fields of its `train` event."""

    def __init__(self, job: Job, optimizer: Any) -> None:
        self.job = job
        self.optimizer = optimizer
        self.layers = len(lora.adapters(job.model))
        self._stages: list[Any] = []
        self._gradient = nn.value_and_grad(job.model, self._loss)

    def _loss(self, batch: Batch) -> mx.array:
        """Summed over the batch's supervised tokens."""
        return loss.along(self.job.model, self.job.path, batch, self._stages)

    def __call__(self, number: int) -> dict[str, Any]:
        began = time.perf_counter()
        batches = self.job.plan.step(number)
        targets = sum(batch.targets for batch in batches)
        total, gradients = self._accumulate(number, batches)
        gradients = tree_map(lambda g: g / targets, gradients)
        gradients, norm = optim.clip(gradients, self.job.section.clip_norm)
        mx.eval(gradients, norm)
        mean, norm_value = total / targets, scalar(norm)
        if not (math.isfinite(mean) and math.isfinite(norm_value)):
            self._refuse(number, batches, mean)
        rate = optim.learning_rate(self.job.section, number, self.job.plan.steps)
        self.optimizer.learning_rate = rate
        self.optimizer.update(self.job.model, gradients)
        mx.eval(self.job.model.trainable_parameters(), self.optimizer.state)
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

    def _accumulate(self, number: int, batches: list[Batch]) -> tuple[float, Any]:
        """(summed loss, summed gradients) over the micro-batches of a step."""
        total = 0.0
        gradients: Any = None
        for batch in batches:
            lengths = (batch.lengths - 1).tolist()  # a row's last token predicts nothing
            self.job.dropout.set(self.job.section.seed, number, batch.rows.tolist(), lengths, self.layers)
            with recomputed(self.job.model, self.job.path.recompute, self._stages):
                value, new = self._gradient(batch)
            loss.finish(self._stages, value, new)
            gradients = new if gradients is None else tree_map(mx.add, gradients, new)
            mx.eval(value, gradients)
            total += scalar(value)
        self.job.dropout.clear()
        return total, gradients

    def _refuse(self, number: int, batches: list[Batch], mean: float) -> None:
        """Stop before the bad update: the parameters are still those of the step before."""
        kept = ""
        if number > 1:
            last = self.job.section.keep == "last"
            kept = f"The adapter of step {number - 1} {'' if last else 'or better '}is kept. "
            if last or lora.adapter_file(self.job.run) is None:
                lora.save_factors(self.job.model, self.job.run, self.job.adapter_file)
        rows = ", ".join([self.job.place(row) for batch in batches for row in batch.rows][:16])
        raise UserError(
            f"step {number}: the loss or gradient is not finite (loss {mean}); rows in the step: {rows}",
            f"{kept}Try a lower train.lr, or train.dtype=float32.",
        )
