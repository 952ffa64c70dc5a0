"""What a person should know of the steps of a run on preferences, said once each. Its limits were not measured.

A run that goes on looks at the steps before, as its events tell them: so the loss at the beginning is that of step 1,
and what was said is not said again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from mlxtune.evaluate.observations.of_preferences import LAST_STEPS, LESS_LIKELY
from mlxtune.evaluate.observations.preference_remedies import Remedies
from mlxtune.train import events
from mlxtune.train.preference.goal import Preference

ABOVE_CHANCE = 0.6  # accuracy from which the model is learning to tell answers apart
NOTHING_LEFT = 1e-3  # of the loss at the beginning: a loss below it is 0
AT_ONCE = 50  # steps: a loss that is 0 within so many came down too fast


class Watch:
    """Looks at each `train` event."""

    def __init__(self, remedies: Remedies) -> None:
        """remedies: of the run's objective."""
        self._remedies = remedies
        self._watches_fall = remedies.rewards_begin_at_0
        self._watches_zero = remedies.zero_is_certainty
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=LAST_STEPS)
        self._first_loss: float | None = None  # None: nobody knows how the run began

    def add(self, event: Mapping[str, Any]) -> str:
        """What to say after this step, else ""."""
        self._recent.append(event)
        if event["step"] == 1:
            self._first_loss = event["loss"]
        if len(self._recent) < LAST_STEPS:
            return ""
        return self._both_fall() or self._zero_at_once(event)

    def _both_fall(self) -> str:
        chosen = _numbers(self._recent, "reward_chosen")
        if not self._watches_fall or not chosen or fmean(chosen) >= LESS_LIKELY:
            return ""
        if fmean(_numbers(self._recent, "accuracy") or [0.0]) <= ABOVE_CHANCE:
            return ""
        self._watches_fall = False
        return (
            f"both answers become less likely, the chosen ones to a reward of {fmean(chosen):.2f}: the model may leave "
            f"what it is shown as good; {self._remedies.against_falling()} holds it"
        )

    def _zero_at_once(self, event: Mapping[str, Any]) -> str:
        if not self._watches_zero or self._first_loss is None or event["step"] > AT_ONCE:
            return ""
        if fmean(one["loss"] for one in self._recent) >= NOTHING_LEFT * self._first_loss:
            return ""
        self._watches_zero = False
        return (
            f"the loss is {event['loss']:.1g} after {event['step']} steps: nothing is left to learn from these rows; "
            f"{self._remedies.against_certainty()} keeps the model closer to what it was"
        )


def _numbers(steps: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    """What steps say by a name; not nan, which is None in a file: no answer of that kind was there."""
    return [step[name] for step in steps if step.get(name) is not None and step[name] == step[name]]


def watch_of(preference: Preference | None, folder: Path, step: int) -> Watch | None:
    """What looks at the steps of a run; None: it is not one on preferences. folder: of the run; step: it goes on after
    this one (0: it begins).
    """
    if preference is None:
        return None
    settings = preference.settings
    watch = Watch(Remedies(settings.objective, preference.of_pairs, settings.sft))
    for event in _steps_before(folder, step):
        watch.add(event)
    return watch


def _steps_before(folder: Path, step: int) -> list[events.Event]:
    """The `train` events up to this step; [] where nobody can read them."""
    if step == 0:
        return []
    try:
        happened = events.read(folder)
    except (OSError, ValueError):  # gone, or somebody changed the file
        return []
    return [event for event in happened if event["kind"] == "train" and event["step"] <= step]
