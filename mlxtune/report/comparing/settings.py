"""The settings in which runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxtune.report.sections.configuration import flat

MISSING = object()  # in place of the value of a key that a run's configuration does not have


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """section.key -> its value in each run, for each key that is not the same in all, in the order of the first run.

    configs: each run's sections. MISSING stands for a key that an older version did not have; and where a run's whole
    configuration is missing (it is empty), for each of its keys.
    """
    values_of = [dict(flat(config)) for config in configs]
    keys = dict.fromkeys(key for one in values_of for key in one)
    found = {}
    for key in keys:
        values = [one.get(key, MISSING) for one in values_of]
        if any(not _same(value, values[0]) for value in values[1:]):
            found[key] = values
    return found


def _same(one: Any, other: Any) -> bool:
    """Whether two values are one setting: 1 and 1.0 are, 1 and true are not."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)
