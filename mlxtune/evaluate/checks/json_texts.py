"""JSON in an answer, read strictly: what two programs would read in two ways is no JSON here.

Python's own reader takes NaN, a key set twice (the last one counts), 1e999 (as infinity) and half a character.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from mlxtune.evaluate.checks.blocks import blocks_in

MOST_STARTS = 200  # brackets that are tried as the beginning of a JSON text


class NotJson(Exception):
    """Why a text is no JSON."""


def read_json(text: str) -> Any:
    """The value of a text that is JSON as a whole. Raises NotJson."""
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise NotJson(str(error)) from error
    return _whole_characters(value, text)


def find_json(text: str) -> Any:
    """The same, or the JSON of the only fenced block, or the first object or list that stands in the text. Raises
    NotJson.
    """
    blocks = [block.text for block in blocks_in(text) if block.is_closed]
    for candidate in (text, *(blocks if len(blocks) == 1 else [])):
        try:
            return read_json(candidate)
        except NotJson:
            continue
    for value in values_in(text):
        return value
    raise NotJson("no object or list is in it")


def values_in(text: str) -> Iterator[Any]:
    """The objects and lists that stand in a text, one after the other; none inside of another, nor inside of brackets
    that hold something else: of `{"a": {"b": 1}, "c": NaN}` nothing is JSON.
    """
    start = 0
    for _ in range(MOST_STARTS):
        bracket = _BRACKET.search(text, start)
        if bracket is None:
            return
        try:
            value, start = _DECODER.raw_decode(text, bracket.start())
            yield _whole_characters(value, text)
        except (ValueError, RecursionError, NotJson):
            start = _closed(text, bracket.start())


def _closed(text: str, start: int) -> int:
    """The place behind the bracket that closes the one at `start`; the end of the text where none does."""
    depth = 0
    for match in _NESTED.finditer(text, start):
        if match[0][0] != '"':
            depth += 1 if match[0] in "{[" else -1
        if depth == 0:
            return match.end()
    return len(text)


_NESTED = re.compile(r'"(?:\\.|[^"\\\n])*"|[{}\[\]]')  # texts in quotes, and brackets
_BRACKET = re.compile(r"[{\[]")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is set twice")
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_constant=_refused)


def _whole_characters(value: Any, text: str) -> Any:
    """The value, which holds no half of a character: JSON can spell one, "\\ud83d", but no file can hold it."""
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise NotJson("half a character is in it") from error
    return value
