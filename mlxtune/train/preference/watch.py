"""What a person should know of the steps of a run on preferences, said once each. Its limits were not measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from mlxtune.config.preference import WITHOUT_REFERENCE
from mlxtune.evaluate.observations.of_preferences import LAST_STEPS, LESS_LIKELY
from mlxtune.train.preference.goal import Preference

ABOVE_CHANCE = 0.6  # accuracy from which the model is learning to tell answers apart
NOTHING_LEFT = 1e-3  # of the loss at the beginning: a loss below it is 0
AT_ONCE = 50  # steps: a loss that is 0 within so many came down too fast


class Watch:
    """Looks at each `train` event."""

    def __init__(self, has_reference: bool, loss_reaches_zero: bool) -> None:
        """has_reference: rewards are measured against step 0; loss_reaches_zero: a loss near 0 means that answers are
        told apart with certainty (ipo's is 0 at its goal).
        """
        self._watches_fall = has_reference
        self._watches_zero = loss_reaches_zero
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=LAST_STEPS)
        self._first_loss: float | None = None

    def add(self, event: Mapping[str, Any]) -> str:
        """What to say after this step, else ""."""
        self._recent.append(event)
        if self._first_loss is None:
            self._first_loss = event["loss"]
        if len(self._recent) < LAST_STEPS:
            return ""
        return self._both_fall() or self._zero_at_once(event)

    def _both_fall(self) -> str:
        chosen = [event["reward_chosen"] for event in self._recent if event["reward_chosen"] == event["reward_chosen"]]
        if not self._watches_fall or not chosen or fmean(chosen) >= LESS_LIKELY:
            return ""
        if fmean(event["accuracy"] for event in self._recent) <= ABOVE_CHANCE:
            return ""
        self._watches_fall = False
        return (
            f"both answers become less likely, the chosen ones to a reward of {fmean(chosen):.2f}: the model may leave "
            "what it is shown as good; preference.sft=0.5 or a lower train.lr holds it"
        )

    def _zero_at_once(self, event: Mapping[str, Any]) -> str:
        assert self._first_loss is not None
        if not self._watches_zero or event["step"] > AT_ONCE:
            return ""
        if fmean(one["loss"] for one in self._recent) >= NOTHING_LEFT * self._first_loss:
            return ""
        self._watches_zero = False
        return (
            f"the loss is {event['loss']:.1g} after {event['step']} steps: nothing is left to learn from these rows; "
            "a lower train.lr, or a larger preference.beta, keeps the model closer to what it was"
        )


def watch_of(preference: Preference | None) -> Watch | None:
    """What looks at the steps of a run; None: it is not one on preferences."""
    if preference is None:
        return None
    objective = preference.settings.objective
    has_own_loss = preference.settings.sft > 0  # which is not 0 when answers are told apart
    return Watch(objective not in WITHOUT_REFERENCE, objective != "ipo" and not has_own_loss)
