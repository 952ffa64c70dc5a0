"""Tool calls of messages: checked, their arguments in one form or another, and their ids."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from mlxtune.data.rows.values import RowError, from_json

SHORT_ID = re.compile(r"[A-Za-z0-9]{9}", re.ASCII)  # the only ids that Mistral's templates take
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # of a made id


def checked_call(index: int, given: Any) -> dict[str, Any]:
    """One tool call as OpenAI wraps it, its arguments as they were given. index: of its message, from 1. Raises
    RowError.
    """
    wrong = f"message {index}: each of tool_calls must have a function with a name"
    found = from_json(given, wrong)
    call: dict[str, Any] = {}
    if isinstance(found, dict):
        call = {key: value for key, value in found.items() if value is not None}
    function = from_json(call.get("function", call), wrong)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(wrong)
    arguments = arguments_of(function, f"message {index}")
    if "function" not in call:  # written without OpenAI's wrapping
        call = {"id": call["id"]} if "id" in call else {}
        function = {"name": function["name"]}
    elif function.get("arguments") is None:
        function = {key: value for key, value in function.items() if key != "parameters"}
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def arguments_of(function: dict[str, Any], where: str) -> Any:
    """A call's arguments, an object or JSON text of one, as they were given; {} where there are none. Some write
    parameters instead. Raises RowError that begins with `where`.
    """
    given: Any = {}
    for key in ("arguments", "parameters"):
        if function.get(key) is not None:
            given = function[key]
            break
    whose = f"{where}: the arguments of {function['name']}"
    try:
        value = unwrapped(given)
    except json.JSONDecodeError as error:
        raise RowError(f"{whose} are not valid JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"{whose} are JSON that cannot be read ({error})") from error
    if not isinstance(value, dict):
        found = "null" if value is None else type(value).__name__
        raise RowError(f"{whose} must be an object or JSON text of one, found {found}")
    return given


def unwrapped(given: Any) -> Any:
    """What JSON text holds, however often it was encoded. Raises ValueError, RecursionError."""
    value = given
    while isinstance(value, str):
        value = json.loads(value) if value.strip() else {}  # some servers write no arguments as no text
    return value


def parsed_arguments(given: Any) -> Any:
    """The object that JSON text holds, however often it was encoded; what was given when it holds none."""
    try:
        value = unwrapped(given)
    except (ValueError, RecursionError):
        return given
    return value if isinstance(value, dict) else given


def with_arguments(call: dict[str, Any], arguments: Any) -> dict[str, Any]:
    """A tool call, wrapped in OpenAI's way or not, with other arguments."""
    if "function" in call:
        return {**call, "function": {**call["function"], "arguments": arguments}}
    return {**call, "arguments": arguments}


def with_short_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages, the ids of calls and results nine letters or digits long, as some templates demand.

    An id only links a call with its result, so any other that is used for both is as good. Ids that have that form
    stay; calls without an id get one, and results without one take those of the calls before them, in order.
    """
    ids = _ShortIds(messages)
    out: list[dict[str, Any]] = []
    unanswered: list[str] = []  # new ids of the last calls without a result so far
    for index, message in enumerate(messages):
        changed = dict(message)
        if message.get("tool_calls"):
            changed["tool_calls"] = []
            for at, call in enumerate(message["tool_calls"]):
                old = f"message {index} call {at}" if call.get("id") is None else str(call["id"])
                changed["tool_calls"].append({**call, "id": ids.short(old)})
            unanswered = [call["id"] for call in changed["tool_calls"]]
        if message.get("tool_call_id") is not None:
            changed["tool_call_id"] = ids.short(str(message["tool_call_id"]))
            unanswered = [name for name in unanswered if name != changed["tool_call_id"]]
        elif message["role"] == "tool" and unanswered:
            changed["tool_call_id"] = unanswered.pop(0)
        out.append(changed)
    return out


class _ShortIds:
    """The new ids of one conversation: one for each old id, none given twice."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self._new: dict[str, str] = {}  # old id -> new
        for message in messages:
            calls = message.get("tool_calls") or []
            for name in [*(call.get("id") for call in calls), message.get("tool_call_id")]:
                if SHORT_ID.fullmatch(str(name)):
                    self._new[str(name)] = str(name)
        self._taken = set(self._new)

    def short(self, name: str) -> str:
        salt = 0
        while name not in self._new:
            made = _nine_letters(f"{name} {salt}" if salt else name)
            salt += 1
            if made not in self._taken:
                self._new[name] = made
                self._taken.add(made)
        return self._new[name]


def _nine_letters(text: str) -> str:
    """Nine letters or digits, the same for the same text."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
    letters = []
    for _ in range(9):
        number, digit = divmod(number, len(DIGITS))
        letters.append(DIGITS[digit])
    return "".join(letters)
