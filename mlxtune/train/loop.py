"""The training loop: steps, and what happens between them (evaluation, checkpoints, signals, bad numbers)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlxtune.adapter import adapter_files, attach
from mlxtune.compute import floats, pieces
from mlxtune.compute.division import Division, TooLarge, same
from mlxtune.compute.fast_ways import whole_rows
from mlxtune.config.schema import ACCURACY
from mlxtune.errors import Interrupted, UserError
from mlxtune.machine import backend
from mlxtune.machine.gpu_errors import recognise
from mlxtune.train import checkpoint, failure, optim
from mlxtune.train.checkpoint import Saved, State
from mlxtune.train.evaluation import Samples, Scored
from mlxtune.train.events import Events
from mlxtune.train.last_whole import LastWhole
from mlxtune.train.leaving import Leaving, promise
from mlxtune.train.preference.watch import watch_of
from mlxtune.train.signals import StopRequest, ignored
from mlxtune.train.spikes import Spikes
from mlxtune.train.step import Job, NonFinite, StepFunction

MAX_SKIPPED = 10  # steps of a run with train.on_nonfinite: skip; more than a few mean that no step will do


class Halted(Exception):
    """A signal came during an evaluation, or in a step that lasts."""


def run(job: Job, events: Events, resumed: Saved | None = None) -> State:
    """Train to the end of the plan and leave RUN/adapters.safetensors. Returns the last state.

    Raises Interrupted after a signal (everything saved), UserError on a non-finite loss (the last good adapter kept) or
    a failure of the device (everything saved).
    """
    optimizer = optim.build(job.section, job.model.trainable_parameters(), job.b_rate)
    state = _first_state(job, optimizer, resumed)
    saved = resumed.state if resumed else None
    whole = LastWhole(job.folder, job.identity, job.section.keep_last, job.adapter.file, saved)
    leaving = Leaving(job, events, whole)
    try:
        return _Loop(job, events, optimizer, leaving, state).run()
    except (RuntimeError, MemoryError, TooLarge) as error:
        # Of the device, or because another process ended: what was whole is kept.
        failed = error.failure if isinstance(error, TooLarge) else recognise(error)
        kept = whole.state
        with ignored():
            leaving.failed(failed)
        if failed is None:
            raise
        if not job.ranks.first:
            raise failure.of_many(failed, job.ranks.size, job.folder.path) from error
        in_step = not _evaluation_is_due(job, kept)
        raise failure.of_one(failed, kept.step, job.section, job.folder.path, in_step) from error


def _first_state(job: Job, optimizer: Any, resumed: Saved | None) -> State:
    """Where to go on; every rank has what rank 0 has."""
    state = State()
    if resumed is not None:
        if job.ranks.first:
            checkpoint.load_into(resumed, job.model, optimizer)
        state = resumed.state
    job.model.update(job.ranks.broadcast_tree(job.model.trainable_parameters()))
    optimizer.state = job.ranks.broadcast_tree(optimizer.state)
    mx.eval(job.model.trainable_parameters(), optimizer.state)
    return state


def _evaluation_is_due(job: Job, state: State) -> bool:
    """Whether an evaluation comes before the next step: at the start, in between, and at the end."""
    if state.evaluated >= state.step:
        return False
    at_an_end = state.step == 0 or state.step >= job.plan.steps
    return at_an_end or _is_due(job.section.eval_every, state.step)


def _is_due(every: int, step: int) -> bool:
    """Whether something that is done after every so many steps (0: never) is done after this one."""
    return every > 0 and step > 0 and step % every == 0


class _Loop:
    """One run, from its first step here to its last: where it stands, and what is decided between two steps."""

    def __init__(self, job: Job, events: Events, optimizer: Any, leaving: Leaving, state: State) -> None:
        self.job = job
        self.events = events
        self.optimizer = optimizer
        self.leaving = leaving
        self.whole = leaving.whole
        self.state = state
        self.spikes = Spikes()
        self.watch = watch_of(job.preference, job.folder.path, state.step)
        self.told: set[str] = set()  # notes of evaluations
        self.alone = job.ranks.size == 1
        self._reach(state)  # before anything that may fail: from here on there is something to keep
        self.stop = StopRequest(self._on_signal, self._leave_inside_a_step, alone=self.alone)
        self.step = StepFunction(job, optimizer, self._between_micro_batches)
        self.step.divide(Division(state.halved, state.checkpointed, state.in_pieces))

    def run(self) -> State:
        """Take every step that is left. Raises Interrupted after a signal, and whatever a step raises."""
        seconds = 60 * self.job.section.rank_minutes
        with self.stop, self.job.ranks.patience.ends_the_run(seconds, self.leaving.left_alone):
            while True:
                if _evaluation_is_due(self.job, self.state):
                    self._evaluate()
                ended = self._has_ended()
                exit_code = self.job.ranks.highest(self.stop.exit_code)  # what one rank must stop for, all stop for
                if exit_code or self._checkpoint_is_due(ended):
                    self.leaving.save()
                if ended:
                    break
                if exit_code:
                    raise Interrupted(self.leaving.interrupted(), exit_code)
                self._take_a_step()
        self._finish()
        return self.state

    def _reach(self, state: State) -> None:
        """The run stands here now: keep its arrays, until the next state is whole too."""
        self.whole.keep(state, attach.trained_tensors(self.job.model), self.optimizer.state)
        self.state = state

    # What is asked between two steps

    def _has_ended(self) -> bool:
        """Whether no step follows. An evaluation that a signal cut short is made by whoever resumes: until then the
        last step is not the end.
        """
        if self.state.step >= self.job.plan.steps:
            return self.state.evaluated == self.state.step
        return self._is_out_of_patience()

    def _is_out_of_patience(self) -> bool:
        patience = self.job.section.patience
        return patience > 0 and self.state.stale >= patience

    def _checkpoint_is_due(self, ended: bool) -> bool:
        section = self.job.section
        if _is_due(section.save_every, self.state.step):
            return True
        if section.save_minutes and self.whole.unsaved_seconds >= 60 * section.save_minutes:
            return True
        # A run without checkpoints leaves only its adapter. One that saved a checkpoint also saves one at the end.
        return ended and (section.save_every > 0 or self.whole.saved is not None)

    # What happens between two steps

    def _evaluate(self) -> None:
        """Score the current adapter and keep it when it is the best so far. A signal leaves the state as it was:
        whoever resumes evaluates first.
        """
        began = time.perf_counter()
        try:
            with self.stop.in_evaluation():
                scored = self.job.evaluation.score(self._between_batches)
                samples = self.job.evaluation.samples(self._between_batches)
        except Halted:
            self._reach(self.state)
            return
        fields: dict[str, Any] = {"step": self.state.step, "loss": scored.loss, "tokens": scored.tokens, **scored.more}
        if samples.answers:
            fields["samples"] = samples.answers
        if self.job.evaluation.suite is not None:
            fields["checks"] = samples.checks
        if samples.cut:
            fields["cut"] = samples.cut
        self._tell_once(samples.notes)
        self.events.emit("eval", **fields, seconds=time.perf_counter() - began)
        self._reach(self._evaluated(scored.loss, self._deciding(scored, samples)))

    def _tell_once(self, notes: Sequence[str]) -> None:
        """Say what was not said yet by this process."""
        for note in notes:
            if note not in self.told:
                self.told.add(note)
                self.events.emit("note", text=note)

    def _deciding(self, scored: Scored, samples: Samples) -> float | None:
        """What decides by train.keep_by: the accuracy on pairs, or what a check gives, 0 where it applied to no answer;
        None: the loss does.
        """
        by = self.job.section.keep_by
        if by == "loss":
            return None
        if by == ACCURACY and by in scored.more:
            return scored.more[by]
        if by not in samples.checks:
            step = self.state.step
            self.events.emit("note", text=f"step {step}: {by} (train.keep_by) applied to no answer, and counts as 0")
        return samples.checks.get(by, 0.0)

    def _evaluated(self, loss: float, check: float | None) -> State:
        """The state after an evaluation with this loss, the adapter being kept when it is the best so far.

        check: what the check that train.keep_by names gives; None: the loss decides.
        """
        state = replace(self.state, evaluated=self.state.step)
        if state.step == 0:  # nothing was trained
            return state
        if not math.isfinite(loss):
            self.events.emit("note", text=f"step {state.step}: the validation loss is not finite")
        elif state.is_beaten_by(loss, check):
            state = replace(state, best_loss=loss, best_check=check, best_step=state.step, stale=0)
            self._keep_best(state)
            return state
        return replace(state, stale=state.stale + 1)

    def _keep_best(self, state: State) -> None:
        """Leave the adapter in the run folder; or among the checkpoints, where the run folder gets the last one."""
        job = self.job
        if not job.ranks.first:
            return
        if job.section.keep == "best":
            self.whole.save_adapter()
            return
        with self.whole.writing:
            checkpoint.save_best(job.folder.checkpoints, state, job.model, job.adapter.file)

    def _finish(self) -> None:
        """After the last step: say why it was the last, and leave the adapter."""
        state, steps = self.state, self.job.plan.steps
        if self._is_out_of_patience():
            by = "validation loss" if state.best_check is None else self.job.section.keep_by
            since = f"no better {by} in {state.stale} evaluations (train.patience)"
            self.events.emit("note", text=f"stopped after step {state.step} of {steps}: {since}")
        self.leaving.keep_adapter()
        best: dict[str, Any] = {"best_loss": state.best_loss, "best_step": state.best_step}
        if state.best_check is not None:
            best["best_check"] = state.best_check
        self.events.emit("end", step=state.step, state="finished", **best)

    # A step, and what may be wrong with it

    def _take_a_step(self) -> None:
        """The next step, or a reason to try it again (a signal, no memory) or to leave it out (bad numbers)."""
        number = self.state.step + 1
        try:
            with self.stop.in_step(number):
                event = self.step(number)
        except Halted:
            return
        except TooLarge as error:
            self._reach(self._divided(error))
            self.leaving.save()  # before anything is computed so: whoever resumes computes the same
            return
        except NonFinite as error:
            self._reach(replace(self._skipped(error), step=number))
            return
        self._reach(replace(self.state, step=number))
        self.events.emit("train", **event)
        self._tell_of_states()
        if spike := self.spikes.add(event["loss"]):
            self.events.emit("note", text=f"step {number}: the loss jumped to {spike}; {self.step.rows(number)}")
        if self.watch is not None and (said := self.watch.add(event)):
            self.events.emit("note", text=f"step {number}: {said}")

    def _tell_of_states(self) -> None:
        """Say what went wrong with keeping rows' states, which costs time alone."""
        states = self.job.states
        while states is not None and states.store.notes:
            self.events.emit("note", text=states.store.notes.pop(0))

    def _divided(self, error: TooLarge) -> State:
        """The state with steps in smaller parts from here on. Raises the error where they cannot be smaller."""
        job, step = self.job, self.step
        backend.recover()
        division = step.division.smaller(error.examples, job.way, self._may_divide())
        if division is None:
            raise error
        way = division.way(job.way)
        if way != step.division.way(job.way):
            alike = same(job.model, job.way, way, job.plan.examples)
            if not job.ranks.lowest(int(alike)):
                how = "computing blocks in pieces of a row" if division.in_pieces else "checkpointing every block"
                self.events.emit("note", text=f"{how} does not give this model's gradients: it is not used")
                raise error
        step.divide(division)
        state = replace(self.state, **vars(division))
        text = f"step {state.step + 1}: {error.failure}; from here on {division} (train.on_oom: smaller)"
        self.events.emit("note", step=state.step, text=text, **vars(division))
        return state

    def _may_divide(self) -> bool:
        """Whether the blocks can be computed in pieces, and some row is longer than one."""
        job = self.job
        if job.plan.widths[-1] <= pieces.TOKENS:
            return False
        return not whole_rows(job.model, job.plan.examples, job.identity.config["lora.dropout"])

    def _skipped(self, error: NonFinite) -> State:
        """The state with the step left out. Raises UserError where that is not wanted, or was wanted too often; the
        parameters are still those of the step before.
        """
        job, state = self.job, self.state
        where = f"step {state.step + 1}: {error}"
        if job.section.on_nonfinite == "skip" and state.skipped < MAX_SKIPPED:
            self.events.emit("note", step=state.step + 1, text=f"{where}; the step is skipped", nonfinite=True)
            return replace(state, skipped=state.skipped + 1)
        kept = self._keep_last_good()
        self.events.emit("end", step=state.step, state="failed", nonfinite=True)
        before = f" ({state.skipped} steps were skipped before it)" if state.skipped else ""
        helps = floats.remedy(job.identity.config["train.dtype"], trained=state.step > state.skipped)
        raise UserError(f"{where}{before}", f"{kept}{helps}")

    def _keep_last_good(self) -> str:
        """Leave the adapter before the bad step, unless a better one is there. Returns what to say of it."""
        job, step = self.job, self.state.step
        if not step:
            return ""
        wants_last = job.section.keep == "last"
        if job.ranks.first and (wants_last or job.folder.adapter is None):
            adapter_files.save_tensors(job.model, job.folder.path, job.adapter.file)
        return f"The adapter of step {step} {'' if wants_last else 'or better '}is kept. "

    # What another thread, or a computation in progress, calls

    def _on_signal(self, name: str) -> None:
        """Say what a first signal does. name: of the signal."""
        self.events.emit("note", text=f"{name}: {promise(self.stop, self.state, self.alone)}")

    def _leave_inside_a_step(self) -> None:
        self.leaving.inside_a_step(self.stop)

    def _between_micro_batches(self) -> None:
        """Raise Halted where the step under way should not be finished. Several ranks only stop together, after it."""
        if self.stop.giving_up and self.alone:
            raise Halted

    def _between_batches(self) -> None:
        """Raise Halted where the evaluation under way should not be finished. Several ranks finish it."""
        if self.stop.exit_code and self.alone:
            raise Halted
