"""OpenAI messages, checked and brought to one form."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
# Keys of a message, each 0 or 1: 0 leaves an assistant turn unsupervised. Several programs have a name of their own.
WEIGHTS = ("weight", "train", "training", "loss", "loss_mask", "trainable")
THINKING = ("reasoning_content", "reasoning", "thinking")
KNOWN = {  # keys that something reads: this program, or the chat templates
    *("role", "content", "name", "tool_calls", "tool_call_id", *THINKING, *WEIGHTS),
    *("instruction", "input"),  # ours, of an Alpaca row
}
IDLE = {  # keys of exports that say when, by whom and with what id a message was made: nothing to learn from
    *("id", "type", "index", "object", "status", "timestamp", "created", "created_at", "create_time", "update_time"),
    *("date", "time", "model", "refusal", "audio", "annotations", "parsed", "logprobs", "finish_reason", "usage"),
    *("metadata", "provider_specific_fields"),
}
PARTS = {  # kinds of content that are no text
    **dict.fromkeys(("image", "image_url", "input_image", "image_file"), "an image"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
    **dict.fromkeys(("video", "video_url", "input_video"), "a video"),
    **dict.fromkeys(("file", "input_file", "document"), "a file"),
}
TEXTS = ("text", "input_text", "output_text")  # kinds that are
SHORT_ID = re.compile(r"[A-Za-z0-9]{9}", re.ASCII)
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


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
    return [
        _message(index, from_json(message, f"message {index} must be an object, or JSON text of one"))
        for index, message in enumerate(messages, 1)
    ]


def _message(index: int, message: Any) -> dict[str, Any]:
    if isinstance(message, dict) and message.get("role") == "function":
        message = {**message, "role": "tool"}
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise RowError(f"message {index} has the role {role!r}; allowed: {', '.join(ROLES)}")
    # Exports fill absent fields with null; a template must not see them.
    out = {key: value for key, value in message.items() if value is not None}
    _call_of_old(index, out)
    content = _text(index, out)
    _switched(index, out)
    if "tool_calls" in out:
        calls = listed(out["tool_calls"], f"message {index}: tool_calls must be a list", least=0)
        out["tool_calls"] = [_call(index, call) for call in calls]
        if not calls:
            del out["tool_calls"]
    return {**out, "content": content}


def _call_of_old(index: int, message: dict[str, Any]) -> None:
    """OpenAI's older spelling of one tool call becomes the present one."""
    if "function_call" not in message:
        return
    call = from_json(message.pop("function_call"), f"message {index}: function_call must be an object")
    if call and message.get("tool_calls"):
        raise RowError(f"message {index} has both function_call and tool_calls")
    if call:
        message["tool_calls"] = [{"function": call}]


def _text(index: int, message: dict[str, Any]) -> str:
    """The content, text parts joined. Raises RowError that says what else it is."""
    content, whose = message.get("content"), f"message {index} ({message['role']})"
    if isinstance(content, list):
        for part in content:
            if other := _other_than_text(part):
                raise RowError(f"{whose} holds {other}; text alone is trained on: remove that part, or the row")
        return "".join(part["text"] for part in content)
    if content is None and any(message.get(key) for key in ("tool_calls", *THINKING)):
        return ""
    if not isinstance(content, str):
        found = "nothing" if content is None else type(content).__name__
        found = "an object; write it as JSON text" if isinstance(content, dict) else found
        raise RowError(f"{whose} must have text content, found {found}")
    return content


def _other_than_text(part: Any) -> str:
    """What a part of a content is, where it is no text."""
    if not isinstance(part, dict):
        return f"a part that is no object but {type(part).__name__}"
    kind = part.get("type") or next((key for key in part if key in PARTS), "text")
    if kind in TEXTS:
        return "" if isinstance(part.get("text"), str) else "a text part without text"
    return PARTS.get(str(kind), f"a part of the type {kind!r}")


def _switched(index: int, message: dict[str, Any]) -> None:
    """Whether the message is trained on, in any of its spellings, becomes 0 or 1."""
    given = {name: message[name] for name in WEIGHTS if name in message}
    for name, value in given.items():
        if isinstance(value, list | dict) or value not in (0, 1):
            raise RowError(f"message {index}: {name} must be 0 or 1, found {value!r}")
        message[name] = int(value)
    if len({int(value) for value in given.values()}) > 1:
        said = " and ".join(f"{name} {value}" for name, value in given.items())
        raise RowError(f"message {index}: {said} contradict each other")


def _call(index: int, call: Any) -> dict[str, Any]:
    """One tool call, its arguments as they were given."""
    wrong = f"message {index}: each of tool_calls must have a function with a name"
    call = from_json(call, wrong)
    call = {key: value for key, value in call.items() if value is not None} if isinstance(call, dict) else {}
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
    given: Any = next((function[key] for key in ("arguments", "parameters") if function.get(key) is not None), {})
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
    used = [call.get("id") for message in messages for call in message.get("tool_calls") or []]
    used += [message.get("tool_call_id") for message in messages]
    renamed: dict[str, str] = {name: name for name in map(str, used) if SHORT_ID.fullmatch(name)}
    taken = set(renamed)

    def short(name: str) -> str:
        salt = 0
        while name not in renamed:
            made = _nine(f"{name} {salt}" if salt else name)
            salt += 1
            if made not in taken:
                renamed[name] = made
                taken.add(made)
        return renamed[name]

    out: list[dict[str, Any]] = []
    waiting: list[str] = []
    for index, message in enumerate(messages):
        if message.get("tool_calls"):
            calls, waiting = [], []
            for at, call in enumerate(message["tool_calls"]):
                name = f"message {index} call {at}" if call.get("id") is None else str(call["id"])
                calls.append({**call, "id": short(name)})
                waiting.append(calls[-1]["id"])  # for a result
            message = {**message, "tool_calls": calls}
        if message.get("tool_call_id") is not None:
            message = {**message, "tool_call_id": short(str(message["tool_call_id"]))}
            waiting = [name for name in waiting if name != message["tool_call_id"]]
        elif message["role"] == "tool" and waiting:
            message = {**message, "tool_call_id": waiting.pop(0)}
        out.append(message)
    return out


def _nine(text: str) -> str:
    """Nine letters or digits, the same for the same text."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
    return "".join(_DIGITS[number // len(_DIGITS) ** place % len(_DIGITS)] for place in range(9))


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The row's tools in OpenAI's form; None when there are none. JSON text is read, of them all, of each one, and
    inside of one. Raises RowError.
    """
    tools = row.get("tools") or row.get("functions")  # the second is OpenAI's older name
    tools = from_json(tools, "tools must be a JSON list") if tools and str(tools).strip() else None
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"tools must be a list, found {type(tools).__name__}")
    return [_tool(tool) for tool in tools or []] or None


def _tool(tool: Any) -> dict[str, Any]:
    wrong = "each of tools must be an object"
    tool = from_json(tool, wrong)
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
    return {**tool, "function": {**function, "parameters": _schema(parameters)} if parameters else function}


def _schema(value: Any) -> Any:
    """A JSON schema in which schemas that are stored as JSON text are read; text that holds none stays text."""
    value = _object_in(value)
    if not isinstance(value, dict):
        return value
    out = dict(value)
    for key in ("properties", "$defs"):
        named = _object_in(out.get(key))
        if isinstance(named, dict):
            out[key] = {name: _schema(own) for name, own in named.items() if own is not None}  # null: Arrow's filling
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
