"""Conversations -> rows of another format."""

from __future__ import annotations

import json
from typing import Any

from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.messages import IDLE, THINKING_KEYS
from mlxtune.data.rows.tool_calls import parsed_arguments
from mlxtune.data.rows.values import RowError

# Keys of a message that ShareGPT says in another way, and those of an Alpaca row that say the content again.
RETOLD = {"role", "content", "tool_calls", "tool_call_id", "instruction", "input"}
SPEAKERS = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def to_messages(record: Record) -> dict[str, Any]:
    """OpenAI messages; other columns stay beside them."""
    messages = []
    for message in record.messages or []:
        # An Alpaca row's message has these beside the content that holds both.
        messages.append({key: value for key, value in message.items() if key not in ("instruction", "input")})
    out: dict[str, Any] = {"messages": messages}
    if record.tools:
        out["tools"] = record.tools
    return out


def to_sharegpt(record: Record) -> dict[str, Any]:
    """ShareGPT turns; a tool call is a turn from function_call, after one from gpt where the message has text too.
    Raises RowError for what they cannot hold.
    """
    out: dict[str, Any] = {"conversations": sharegpt_turns(record.messages or [])}
    if record.tools:
        out["tools"] = json.dumps(record.tools, ensure_ascii=False)
    return out


def sharegpt_turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns of some messages. Raises RowError for what ShareGPT cannot hold."""
    _require_order(messages)
    turns: list[dict[str, Any]] = []
    before: dict[str, Any] = {}
    for index, message in enumerate(messages, 1):
        turns += _sharegpt_turns(index, message, before)
        before = message
    return turns


def _sharegpt_turns(index: int, message: dict[str, Any], before: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of one message. index: its number, from 1; before: the message before it, empty for none."""
    lost = set(message) & set(THINKING_KEYS)
    if lost:
        raise RowError(f"ShareGPT has no place for {', '.join(sorted(lost))} of message {index}")
    others, text, calls = _beside(message), message["content"], message.get("tool_calls")
    if calls and before.get("role") == "assistant" and others == _beside(before):
        raise RowError(f"ShareGPT has no place for the tool calls of message {index} apart from the answer before")
    turns = []
    if text or not calls:
        turns.append({**others, "from": SPEAKERS[message["role"]], "value": text})
    if calls:
        functions = []
        for call in calls:
            function = call["function"]
            functions.append({"name": function["name"], "arguments": parsed_arguments(function["arguments"])})
        value = functions[0] if len(functions) == 1 else functions
        turns.append({**others, "from": "function_call", "value": json.dumps(value, ensure_ascii=False)})
    return turns


def _require_order(messages: list[dict[str, Any]]) -> None:
    """Raise RowError unless each result answers the first call without one: nothing else links them in ShareGPT."""
    has_calls = any(message.get("tool_calls") for message in messages)
    unanswered: list[Any] = []  # ids of calls
    for index, message in enumerate(messages, 1):
        unanswered += [call.get("id") for call in message.get("tool_calls") or []]
        if message["role"] == "tool" and has_calls:
            given = message.get("tool_call_id")
            if not unanswered or given not in (None, unanswered.pop(0)):
                raise RowError(
                    f"ShareGPT has no place for message {index}: results there come in the order of the calls"
                )
        elif message["role"] in ("user", "system", "developer"):
            unanswered = []


def _beside(message: dict[str, Any]) -> dict[str, Any]:
    """What a message has beside its text and calls: its weight, its name, and what nothing reads."""
    return {key: value for key, value in message.items() if key not in RETOLD}


def to_alpaca(record: Record) -> dict[str, Any]:
    """instruction, input, output (and system). Raises RowError for anything but one question and one answer."""
    messages = list(record.messages or [])
    out: dict[str, Any] = {}
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
        if system:
            out["system"] = system
    if [message["role"] for message in messages] != ["user", "assistant"] or record.tools:
        raise RowError("an Alpaca row holds one question and one answer, and no tools")
    question, answer = messages
    lost = sorted(set(answer) - {"role", "content"} - IDLE)
    if lost:
        raise RowError(f"Alpaca has no place for {', '.join(lost)} of the answer")
    out["instruction"] = question.get("instruction", question["content"])
    out["input"] = question.get("input", "")
    out["output"] = answer["content"]
    return out
