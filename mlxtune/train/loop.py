"""The training loop: steps, and what happens between them (evaluation, checkpoints, signals, bad numbers)."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from statistics import fmean, pstdev
from typing import Any

import mlx.core as mx

from mlxtune.adapter import adapter_files, attach
from mlxtune.compute import floats
from mlxtune.compute.division import Division, TooLarge, same
from mlxtune.errors import Interrupted, UserError
from mlxtune.machine import backend
from mlxtune.machine.gpu_errors import recognise
from mlxtune.train import checkpoint, optim
from mlxtune.train.checkpoint import Saved, State
from mlxtune.train.events import Events
from mlxtune.train.failure import told, told_of_many
from mlxtune.train.last_whole import LastWhole
from mlxtune.train.leaving import Leaving, promise
from mlxtune.train.signals import StopRequest, ignored
from mlxtune.train.step import Job, NonFinite, StepFunction

MAX_SKIPPED = 10  # steps of a run with train.on_nonfinite: skip
SPIKE_OF, SPIKE_AFTER, SPIKE_SIGMAS = 50, 20, 6.0  # a loss this far above the mean of so many recent ones is noted


class Halted(Exception):
    """A signal came during an evaluation, or in a step that lasts."""


def run(job: Job, events: Events, resumed: Saved | None = None) -> State:
    """Train to the end of the plan and leave RUN/adapters.safetensors. Returns the last state.

    Raises Interrupted after a signal (everything saved), UserError on a non-finite loss (the last good adapter kept) or
    a failure of the device (everything saved).
    """
    optimizer = optim.build(job.section, job.model.trainable_parameters())
    state = _begin(job, optimizer, resumed)
    saved = resumed.state if resumed else None
    whole = LastWhole(job.run, job.identity, job.section.keep_last, job.spec.file, saved)
    leaving = Leaving(job, events, whole)
    try:
        return _trained(job, events, state, optimizer, leaving)
    except (RuntimeError, MemoryError, TooLarge) as error:
        # Of the device, or because another process ended: what was whole is kept.
        failed, kept = error.failure if isinstance(error, TooLarge) else recognise(error), whole.state
        with ignored():
            leaving.failed(failed)
        if failed is None:
            raise
        if not job.ranks.first:
            raise told_of_many(failed, job.ranks.size, job.run) from error
        raise told(failed, kept.step, job.section, job.run, not _evaluates_next(job, kept)) from error


def _trained(job: Job, events: Events, state: State, optimizer: Any, leaving: Leaving) -> State:
    """From `state` to the last one."""
    whole = leaving.whole
    recent: deque[float] = deque(maxlen=SPIKE_OF)
    section, steps = job.section, job.plan.steps

    def reached(now: State) -> State:
        whole.keep(now, attach.trained_tensors(job.model), optimizer.state)
        return now

    def heard(name: str) -> None:
        events.emit("note", text=f"{name}: {promise(stop, state, job.ranks.size == 1)}")

    def between() -> None:
        if stop.giving_up and job.ranks.size == 1:  # several ranks only stop together
            raise Halted

    state = reached(state)
    stop = StopRequest(heard, lambda: leaving.inside_a_step(stop), alone=job.ranks.size == 1)
    with stop, job.ranks.patience.ends_the_run(60 * section.rank_minutes, leaving.left_alone):
        step_function = StepFunction(job, optimizer, between)
        step_function.divide(Division(state.halved, state.checkpointed))
        while True:
            last = state.step >= steps
            if _evaluates_next(job, state):
                state = reached(_evaluate(job, events, state, stop, whole))
            patient = not section.patience or state.stale < section.patience
            ended = state.evaluated == state.step if last else not patient
            stopping = job.ranks.highest(stop.exit_code)
            by_time = section.save_minutes and whole.unsaved_seconds >= 60 * section.save_minutes
            due = _due(section.save_every, state.step) or by_time
            if stopping or due or (ended and (section.save_every or whole.saved)):
                leaving.save()
            if ended:
                break
            if stopping:
                raise Interrupted(leaving.interrupted(), stopping)
            number = state.step + 1
            try:
                with stop.in_step(number):
                    event = step_function(number)
            except Halted:
                continue
            except TooLarge as large:
                state = reached(_divided(job, events, state, step_function, large))
                leaving.save()  # before anything is computed so: whoever resumes computes the same
                continue
            except NonFinite as bad:
                state = reached(replace(_refused(job, events, state, bad), step=number))
                continue
            state = reached(replace(state, step=number))
            events.emit("train", **event)
            if spike := _spike(recent, event["loss"]):
                events.emit("note", text=f"step {number}: the loss jumped to {spike}; {step_function.rows(number)}")
    if not patient:
        since = f"no better validation loss in {state.stale} evaluations (train.patience)"
        events.emit("note", text=f"stopped after step {state.step} of {steps}: {since}")
    leaving.keep_adapter()
    events.emit("end", step=state.step, state="finished", best_loss=state.best_loss, best_step=state.best_step)
    return state


def _evaluates_next(job: Job, state: State) -> bool:
    """Whether an evaluation comes before the next step."""
    last = state.step >= job.plan.steps
    return state.evaluated < state.step and (state.step == 0 or last or _due(job.section.eval_every, state.step))


def _divided(job: Job, events: Events, state: State, step: StepFunction, large: TooLarge) -> State:
    """The state with steps in smaller parts from here on. Raises `large` where they cannot be smaller."""
    backend.recover()
    division = step.division.smaller(large.examples, job.way)
    if division is None:
        raise large
    if division.checkpointed and not step.division.checkpointed:
        alike = same(job.model, job.way, division.way(job.way), job.plan.examples)
        if not job.ranks.lowest(int(alike)):
            events.emit("note", text="checkpointing every block does not give this model's gradients: it is not used")
            raise large
    step.divide(division)
    state = replace(state, **vars(division))
    text = f"step {state.step + 1}: {large.failure}; from here on {division} (train.on_oom: smaller)"
    events.emit("note", step=state.step, text=text, **vars(division))
    return state


def _begin(job: Job, optimizer: Any, resumed: Saved | None) -> State:
    """Where to go on; every rank has what rank 0 has."""
    state = State()
    if resumed is not None:
        if job.ranks.first:
            checkpoint.restore(resumed, job.model, optimizer)
        state = resumed.state
    job.model.update(job.ranks.from_first(job.model.trainable_parameters()))
    optimizer.state = job.ranks.from_first(optimizer.state)
    mx.eval(job.model.trainable_parameters(), optimizer.state)
    return state


def _due(every: int, step: int) -> bool:
    return bool(every) and step > 0 and step % every == 0


def _evaluate(job: Job, events: Events, state: State, stop: StopRequest, whole: LastWhole) -> State:
    """Score the current adapter and keep it when it is the best so far. A signal leaves the state as it was: whoever
    resumes evaluates first.
    """

    def halt() -> None:
        if stop.exit_code and job.ranks.size == 1:  # several ranks halt together, after it
            raise Halted

    try:
        with stop.in_evaluation():
            scored = job.evaluate(halt)
            samples = job.samples(halt)
    except Halted:
        return state
    events.emit(
        "eval", step=state.step, loss=scored.loss, tokens=scored.tokens, **({"samples": samples} if samples else {})
    )
    state = replace(state, evaluated=state.step)
    if state.step == 0:
        return state
    if not math.isfinite(scored.loss):
        events.emit("note", text=f"step {state.step}: the validation loss is not finite")
    elif state.best_loss is None or scored.loss < state.best_loss:
        state = replace(state, best_loss=scored.loss, best_step=state.step, stale=0)
        if job.ranks.first and job.section.keep == "best":
            whole.save_adapter()
        elif job.ranks.first:
            with whole.writing:
                checkpoint.save_best(job.run, state, job.model, job.spec.file)
        return state
    return replace(state, stale=state.stale + 1)


def _refused(job: Job, events: Events, state: State, bad: NonFinite) -> State:
    """The state with the step skipped. Raises UserError where that is not wanted, or was wanted too often; the
    parameters are still those of the step before.
    """
    where = f"step {state.step + 1}: {bad}"
    if job.section.on_nonfinite == "skip" and state.skipped < MAX_SKIPPED:
        events.emit("note", text=f"{where}; the step is skipped")
        return replace(state, skipped=state.skipped + 1)
    kept = ""
    if state.step:
        last = job.section.keep == "last"
        kept = f"The adapter of step {state.step} {'' if last else 'or better '}is kept. "
        if job.ranks.first and (last or adapter_files.adapter_file(job.run) is None):
            adapter_files.save_tensors(job.model, job.run, job.spec.file)
    events.emit("end", step=state.step, state="failed")
    skipped = f" ({state.skipped} steps were skipped before it)" if state.skipped else ""
    helps = floats.remedy(job.identity.config["train.dtype"], trained=state.step > state.skipped)
    raise UserError(f"{where}{skipped}", f"{kept}{helps}")


def _spike(recent: deque[float], loss: float) -> str:
    """What to say of a loss far above the recent ones, or nothing; it then counts as one of them."""
    said = ""
    if len(recent) >= SPIKE_AFTER:
        mean, deviation = fmean(recent), pstdev(recent)
        if loss > mean + SPIKE_SIGMAS * max(deviation, 1e-3 * mean):
            said = f"{loss:.3f}, {mean:.3f} was usual"
    recent.append(loss)
    return said
