"""OpenAI messages, checked and brought to one form."""

from __future__ import annotations

import json
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
WEIGHTS = ("weight", "train")  # keys of a message: 0 leaves an assistant turn unsupervised


class RowError(Exception):
    """What is wrong with one row."""


def text_of(row: dict[str, Any], key: str, optional: bool = False) -> str:
    value = row.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{key} must be text, found {'nothing' if value is None else type(value).__name__}")
    return value


def from_json(value: Any, what: str) -> Any:
    """csv and some parquet files hold lists and objects as JSON text."""
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


def checked(value: Any, key: str) -> list[dict[str, Any]]:
    """OpenAI messages, each with a known role and with text content (or tool calls). Raises RowError."""
    messages = listed(value, f"{key} must be a non-empty list of messages")
    return [_message(index, message) for index, message in enumerate(messages, 1)]


def _message(index: int, message: Any) -> dict[str, Any]:
    if isinstance(message, dict) and message.get("role") == "function":
        message = {**message, "role": "tool"}
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise RowError(f"message {index} has the role {role!r}; allowed: {', '.join(ROLES)}")
    # Parquet fills absent fields with null; a template must not see them.
    out = {key: value for key, value in message.items() if value is not None}
    if isinstance(out.get("function_call"), dict):  # OpenAI's older spelling
        out["tool_calls"] = [{"function": out.pop("function_call")}]
    content = out.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type", "text") == "text" for part in content
    ):
        content = "".join(str(part.get("text") or "") for part in content)
    if content is None and (out.get("tool_calls") or out.get("reasoning_content")):
        content = ""
    if not isinstance(content, str):
        raise RowError(f"message {index} ({message['role']}) must have text content")
    for name in WEIGHTS:
        if out.get(name, 1) not in (0, 1):
            raise RowError(f"message {index}: {name} must be 0 or 1, found {out[name]!r}")
    if "tool_calls" in out:
        calls = listed(out["tool_calls"], f"message {index}: tool_calls must be a list", least=0)
        out["tool_calls"] = [_call(index, call) for call in calls]
        if not calls:
            del out["tool_calls"]
    return {**out, "content": content}


def _call(index: int, call: Any) -> dict[str, Any]:
    """One tool call; Parquet's nulls inside its arguments are left out."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"message {index}: each of tool_calls must have a function with a name")
    arguments = function.get("arguments", {})
    if not isinstance(arguments, dict | str):
        raise RowError(f"message {index}: the arguments of {function['name']} must be an object or JSON text")
    call = {key: value for key, value in call.items() if value is not None}
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def with_arguments(call: dict[str, Any], arguments: Any) -> dict[str, Any]:
    """A tool call, wrapped in OpenAI's way or not, with other arguments."""
    if "function" in call:
        return {**call, "function": {**call["function"], "arguments": arguments}}
    return {**call, "arguments": arguments}


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = row.get("tools") or row.get("functions")  # the second is OpenAI's older name
    tools = from_json(tools, "tools must be a JSON list") if tools and str(tools).strip() else None
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"tools must be a list, found {type(tools).__name__}")
    if any(not isinstance(tool, dict) for tool in tools or []):
        raise RowError("each of tools must be an object")
    # Templates expect OpenAI's wrapping around a function's description.
    return [
        t if "function" in t or "name" not in t else {"type": "function", "function": t} for t in tools or []
    ] or None
