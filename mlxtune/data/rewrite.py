"""Conversations -> rows of another format, one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxtune_convert.files import new_file

from mlxtune.data import records
from mlxtune.data.chat import parsed_arguments
from mlxtune.data.files import Bad
from mlxtune.data.messages import WEIGHTS, RowError
from mlxtune.data.records import Record
from mlxtune.errors import UserError

HELD = {"role", "content", "name", "tool_calls", "tool_call_id", "instruction", "input", *WEIGHTS}
SPEAKERS = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def to_messages(record: Record) -> dict[str, Any]:
    """OpenAI messages; other columns stay beside them."""
    kept = ("instruction", "input")  # ours, of an Alpaca row
    messages = [{k: v for k, v in message.items() if k not in kept} for message in record.messages or []]
    return {"messages": messages, **({"tools": record.tools} if record.tools else {})}


def to_sharegpt(record: Record) -> dict[str, Any]:
    """ShareGPT turns; a tool call is a turn from function_call. Raises RowError for what they cannot hold."""
    turns = []
    for index, message in enumerate(record.messages or [], 1):
        lost = set(message) - HELD
        if lost:
            raise RowError(f"ShareGPT has no place for {', '.join(sorted(lost))} of message {index}")
        speaker, value, calls = SPEAKERS[message["role"]], message["content"], message.get("tool_calls")
        if value and calls:
            raise RowError(f"ShareGPT has no place for text beside the tool calls of message {index}")
        if calls:
            functions = [call["function"] for call in calls]
            told = [{"name": one["name"], "arguments": parsed_arguments(one["arguments"])} for one in functions]
            speaker, value = "function_call", json.dumps(told[0] if len(told) == 1 else told, ensure_ascii=False)
        turns.append({"from": speaker, "value": value, **{name: message[name] for name in WEIGHTS if name in message}})
    tools = {"tools": json.dumps(record.tools, ensure_ascii=False)} if record.tools else {}
    return {"conversations": turns, **tools}


def to_alpaca(record: Record) -> dict[str, Any]:
    """instruction, input, output (and system). Raises RowError for anything but one question and one answer."""
    messages = list(record.messages or [])
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
    if [message["role"] for message in messages] != ["user", "assistant"] or record.tools:
        raise RowError("an Alpaca row holds one question and one answer, and no tools")
    question, answer = messages
    if set(answer) - {"role", "content"}:
        raise RowError(f"Alpaca has no place for {', '.join(sorted(set(answer) - {'role', 'content'}))} of the answer")
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
                file.write(json.dumps(made, ensure_ascii=False, default=str) + "\n")
                written += 1
            except RowError as error:
                left.append(Bad(row.file, row.row, str(error)))
        if not drop:
            records.require_good(left, written + len(left))
        if not written:
            raise UserError(f"none of {len(left)} rows can be converted to {target}")
    return written, left
