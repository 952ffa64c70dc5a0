"""OpenAI messages, checked and brought to one form."""

from __future__ import annotations

from typing import Any

from mlxtune.data.rows.tool_calls import checked_call
from mlxtune.data.rows.values import RowError, from_json, listed

ROLES = ("system", "developer", "user", "assistant", "tool")
# Keys of a message, each 0 or 1: 0 leaves an assistant turn unsupervised. Several programs have a name of their own.
WEIGHTS = ("weight", "train", "training", "loss", "loss_mask", "trainable")
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")  # where a message may have its thought
KNOWN = {  # keys that something reads: this program, or the chat templates
    *("role", "content", "name", "tool_calls", "tool_call_id", *THINKING_KEYS, *WEIGHTS),
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


def checked(value: Any, key: str) -> list[dict[str, Any]]:
    """OpenAI messages, each with a known role and with text content (or tool calls). Raises RowError.

    value: a list of messages, or JSON text of it; key: the column that it is from, for errors.
    """
    messages = []
    for index, given in enumerate(listed(value, f"{key} must be a non-empty list of messages"), 1):
        message = from_json(given, f"message {index} must be an object, or JSON text of one")
        messages.append(_message(index, message))
    return messages


def _message(index: int, message: Any) -> dict[str, Any]:
    """One message, checked and brought to one form. index: its number from 1, for errors."""
    role = message.get("role") if isinstance(message, dict) else message
    if isinstance(message, dict) and role == "function":  # OpenAI's older name
        role = "tool"
    if not isinstance(message, dict) or role not in ROLES:
        raise RowError(f"message {index} has the role {role!r}; allowed: {', '.join(ROLES)}")
    # Exports fill absent fields with null; a template must not see them.
    out = {key: value for key, value in message.items() if value is not None}
    out["role"] = role
    _take_old_call(index, out)
    content = _text(index, out)
    _take_weights(index, out)
    if "tool_calls" in out:
        calls = listed(out["tool_calls"], f"message {index}: tool_calls must be a list", least=0)
        out["tool_calls"] = [checked_call(index, call) for call in calls]
        if not calls:
            del out["tool_calls"]
    out["content"] = content
    return out


def _take_old_call(index: int, message: dict[str, Any]) -> None:
    """OpenAI's older spelling of one tool call, function_call, becomes the present one."""
    if "function_call" not in message:
        return
    call = from_json(message.pop("function_call"), f"message {index}: function_call must be an object")
    if not call:
        return
    if message.get("tool_calls"):
        raise RowError(f"message {index} has both function_call and tool_calls")
    message["tool_calls"] = [{"function": call}]


def _text(index: int, message: dict[str, Any]) -> str:
    """The content, text parts joined. Raises RowError that says what else it is."""
    content, whose = message.get("content"), f"message {index} ({message['role']})"
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        for part in content:
            if other := _other_than_text(part):
                raise RowError(f"{whose} holds {other}; text alone is trained on: remove that part, or the row")
        return "".join(part["text"] for part in content)
    if content is None and any(message.get(key) for key in ("tool_calls", *THINKING_KEYS)):
        return ""
    if content is None:
        found = "nothing"
    elif isinstance(content, dict):
        found = "an object; write it as JSON text"
    else:
        found = type(content).__name__
    raise RowError(f"{whose} must have text content, found {found}")


def _other_than_text(part: Any) -> str:
    """What a part of a content is, where it is no text; else ""."""
    if not isinstance(part, dict):
        return f"a part that is no object but {type(part).__name__}"
    kind = part.get("type") or next((key for key in part if key in PARTS), "text")
    if kind not in TEXTS:
        return PARTS.get(str(kind), f"a part of the type {kind!r}")
    if not isinstance(part.get("text"), str):
        return "a text part without text"
    return ""


def _take_weights(index: int, message: dict[str, Any]) -> None:
    """Whether the message is trained on, in any of its spellings, becomes 0 or 1."""
    given = {name: message[name] for name in WEIGHTS if name in message}
    for name, value in given.items():
        if isinstance(value, list | dict) or value not in (0, 1):
            raise RowError(f"message {index}: {name} must be 0 or 1, found {value!r}")
        message[name] = int(value)
    different = {int(value) for value in given.values()}
    if len(different) > 1:
        spelled = " and ".join(f"{name} {value}" for name, value in given.items())
        raise RowError(f"message {index}: {spelled} contradict each other")
