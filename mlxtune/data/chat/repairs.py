"""Messages -> the messages as one template can print them, where what is meant is certain."""

from __future__ import annotations

import json
from typing import Any

from mlxtune.data.rows.messages import THINKING_KEYS, WEIGHTS
from mlxtune.data.rows.tool_calls import parsed_arguments, with_arguments, with_short_ids
from mlxtune.data.template.template import Messages, Template


def weight(message: dict[str, Any]) -> int:
    """1: the turn is trained on; 0: it is context."""
    return min(int(message.get(key, 1)) for key in WEIGHTS)


def repaired(template: Template, messages: Messages) -> Messages:
    """The messages with absent content empty, text parts joined, the arguments of tool calls in the form (object or
    JSON text) that the template prints as it should be, and ids of calls of the length that it demands.
    """
    out = [_repaired_message(template, message) for message in messages]
    has_calls = any(message.get("tool_calls") or message.get("tool_call_id") for message in out)
    if has_calls and template.wants_short_ids:
        return with_short_ids(out)
    return out


def _repaired_message(template: Template, message: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in message.items():
        # A blank thought is none; some templates print an empty one where the key is there.
        blank_thought = key in THINKING_KEYS and isinstance(value, str) and not value.strip()
        if value is not None and key not in WEIGHTS and not blank_thought:
            out[key] = value
    out["content"] = _joined_parts(out.get("content", ""))
    if out.get("tool_calls"):
        out["tool_calls"] = [_repaired_call(template, call) for call in out["tool_calls"]]
    return out


def _joined_parts(content: Any) -> Any:
    """A content that is a list of text parts as one text; any other as it is."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and "text" in part for part in content):
        return content
    return "".join(part["text"] for part in content)


def _repaired_call(template: Template, call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments in the form that the template prints as it should be."""
    given = call.get("function", call).get("arguments")
    arguments = parsed_arguments(given)
    if not isinstance(arguments, dict):
        return call
    is_json_object = isinstance(given, str) and _holds_object(given)
    if template.arguments_form == "text":
        if is_json_object:
            return call
        return with_arguments(call, json.dumps(arguments, ensure_ascii=False))
    if template.arguments_form == "either" and is_json_object:
        return call
    if arguments is given:
        return call
    return with_arguments(call, arguments)


def _holds_object(text: str) -> bool:
    """Whether JSON text holds an object, and not a text that was encoded once more."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
