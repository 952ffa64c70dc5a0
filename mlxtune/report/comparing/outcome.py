"""What came of a run, in the numbers by which runs are compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mlxtune.train.events import Event


@dataclass(frozen=True)
class Outcome:
    """Each is None where the run's events do not tell."""

    steps: int | None  # that were taken
    planned: int | None  # steps
    best_loss: float | None  # the lowest validation loss after a step, nats a token
    best_step: int | None  # after which it was measured
    train_loss: float | None  # of the last step whose loss was finite
    tokens: int | None  # that the loss was taken of, in all steps
    seconds: float | None  # that the steps took, without evaluations
    peak_bytes: int | None  # the most that MLX held
    valid_tokens: int | None  # of the validation rows, as the last evaluation counted them


def outcome(happened: Iterable[Event]) -> Outcome:
    """happened: the events of a run that count (`events.read`)."""
    planned = steps = best_step = valid_tokens = peak_bytes = None
    best_loss = train_loss = None
    tokens: int | None = None
    seconds: float | None = None
    for event in happened:
        if event["kind"] == "begin":
            planned = _number(event.get("steps"), planned)
        elif event["kind"] == "train":
            steps = max(steps or 0, event["step"])
            train_loss = _number(event["loss"], train_loss)
            tokens = (tokens or 0) + (_number(event.get("supervised_tokens"), 0) or 0)
            seconds = (seconds or 0.0) + (_number(event.get("seconds"), 0.0) or 0.0)
            peak_bytes = max(peak_bytes or 0, _number(event.get("peak_bytes"), 0) or 0)
        elif event["kind"] == "eval":
            valid_tokens = _number(event.get("tokens"), valid_tokens)
            loss = event["loss"]
            if event["step"] and loss is not None and (best_loss is None or loss < best_loss):
                best_loss, best_step = loss, event["step"]
    return Outcome(
        steps,
        planned,
        best_loss,
        best_step,
        train_loss,
        tokens or None,
        seconds or None,
        peak_bytes or None,
        valid_tokens,
    )


def _number(value: Any, otherwise: Any) -> Any:
    """A value that is a number; otherwise another: a file may have been changed by hand."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else otherwise
