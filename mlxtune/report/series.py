"""The curves of a run, as numbers: what the page draws and what it keeps for programs are the same points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxtune.report.drawing.thinning import Point, thinned
from mlxtune.report.run_record import RunRecord, number_of
from mlxtune.train.events import Event

LEAST_HALF = 3  # steps: a running mean of fewer would be the losses themselves
HALVES = 50  # half-lives of a running mean in a whole run: what is left shows where the run goes
PREFERENCES = ("margin", "accuracy", "reward_chosen", "reward_rejected")  # numbers that events of preference runs have


def of_run(record: RunRecord) -> dict[str, list[Point]]:
    """(step, value) of each curve by its name, thinned; a value None is a gap.

    loss          of a step's supervised tokens, nats a token
    smoothed_loss the running mean of it (`smoothed`)
    validation    of the held-out rows, nats a token; step 0 is before the first step
    lr            learning rate
    grad_norm     global norm of the gradient, before it is clipped
    tokens_per_second    of the rows' tokens
    peak_bytes    the most memory that MLX has held so far

    of preference runs also margin, accuracy, reward_chosen, reward_rejected of the steps, and "held-out margin" and so
    on of the held-out rows
    """
    found = {name: stepwise(record.train, name) for name in ("loss", "lr", "grad_norm", "peak_bytes")}
    found["smoothed_loss"] = smoothed(found["loss"], half_life(len(record.train)))
    found["tokens_per_second"] = _speed(record.train)
    found["validation"] = [(event["step"], number_of(event, "loss")) for event in record.evaluations]
    for check in checks_of(record):
        found[f"check {check}"] = [(event["step"], _score(event, check)) for event in record.evaluations]
    for name in PREFERENCES:
        if any(number_of(event, name) is not None for event in (*record.train, *record.evaluations)):
            found[name] = stepwise(record.train, name)
            found[of_held_out(name)] = [(event["step"], number_of(event, name)) for event in record.evaluations]
    return {name: thinned(points) for name, points in found.items()}


def of_held_out(name: str) -> str:
    """What the curve of a number on held-out rows is called."""
    return f"held-out {name}"


def checks_of(record: RunRecord) -> list[str]:
    """The checks of train.sample_prompts that were asked during the run."""
    names: dict[str, None] = {}
    for event in record.evaluations:
        checks = event.get("checks")
        names |= dict.fromkeys(checks if isinstance(checks, dict) else ())
    return list(names)


def stepwise(happened: Sequence[Event], name: str) -> list[Point]:
    """(step, number) of steps, with a gap where a step is missing: it was left out, for its numbers were not finite."""
    points: list[Point] = []
    for event in happened:
        step = event["step"]
        if points and step > points[-1][0] + 1:
            points.append((points[-1][0] + 1, None))
        points.append((step, number_of(event, name)))
    return points


def half_life(steps: int) -> int:
    """After how many steps a loss has half of its weight in the running mean of a run of so many steps."""
    return max(LEAST_HALF, steps // HALVES)


def smoothed(points: Sequence[Point], half: int) -> list[Point]:
    """The running mean: of all losses so far, each weighing 0.5 ^ (its age in steps / half). Gaps stay gaps.

    With half = 1, of the losses 4 and 1 it is 4, and then (4 * 0.5 + 1) / (0.5 + 1) = 2.
    """
    keep = 0.5 ** (1 / half)
    total = weight = 0.0
    out: list[Point] = []
    for x, value in points:
        total, weight = total * keep, weight * keep
        if value is None:
            out.append((x, None))
            continue
        total, weight = total + value, weight + 1
        out.append((x, total / weight))
    return out


def _speed(happened: Sequence[Event]) -> list[Point]:
    points: list[Point] = []
    for (step, tokens), (_, seconds) in zip(stepwise(happened, "tokens"), stepwise(happened, "seconds"), strict=True):
        points.append((step, None if tokens is None or not seconds or seconds < 0 else tokens / seconds))
    return points


def _score(event: Event, check: str) -> float | None:
    checks: Any = event.get("checks")
    return number_of(checks, check) if isinstance(checks, dict) else None
