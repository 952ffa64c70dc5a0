"""What each part of the fast way brings on this machine: a measurement more with its switch thrown.

                                     time      peak memory
    as configured                    x 1.00    x 1.00
    fast.head=off                    x 1.62    x 2.10         so the head apart from the trunk brings that
    train.checkpoint_layers=all      x 1.31    x 0.22         and this would

Each is measured on the first steps of its own plan, for what is computed once also decides which rows meet. So times
are compared for each token of the rows.

Every `fast.*` key is such a switch, whether it is on or off: a new one is in the table by being in the configuration.
What else there is stands in `OTHERS`. The run as configured is measured before and after all of them, for a machine has
its moods: how far the two are apart says how much of a time to believe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

from mlxtune.bench import children
from mlxtune.bench.figures import OURS, Measured
from mlxtune.config.resolve import Config
from mlxtune.config.schema import FastSection
from mlxtune.errors import UserError

# Switches outside of `fast`: the key, and the two values between which it is thrown.
OTHERS: dict[str, tuple[Any, Any]] = {
    "data.group_by_prefix": (True, False),
    "train.checkpoint_layers": ("none", "all"),
}


@dataclass(frozen=True)
class Thrown:
    """A measurement with one switch thrown."""

    setting: str  # section.key=value; "": as configured
    measured: Measured | None  # None: it could not be
    refused: str = ""  # why it could not be measured


def switches(config: Config) -> Iterator[tuple[str, Config]]:
    """(section.key=value, the configuration with it) of each part that can be switched."""
    for name, field in FastSection.model_fields.items():
        on, off = get_args(field.annotation)
        yield _thrown(config, f"fast.{name}", on, off)
    for key, (one, other) in OTHERS.items():
        yield _thrown(config, key, one, other)


def measure(config: Config, rows: int, say: Callable[[str], None]) -> list[Thrown]:
    """Measure as configured, with each switch thrown, and as configured once more. say: is given a line for people
    after every measurement. Raises UserError where the run as configured cannot be measured.
    """
    found = [Thrown("", children.measure(config, rows, OURS))]
    say(_line(found[-1]))
    for setting, other in switches(config):
        try:
            found.append(Thrown(setting, children.measure(other, rows, OURS)))
        except UserError as error:
            found.append(Thrown(setting, None, error.message))
        say(_line(found[-1]))
    found.append(Thrown("", children.measure(config, rows, OURS)))
    say(_line(found[-1]))
    return found


def _thrown(config: Config, key: str, one: Any, other: Any) -> tuple[str, Config]:
    """The key at `other`; where it stands there already, at `one`."""
    section, name = key.split(".")
    part = getattr(config, section)
    value = one if getattr(part, name) == other else other
    shown = str(value).lower() if isinstance(value, bool) else value
    return f"{key}={shown}", config.model_copy(update={section: part.model_copy(update={name: value})})


def _line(one: Thrown) -> str:
    what = one.setting or "as configured"
    if one.measured is None:
        return f"{what}: {one.refused}"
    return f"{what}: {one.measured.seconds_per_row:.3f} s per {one.measured.unit}"
