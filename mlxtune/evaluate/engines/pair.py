"""A base and what was tuned of it, from the same weights: its adapter off and on, in the same batches.

In 16 bits an answer depends on what is answered beside it, so both sides must be answered in one plan. Where one of
them has to be answered one by one, so is the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxtune.evaluate.engines.local import Local
from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.model.load import Loaded


class Pair:
    """Both sides of a model with its adapter on."""

    def __init__(
        self, loaded: Loaded, adapter: Path, sampling: Sampling, template: tuple[dict[str, Any], str] = ({}, "")
    ) -> None:
        """As `Local` takes them."""
        self.base = Half(self, Local(loaded, sampling, template, adapter, is_base=True))
        self.tuned = Half(self, Local(loaded, sampling, template, adapter))
        self._plan: list[list[int]] = []

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """The one that suits both: of two, the one with the smaller batches."""
        if not self._plan:
            plans = [half.own.plan(requests) for half in (self.base, self.tuned)]
            self._plan = max(plans, key=len)
        return self._plan


class Half:
    """One side of a pair as an engine."""

    def __init__(self, pair: Pair, own: Local) -> None:
        self.pair = pair
        self.own = own
        self.name = own.name

    @property
    def notes(self) -> list[str]:
        return self.own.notes

    def work(self) -> dict[str, int]:
        return self.own.work()

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        return self.pair.plan(requests)

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        return self.own.answers(requests)
