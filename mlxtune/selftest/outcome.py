"""What a check is, what it found, and what several checks share."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OK, FAILED, NOT_HERE, MEASURED = "ok", "FAILED", "not here", "measured"


# The newest MLX that mlxtune knows: pyproject.toml has the same bound.
MLX = "mlx<0.33"


class NotHere(Exception):
    """This device has no such thing, so there is nothing to check. Its text says why."""


class NoRoom(Exception):
    """The folder to work in takes nothing more, so no check can tell anything. number: the system's, of its refusal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass(frozen=True)
class Found:
    """What a check measured."""

    value: float  # the largest difference, in `unit`
    limit: float | None = None  # the largest value that passes; None: nothing judges this measurement
    unit: str = ""  # "ms", "us", or what is counted; "": a relative difference
    said: str = ""  # where the value was found
    wrong: str = ""  # why the check fails whatever the value is

    @property
    def status(self) -> str:
        if self.wrong or not math.isfinite(self.value):
            return FAILED
        if self.limit is None:
            return MEASURED
        return OK if self.value <= self.limit else FAILED


@dataclass(frozen=True)
class Result:
    """One line of the report."""

    group: str  # the heading it stands under
    name: str  # of the check
    status: str  # OK, FAILED, NOT_HERE or MEASURED
    value: float | None = None  # as in Found; None: the check came to no value
    limit: float | None = None  # as in Found
    unit: str = ""  # as in Found
    said: str = ""  # where the value was found, or why the check failed
    seconds: float = 0.0  # that the check took

    def to_json(self) -> dict[str, Any]:
        """JSON has no NaN and no infinity: such a value becomes null."""
        finite = self.value is not None and math.isfinite(self.value)
        return {**asdict(self), "value": self.value if finite else None}

    def shown(self) -> str:
        """The value for people."""
        if self.value is None:
            return ""
        if self.unit in ("ms", "us"):
            return f"{self.value:.1f} {self.unit}"
        return f"{self.value:.0f}" if self.unit else f"{self.value:.1e}"

    def allowed(self) -> str:
        """The limit for people."""
        if self.limit is None:
            return ""
        return f"<= {self.limit:.0f}" if self.unit else f"<= {self.limit:.0e}"


class Workshop:
    """A folder to work in, and what several checks need and is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[Hashable, Any] = {}
        self._failed: dict[Hashable, Exception] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What make() returns, or raises: the same at every later call."""
        if key in self._failed:
            raise self._failed[key]
        if key not in self._made:
            try:
                self._made[key] = make()
            except Exception as error:
                self._failed[key] = error
                raise
        return self._made[key]


@dataclass(frozen=True)
class Check:
    """One thing to find out about this machine."""

    group: str  # the heading it stands under
    name: str  # what is checked
    run: Callable[[Workshop], Found]  # does it, and raises whatever goes wrong


def advice(failed: list[Result]) -> str:
    """What to do about checks that failed."""
    report = "Please report it, with what `mlxtune doctor --test --json` prints."
    if all(any(kind in result.name for kind in ("float16", "bfloat16")) for result in failed):
        return f"{report} Until then --set train.dtype=float32 does without the types that fail."
    if any(_beyond(result) for result in failed):
        return f"{report} Another version of MLX may compute right: pip install --upgrade '{MLX}'"
    return report


def _beyond(result: Result) -> bool:
    """Whether a number is over its limit, or none at all: what failed otherwise was not computed wrongly."""
    return result.value is not None and result.limit is not None and not result.value <= result.limit
