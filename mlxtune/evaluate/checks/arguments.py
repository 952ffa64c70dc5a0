"""How the arguments of a check are written, read out and refused.

    {"contains": ["refund", "days"], "any": true}

is one check: the key that names its kind, with the main argument, and other arguments beside it. All of them may stand
in a mapping, `{"length": {"max_words": 60}}`; what needs no argument is the name alone, `"json"` or `{"json": true}`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxtune.errors import did_you_mean
from mlxtune.evaluate.checks.check import Rule

if TYPE_CHECKING:
    from mlxtune.evaluate.checks.sandbox.sandbox import Programs


class CheckError(Exception):
    """What is wrong with a check as it is written; `hint` says what is allowed."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass
class Place:
    """Where checks are written, and what they may lean on."""

    folder: Path  # files that a check names lie here, or below
    programs: Programs  # whether programs may be run, and where
    files: dict[Path, bytes] = field(default_factory=dict)  # what was read for checks, which is part of the suite

    def read(self, name: str) -> bytes:
        """A file that a check names. Raises CheckError where it cannot be read."""
        path = self.folder / name
        try:
            self.files[path] = path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckError(f"{name} cannot be read ({reason})", f"It is looked for in {self.folder}.") from error
        return self.files[path]


@dataclass
class Arguments:
    """The arguments of one check. Each reader raises CheckError for a value of another type."""

    kind: str  # of the check: also the name of its main argument
    given: dict[str, Any]  # name -> value
    notes: Counter[str]  # where its rule writes what must be told of its results

    def has(self, name: str) -> bool:
        return name in self.given

    def text(self, name: str, default: str | None = None) -> str:
        """A text; default: None where it must be given."""
        value = self._value(name, default)
        if not isinstance(value, str) or not (value or default == ""):
            raise self._wrong(name, value, "a text")
        return value

    def texts(self, name: str) -> list[str]:
        """One text, or a list of at least one."""
        value = self._value(name, None)
        listed = value if isinstance(value, list) else [value]
        if not listed or not all(isinstance(text, str) and text for text in listed):
            raise self._wrong(name, value, "a text or a list of texts")
        return listed

    def flag(self, name: str) -> bool:
        """True or false; false where it is not given."""
        value = self.given.get(name, False)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def number(self, name: str, default: float | None, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite number between two limits; default: None where it must be given."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            limits = f" from {least:g} to {most:g}" if math.isfinite(most) else f" of at least {least:g}"
            raise self._wrong(name, value, "a number" + (limits if math.isfinite(least) else ""))
        return value

    def whole(self, name: str, default: int | None = None, least: int = 0) -> int:
        """A whole number of at least `least`; default: None where it must be given."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(name, value, f"a whole number of at least {least}")
        return value

    def word(self, name: str, allowed: list[str], default: str | None = None) -> str:
        """One of some words; default: None where it must be given."""
        value = self._value(name, default)
        if value not in allowed:
            raise CheckError(f"{name} is {value!r}", did_you_mean(str(value), allowed, "Allowed"))
        return str(value)

    def _value(self, name: str, default: Any) -> Any:
        if name in self.given:
            return self.given[name]
        if default is None:
            raise CheckError(f"{name} is missing")
        return default

    def _wrong(self, name: str, value: Any, allowed: str) -> CheckError:
        shown = repr(value)
        return CheckError(f"{name} must be {allowed}, found {shown[:60]}{'...' if len(shown) > 60 else ''}")


@dataclass(frozen=True)
class Kind:
    """A kind of check."""

    build: Callable[[Arguments, Place], Rule]  # raises CheckError
    options: tuple[str, ...] = ()  # names of arguments beside the main one
    has_main: bool = True  # takes an argument under its own name
    main_is_mapping: bool = False  # which may be a mapping, so that other arguments stand beside it
