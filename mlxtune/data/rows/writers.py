"""Conversations -> rows of another format, one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxtune_convert.files import json_text, new_file

from mlxtune.data.rows import formats
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.messages import IDLE, THINKING, RowError, parsed_arguments
from mlxtune.data.rows.readers import Bad
from mlxtune.errors import UserError

APART = {"role", "content", "tool_calls", "tool_call_id", "instruction", "input"}  # said in another way in ShareGPT
SPEAKERS = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def to_messages(record: Record) -> dict[str, Any]:
    """OpenAI messages; other columns stay beside them."""
    kept = ("instruction", "input")  # ours, of an Alpaca row
    messages = [{k: v for k, v in message.items() if k not in kept} for message in record.messages or []]
    return {"messages": messages, **({"tools": record.tools} if record.tools else {})}


def to_sharegpt(record: Record) -> dict[str, Any]:
    """ShareGPT turns; a tool call is a turn from function_call, after one from gpt where the message has text too.
    Raises RowError for what they cannot hold.
    """
    _require_order(record.messages or [])
    turns: list[dict[str, Any]] = []
    before: dict[str, Any] = {}
    for index, message in enumerate(record.messages or [], 1):
        lost = set(message) & set(THINKING)
        if lost:
            raise RowError(f"ShareGPT has no place for {', '.join(sorted(lost))} of message {index}")
        others = _beside(message)
        speaker, value, calls = SPEAKERS[message["role"]], message["content"], message.get("tool_calls")
        if calls and before.get("role") == "assistant" and others == _beside(before):
            raise RowError(f"ShareGPT has no place for the tool calls of message {index} apart from the answer before")
        if value or not calls:
            turns.append({**others, "from": speaker, "value": value})
        if calls:
            functions = [call["function"] for call in calls]
            told = [{"name": one["name"], "arguments": parsed_arguments(one["arguments"])} for one in functions]
            value = json.dumps(told[0] if len(told) == 1 else told, ensure_ascii=False)
            turns.append({**others, "from": "function_call", "value": value})
        before = message
    tools = {"tools": json.dumps(record.tools, ensure_ascii=False)} if record.tools else {}
    return {"conversations": turns, **tools}


def _require_order(messages: list[dict[str, Any]]) -> None:
    """Raise RowError unless each result answers the first call without one: nothing else links them in ShareGPT."""
    calling = any(message.get("tool_calls") for message in messages)
    waiting: list[Any] = []
    for index, message in enumerate(messages, 1):
        waiting += [call.get("id") for call in message.get("tool_calls") or []]
        if message["role"] == "tool" and calling:
            given = message.get("tool_call_id")
            if not waiting or given not in (None, waiting.pop(0)):
                raise RowError(
                    f"ShareGPT has no place for message {index}: results there come in the order of the calls"
                )
        elif message["role"] in ("user", "system", "developer"):
            waiting = []


def _beside(message: dict[str, Any]) -> dict[str, Any]:
    """What a message has beside what is said: its weight, its name, and what nothing reads."""
    return {key: value for key, value in message.items() if key not in APART}


def to_alpaca(record: Record) -> dict[str, Any]:
    """instruction, input, output (and system). Raises RowError for anything but one question and one answer."""
    messages = list(record.messages or [])
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
    if [message["role"] for message in messages] != ["user", "assistant"] or record.tools:
        raise RowError("an Alpaca row holds one question and one answer, and no tools")
    question, answer = messages
    if lost := sorted(set(answer) - {"role", "content"} - IDLE):
        raise RowError(f"Alpaca has no place for {', '.join(lost)} of the answer")
    asked = {"instruction": question.get("instruction", question["content"]), "input": question.get("input", "")}
    return {**({"system": system} if system else {}), **asked, "output": answer["content"]}


TARGETS: dict[str, Callable[[Record], dict[str, Any]]] = {
    "messages": to_messages,
    "sharegpt": to_sharegpt,
    "alpaca": to_alpaca,
}


def rewrite(
    rows: Iterator[Record | Bad],
    target: str,
    out: Path,
    force: bool = False,
    drop: bool = False,
    sources: Sequence[Path] = (),
) -> tuple[int, list[Bad]]:
    """Write `out`, whole or not at all; return the rows written and those left out.

    drop: rows that cannot be read, or that the format cannot hold, are left out; else UserError lists them. sources:
    files that `out` may not replace.
    """
    left: list[Bad] = []
    written = 0
    with new_file(out, force, sources) as file:
        for row in rows:
            if isinstance(row, Record) and row.text is not None:
                raise UserError(f"{row.file}: plain text has no turns to convert")
            try:
                if isinstance(row, Bad):
                    raise RowError(row.reason)
                made = {**row.fields, **TARGETS[target](row)}
                file.write(json_text(made, default=str) + "\n")
                written += 1
            except RowError as error:
                left.append(Bad(row.file, row.row, str(error)))
        if not drop:
            formats.require_good(left, written + len(left))
        if not written:
            raise UserError(f"none of {len(left)} rows can be converted to {target}")
    return written, left
