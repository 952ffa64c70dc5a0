"""The training loop: steps, and what happens between them (evaluation, checkpoints, signals, bad numbers)."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from statistics import fmean, pstdev
from typing import Any

import mlx.core as mx

from mlxtune.errors import Interrupted, UserError
from mlxtune.model import floats, lora
from mlxtune.train import checkpoint, optim
from mlxtune.train.checkpoint import Saved, State
from mlxtune.train.events import Events
from mlxtune.train.signals import StopRequest
from mlxtune.train.step import Job, NonFinite, StepFunction

MAX_SKIPPED = 10  # steps of a run with train.on_nonfinite: skip
SPIKE_OF, SPIKE_AFTER, SPIKE_SIGMAS = 50, 20, 6.0  # a loss this far above the mean of so many recent ones is noted


class Halted(Exception):
    """A signal came during an evaluation, or in a step that lasts."""


def run(job: Job, events: Events, resumed: Saved | None = None) -> State:
    """Train to the end of the plan and leave RUN/adapters.safetensors. Returns the last state.

    Raises Interrupted after a signal (everything saved), UserError on a non-finite loss (the last good adapter kept).
    """
    optimizer = optim.build(job.section, job.model.trainable_parameters())
    state = _begin(job, optimizer, resumed)
    begun = state.step
    recent: deque[float] = deque(maxlen=SPIKE_OF)
    section, steps = job.section, job.plan.steps

    def stopped_at_once() -> None:
        again = _again(job, checkpoint.resumable(job.run))
        events.emit("note", text=f"stopped inside step {state.step + 1}; {again}")
        events.emit("end", step=state.step, state="interrupted")
        if job.ranks.first and not checkpoint.exists(job.run):
            checkpoint.remove(job.run)

    with StopRequest(stopped_at_once) as stop:

        def between() -> None:
            if stop.giving_up and job.ranks.size == 1:  # several ranks only stop together
                raise Halted

        step_function = StepFunction(job, optimizer, between)
        while True:
            last = state.step >= steps
            if state.evaluated < state.step and (state.step == 0 or last or _due(section.eval_every, state.step)):
                state = _evaluate(job, events, state, stop)
            patient = not section.patience or state.stale < section.patience
            ended = state.evaluated == state.step if last else not patient
            stopping = job.ranks.highest(stop.exit_code)
            if state.step > begun and (
                stopping or _due(section.save_every, state.step) or (ended and section.save_every)
            ):
                _save(job, events, state, optimizer)
            if ended:
                break
            if stopping:
                _keep(job, state)
                events.emit("end", step=state.step, state="interrupted")
                raise Interrupted(f"stopped after step {state.step}; {_again(job, state.step > 0)}", stopping)
            number = state.step + 1
            try:
                with stop.in_step():
                    event = step_function(number)
            except Halted:
                continue
            except NonFinite as bad:
                state = replace(_refused(job, events, state, bad), step=number)
                continue
            events.emit("train", **event)
            state = replace(state, step=number)
            if spike := _spike(recent, event["loss"]):
                events.emit("note", text=f"step {number}: the loss jumped to {spike}; {step_function.rows(number)}")
    if not patient:
        since = f"no better validation loss in {state.stale} evaluations (train.patience)"
        events.emit("note", text=f"stopped after step {state.step} of {steps}: {since}")
    _keep(job, state)
    events.emit("end", step=state.step, state="finished", best_loss=state.best_loss, best_step=state.best_step)
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


def _again(job: Job, kept: bool) -> str:
    return f"to go on: mlxtune train --resume --out {job.run}" if kept else "no checkpoint was saved yet"


def _due(every: int, step: int) -> bool:
    return bool(every) and step > 0 and step % every == 0


def _evaluate(job: Job, events: Events, state: State, stop: StopRequest) -> State:
    """Score the current adapter and keep it when it is the best so far. A signal leaves the state as it was: whoever
    resumes evaluates first.
    """

    def halt() -> None:
        if stop.exit_code and job.ranks.size == 1:  # several ranks halt together, after it
            raise Halted

    try:
        scored = job.evaluate(halt)
    except Halted:
        return state
    samples = job.samples() if job.ranks.first else []
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
            lora.save_factors(job.model, job.run, job.spec.file)
        elif job.ranks.first:
            checkpoint.save_best(job.run, state, job.model, job.spec.file)
        return state
    return replace(state, stale=state.stale + 1)


def _save(job: Job, events: Events, state: State, optimizer: Any) -> None:
    if job.ranks.first:
        folder = checkpoint.save(
            job.run, state, job.identity, job.model, optimizer, job.section.keep_last, job.spec.file
        )
        events.emit("checkpoint", step=state.step, path=str(folder.relative_to(job.run)))


def _keep(job: Job, state: State) -> None:
    """Leave the last adapter in the run folder, unless the best one is already there, or nothing was trained."""
    if job.ranks.first and state.step and (job.section.keep == "last" or state.best_loss is None):
        lora.save_factors(job.model, job.run, job.spec.file)


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
        if job.ranks.first and (last or lora.adapter_file(job.run) is None):
            lora.save_factors(job.model, job.run, job.spec.file)
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
