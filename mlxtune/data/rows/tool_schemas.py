"""The tools that a row offers, in OpenAI's form."""

from __future__ import annotations

import json
from typing import Any

from mlxtune.data.rows.values import RowError, from_json


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The row's tools; None when there are none. JSON text is read, of them all, of each one, and inside of one.
    Raises RowError.
    """
    tools = row.get("tools") or row.get("functions")  # the second is OpenAI's older name
    if not tools or not str(tools).strip():
        return None
    tools = from_json(tools, "tools must be a JSON list")
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"tools must be a list, found {type(tools).__name__}")
    return [_tool(tool) for tool in tools or []] or None


def _tool(given: Any) -> dict[str, Any]:
    wrong = "each of tools must be an object"
    tool = from_json(given, wrong)
    if not isinstance(tool, dict):
        raise RowError(wrong)
    if "function" not in tool and "name" in tool:  # templates expect OpenAI's wrapping around a function's description
        tool = {"type": "function", "function": tool}
    function = from_json(tool["function"], wrong) if tool.get("function") else None
    if not isinstance(function, dict):
        return tool
    parameters = function.get("parameters")
    if isinstance(parameters, str) and parameters.strip():
        wrong = f"tools: the parameters of {function.get('name')} must be an object, or JSON text of one"
        parameters = from_json(parameters, wrong)
        if not isinstance(parameters, dict):
            raise RowError(wrong)
    if parameters:
        function = {**function, "parameters": _schema(parameters)}
    return {**tool, "function": function}


def _schema(value: Any) -> Any:
    """A JSON schema in which schemas that are stored as JSON text are read; text that holds none stays text."""
    value = _object_in(value)
    if not isinstance(value, dict):
        return value
    out = dict(value)
    for key in ("properties", "$defs"):
        named = _object_in(out.get(key))
        if isinstance(named, dict):
            # Arrow fills properties that another row has with null.
            out[key] = {name: _schema(inner) for name, inner in named.items() if inner is not None}
    if isinstance(out.get("items"), str | dict):
        out["items"] = _schema(out["items"])
    return out


def _object_in(value: Any) -> Any:
    """The object that JSON text holds; what was given when it holds none."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, dict) else value
