"""What many JSON values have in common, as a JSON Schema that accepts them: types, keys, and values that are few.

    {"topic": "returns", "urgent": false, "days": 3}
    {"topic": "account", "urgent": true}

is, if a hundred more are like them,

    {"type": "object", "required": ["topic", "urgent"], "additionalProperties": false, "properties": {
        "topic": {"type": "string", "enum": ["account", "returns"]}, "urgent": {"type": "boolean"},
        "days": {"type": "integer"}}}

A text or a whole number has few values where there are at most 20 and next to none was seen but once: the share of
values that were seen once is about the chance that the next one is new (Good 1953, Biometrika 40, 237). Keys that are
many and hardly recur are data themselves, such as names: then only their values have a schema.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

FEWEST = 20  # values, from which is told that they are few
MOST_VALUES = 20  # of an enum
NEW = 0.05  # chance of a value that was never seen, at which an enum would refuse too much
LONGEST_VALUE = 200  # characters of a value in an enum
MOST_KEYS = 60  # of an object
DEEPEST = 8  # objects and lists in one another; deeper, anything is accepted
Schema = dict[str, Any]


def type_of(value: Any) -> str:
    """The type of a JSON value, as JSON Schema names it."""
    if value is None:
        return "null"
    if isinstance(value, bool):  # before int, which it is in Python
        return "boolean"
    if isinstance(value, int):
        return "integer"
    kinds = {float: "number", str: "string", list: "array", dict: "object"}
    return kinds[type(value)]


def schema_of(values: Sequence[Any], depth: int = 0) -> Schema:
    """A schema that accepts all of the values. depth: of the objects and lists around them."""
    if not values or depth > DEEPEST:
        return {}
    types = sorted({type_of(value) for value in values})
    if "number" in types and "integer" in types:
        types.remove("integer")  # which a number is
    schema: Schema = {"type": types[0] if len(types) == 1 else types}
    if set(types) <= {"string", "integer", "null"} and (few := _few(values)):
        schema["enum"] = few
    objects = [value for value in values if isinstance(value, dict)]
    if objects:
        schema.update(_keys(objects, depth))
    items = [item for value in values if isinstance(value, list) for item in value]
    if items:
        schema["items"] = schema_of(items, depth + 1)
    return schema


def _few(values: Sequence[Any]) -> list[Any]:
    """The distinct values, if there are few of them; else none."""
    times = Counter(values)
    if len(values) < FEWEST or len(times) > MOST_VALUES:
        return []
    if any(isinstance(value, str) and len(value) > LONGEST_VALUE for value in times):
        return []
    once = sum(count == 1 for count in times.values())
    return sorted(times, key=lambda value: (type_of(value), value)) if once / len(values) <= NEW else []


def _keys(objects: Sequence[dict[str, Any]], depth: int) -> Schema:
    """What a schema says of objects' keys and of what is under them."""
    times = Counter(key for value in objects for key in value)
    once = sum(count == 1 for count in times.values())
    recur = len(objects) < FEWEST or once <= NEW * times.total()
    if len(times) > MOST_KEYS or not recur:
        return {"additionalProperties": schema_of([item for value in objects for item in value.values()], depth + 1)}
    properties = {}
    for key in times:
        properties[key] = schema_of([value[key] for value in objects if key in value], depth + 1)
    required = [key for key, count in times.items() if count == len(objects)]
    schema: Schema = {"properties": properties, "additionalProperties": False}
    if required:
        schema["required"] = required
    return schema


def oddities(values: Sequence[Any]) -> list[tuple[int, str]]:
    """(place of a value, what it has that hardly another one has): a type, a key, or that it lacks a key. The rarest
    come first.
    """
    found: Counter[str] = Counter()
    of_value = [_features(value) for value in values]
    for features in of_value:
        found.update(features)
    total = len(values)
    rare: list[tuple[int, int, str]] = []  # (how many have it, place, what it is)
    for place, features in enumerate(of_value):
        for feature in features:
            rare.append((found[feature], place, feature))
    known = [key for key in found if key.startswith("has the key ")]
    for key in known:
        lacking = [place for place, features in enumerate(of_value) if key not in features]
        if lacking and len(lacking) < total / 2:
            words = key.replace("has the key", "lacks the key", 1)
            rare += [(len(lacking), place, words) for place in lacking]
    rare.sort(key=lambda one: one[:2])
    return [(place, f"{words}, as {count:,} of {total:,} do") for count, place, words in rare if count <= total / 50]


def _features(value: Any) -> set[str]:
    """What a value shows of its form: its type, and where it is an object its keys with the types under them."""
    if not isinstance(value, dict):
        return {f"is of the type {type_of(value)}"}
    found = {"is of the type object"}
    for key, inner in list(value.items())[:MOST_KEYS]:
        shown = key if len(key) <= 40 else f"{key[:40]}..."
        found.add(f"has the key {shown!r}")
        kind = "number" if type_of(inner) == "integer" else type_of(inner)
        found.add(f"has a {kind} under {shown!r}")
    return found
