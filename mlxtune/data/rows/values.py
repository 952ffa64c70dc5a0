"""Values of a row, read out and checked: texts, lists, and what some files hold as JSON text."""

from __future__ import annotations

import json
from typing import Any


class RowError(Exception):
    """What is wrong with one row."""


def text_of(row: dict[str, Any], key: str, optional: bool = False) -> str:
    """The text of a column; optional: "" where there is none. Raises RowError."""
    value = row.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        found = "nothing" if value is None else type(value).__name__
        raise RowError(f"{key} must be text, found {found}")
    return value


def from_json(value: Any, what: str) -> Any:
    """What JSON text holds; any other value as it is: csv and some parquet files hold lists and objects as JSON text.
    Raises RowError, with `what`.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(what) from error


def listed(value: Any, what: str, least: int = 1) -> list[Any]:
    """A list, or JSON text of one, of at least some items. Raises RowError, with `what`."""
    value = from_json(value, what)
    if not isinstance(value, list) or len(value) < least:
        raise RowError(what)
    return value
