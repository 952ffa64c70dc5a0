"""One optimizer step: what it makes of parameters and optimizer state follows from the run's plan, its seed and the
number of the step alone.

Its loss is the sum over its supervised tokens divided once by their number (of preferences: over its pairs, by theirs),
over all of its micro-batches and all processes: accumulating changes memory, not the gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxtune.adapter import attach
from mlxtune.adapter.dropout import DropoutKeys
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.compute.division import Division, TooLarge, units
from mlxtune.compute.gradients import Gradients
from mlxtune.compute.loss import Way
from mlxtune.compute.prefix import forest_of_batch
from mlxtune.compute.trunk_states import RowStates
from mlxtune.config.schema import TrainSection
from mlxtune.data.dataset.batches import Batch, Plan
from mlxtune.machine import backend
from mlxtune.machine.gpu_errors import Failure, Kind, recognise
from mlxtune.model.corrections import extent
from mlxtune.train import optim
from mlxtune.train.evaluation import Evaluation
from mlxtune.train.identity import Identity
from mlxtune.train.preference import start
from mlxtune.train.preference.goal import Goal, Preference
from mlxtune.train.preference.reference import forward_of
from mlxtune.train.ranks import ALONE, Ranks
from mlxtune.train.run_folder import RunFolder

AHEAD = 1.05  # of the predicted peak: what queued work may take
WRONG = 1.3  # of the predicted peak: a prediction that is further off does not hold for this model
COMPILED_FROM = 2  # a signature used once is computed as it comes: compiling would cost more than it saves
NAMED_ROWS = 16  # rows of a step that a message names

T = TypeVar("T")


class NonFinite(Exception):
    """The loss or gradient of a step is not finite; nothing was updated."""

    def __init__(self, loss: float, rows: str, dtype: str) -> None:
        """loss: of the step, nats a token; rows: the places to look at; dtype: of the activations."""
        if math.isfinite(loss):
            what = f"the gradient is not finite in {dtype} (the loss is, {loss:.4g})"
        else:
            what = f"the loss is not finite in {dtype} ({loss})"
        super().__init__(f"{what}; rows in the step: {rows}")


@dataclass(frozen=True)
class Job:
    """Everything that the loop works with."""

    model: nn.Module  # its adapter attached; only that is trainable
    way: Way  # how the loss is computed
    dropout: DropoutKeys  # the random keys that each forward pass needs
    plan: Plan  # which rows each step takes
    section: TrainSection  # the settings of `train`
    folder: RunFolder  # where the run is written, by the first process
    evaluation: Evaluation  # of the validation rows, and of the prompts to answer
    place: Callable[[int], str]  # number of a training row -> what messages call it
    identity: Identity  # of the run: what a checkpoint is compared with
    adapter: AdapterPlan  # what trains
    ranks: Ranks = ALONE  # the processes that share the run
    predicted: int | None = None  # bytes at the run's peak; None where nobody can say
    states: RowStates | None = None  # of the frozen blocks, where the way leaves these out; None: nothing is kept
    b_rate: float = 1.0  # lora.b_rate: of learning, of B over all the rest
    preference: Preference | None = None  # the objective of pairs or rated answers; None: rows are learned as they are


class StepFunction:
    """One optimizer step: call it with the step's number, get the fields of its `train` event."""

    def __init__(self, job: Job, optimizer: Any, between: Callable[[], None] = lambda: None) -> None:
        """between: called between two micro-batches; it may raise, and then nothing of the step was done."""
        self.job = job
        self.optimizer = optimizer
        self.between = between
        self.layers = len(attach.adapted_layers(job.model))
        self.update = optim.Update(optimizer, job.section.clip_norm)
        self._added = optim.compiled(lambda one, other: tree_map(mx.add, one, other))
        self._longest_alike = extent.longest_alike(job.model)
        self._computing = 0  # of the part under way, what it could be cut between
        # Positions that went through the model in the step under way, padding included, in this process.
        self._positions = 0  # forth and back
        self._of_baseline = 0  # of kto's baseline, which is computed without gradients
        self._trusted = True  # the predicted peak: no step was far beyond it
        self.divide(Division())

    def divide(self, division: Division) -> None:
        """Compute steps in these parts from here on."""
        self.division = division
        self._gradients = Gradients(self.job.model, division.way(self.job.way), COMPILED_FROM, self.job.states)
        self._noted = 0  # the last step whose parts' signatures are known to `_gradients`

    def __call__(self, number: int) -> dict[str, Any]:
        """Take step `number`, counted from 1. Raises NonFinite, or with `train.on_oom: smaller` TooLarge, before
        anything is updated.
        """
        began, peak = time.perf_counter(), mx.get_peak_memory()
        self._note_steps_before(number)
        batches = self.job.plan.step(number)
        targets = sum(batch.targets for batch in batches)
        goal = self._goal(batches)
        divisor = targets if goal is None else goal.divisor
        with backend.memory_held_to(self._queued_bytes()):
            self._positions = self._of_baseline = 0
            own = self.job.ranks.own_batches(batches, self.job.way.prefix)
            if goal is not None and goal.has_baseline:
                self._find_baseline(own, goal)
            losses, gradients = self._agreed(lambda: self._accumulate(number, own, goal))
        gradients = self.job.ranks.sum_tree(gradients)
        before = self.job.model.trainable_parameters()
        rate = optim.learning_rate(self.job.section, number, self.job.plan.steps)
        parameters, state, norm = self.update(gradients, before, divisor, rate)
        del gradients, before  # the update takes the gradients' memory
        norm_value, *loss_sums = _computed(parameters, state, [norm, *losses])
        self._judge_prediction(peak)
        loss, positions, of_baseline = self.job.ranks.sum_numbers(sum(loss_sums), self._positions, self._of_baseline)
        mean = loss / divisor
        if not (math.isfinite(mean) and math.isfinite(norm_value)):
            raise NonFinite(mean, self.rows(number, loss_sums), self.job.identity.config["train.dtype"])
        more = {} if goal is None else self._preferred(number, mean, goal)
        if goal is not None and goal.has_baseline:
            more["baseline_tokens"] = int(of_baseline)
        self.job.model.update(parameters)
        self.optimizer.state = state
        return {
            "step": number,
            "loss": mean,
            **more,
            "lr": rate,
            "grad_norm": norm_value,
            "tokens": sum(batch.tokens for batch in batches),
            "computed_tokens": int(positions),
            "supervised_tokens": targets,
            "seconds": time.perf_counter() - began,
            "peak_bytes": mx.get_peak_memory(),
        }

    @property
    def traced(self) -> int:
        """Graphs of micro-batches compiled so far."""
        return self._gradients.traced

    def rows(self, number: int, losses: list[float] | None = None) -> str:
        """The places of a step's rows, for a message: of all its micro-batches, or of those whose own loss (`losses`)
        is not finite where there are any.
        """
        batches = self.job.plan.step(number)
        if losses is not None and len(losses) == len(batches):  # else other processes computed some
            bad = [batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
            batches = bad or batches
        places = [self.job.place(row) for batch in batches for row in batch.rows]
        return ", ".join(places[:NAMED_ROWS])

    def _queued_bytes(self) -> int | None:
        """Bytes that queued work may take. None: nothing is queued, or nobody knows, and MLX would wait and wait."""
        predicted = self.job.predicted
        if predicted is None or not self._trusted or not backend.policy().queued:
            return None
        return int(AHEAD * predicted)

    def _judge_prediction(self, before: int) -> None:
        """Trust it no longer where a step raised the peak far beyond it. before: the peak when the step began."""
        predicted = self.job.predicted
        if predicted is not None and mx.get_peak_memory() > max(before, WRONG * predicted):
            self._trusted = False

    def _agreed(self, compute: Callable[[], T]) -> T:
        """What `compute()` gives. Raises TooLarge, on every process, where the memory of one did not suffice."""
        if self.job.section.on_oom == "stop":
            return compute()
        found: T | None = None
        failure = None
        try:
            found = compute()
        except (RuntimeError, MemoryError) as error:
            failure = recognise(error)  # the error itself would hold on to all that was computed
            if failure is None or not failure.of_memory:
                raise
        if examples := self.job.ranks.highest(self._computing if failure else 0):
            raise TooLarge(failure or Failure(Kind.OUT_OF_MEMORY, "in another of the processes"), examples)
        assert found is not None
        return found

    def _note_steps_before(self, number: int) -> None:
        """Note the signatures of the steps before, where a run goes on or steps were divided. The same graphs are then
        compiled as in a run that began with step 1, so that the bits are equal (`Gradients.count_use`).
        """
        if self.job.way.compiled:
            for before in range(self._noted + 1, number):
                for batch in self.job.ranks.own_batches(self.job.plan.step(before), self.job.way.prefix):
                    for part in self._parts(batch):
                        self._gradients.count_use(part)
        self._noted = max(self._noted, number)

    def _parts(self, batch: Batch) -> list[Batch]:
        """A micro-batch as it is computed."""
        if self.job.preference is not None:
            # Answers that are compared stay together; `loss.answer_sums` looks after their rotation.
            return self.division.parts(batch)
        parts = []
        for alike in extent.parts(batch, self._longest_alike):
            parts += self.division.parts(alike)
        return parts

    def _accumulate(self, number: int, batches: list[Batch], goal: Goal | None = None) -> tuple[list[mx.array], Any]:
        """(summed loss of each micro-batch, a scalar; summed gradients, a tree) of a step: one wait for each part.

        goal: whose losses they are, and which counts what they say; None: those of supervised tokens.
        """
        losses: list[mx.array] = []
        gradients: Any = None
        if not batches:  # this process has no part in the step
            gradients = tree_map(mx.zeros_like, self.job.model.trainable_parameters())
        try:
            for batch in batches:
                values: list[mx.array] = []
                for part in self._parts(batch):
                    if gradients is not None:
                        self.between()
                    self._computing = units(part)
                    self._positions += forest_of_batch(part, self.job.way.prefix).computed
                    self._set_noise(number, part)
                    value, new = self._gradients(part) if goal is None else goal.gradients(self._gradients, part)
                    gradients = new if gradients is None else self._added(gradients, new)
                    del new
                    mx.eval(value, gradients)
                    values.append(value)
                losses.append(sum(values[1:], values[0]))
        finally:
            self.job.dropout.clear()
        return losses, gradients

    # What preferences add.

    def _goal(self, batches: list[Batch]) -> Goal | None:
        """Of a step on preferences, all of its micro-batches; None: its rows are learned as they are."""
        preference = self.job.preference
        return None if preference is None else Goal.of(preference, preference.train, batches)

    def _find_baseline(self, batches: list[Batch], goal: Goal) -> None:
        """Give the goal of a step its baseline, over the rows of all processes. batches: this one's."""
        forward = forward_of(self.job.model, self.division.way(self.job.way))

        def of_this_process() -> float:
            total = 0.0
            for batch in batches:
                for part in self._parts(batch):
                    self.between()
                    others = goal.mismatched(part)
                    self._computing = units(part)
                    self._of_baseline += forest_of_batch(others, self.job.way.prefix).computed
                    total += goal.likelier(others, forward)
            return total

        (total,) = self.job.ranks.sum_numbers(self._agreed(of_this_process))
        goal.set_baseline(total)

    def _preferred(self, number: int, loss: float, goal: Goal) -> dict[str, float]:
        """The fields of a step on preferences. Raises UserError where the first one shows that its reference is wrong.

        loss: of the step, a pair or rated answer.
        """
        tally = goal.tally(self.job.ranks)
        if number == 1:
            start.require_own_reference(goal.preference, tally, loss)
        return goal.fields(tally)

    def _set_noise(self, number: int, part: Batch) -> None:
        """A row's dropout and NEFTune noise follow from the seed, the step and the row, whatever it is batched with."""
        lengths = (part.lengths - 1).tolist()  # a row's last token predicts nothing
        self.job.dropout.set(self.job.section.seed, number, part.rows.tolist(), lengths, self.layers)


def _computed(parameters: Any, state: Any, numbers: list[mx.array]) -> list[float]:
    """The values of some scalars, once the trees of new parameters and optimizer state are computed as well: one wait
    for all.
    """
    stacked = mx.stack(numbers)
    mx.eval(parameters, state, stacked)
    values: list[float] = stacked.tolist()  # type: ignore[assignment]
    return values
