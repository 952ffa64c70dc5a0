"""Data files of any known row format -> conversations.

Five row formats, detected per file: OpenAI `messages` (+ `tools`), ShareGPT `conversations`, Alpaca
`instruction/input/output`, `prompt/completion`, and plain `text`. Files: .jsonl, .json, .csv, .parquet. A row that
does not fit its file's format is an error that names file and line: nothing is skipped in silence.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Record:
    """One data row. Exactly one of `messages` and `text` is set; `row` is its 1-based line (or index) in `file`."""

    file: str
    row: int
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    text: str | None = None

    @property
    def place(self) -> str:
        return _place(self.file, self.row)


def _place(source: str, number: int) -> str:
    """Only in JSON Lines is a row a line."""
    return f"{'line' if source.endswith('.jsonl') else 'row'} {number}"


class RowError(Exception):
    """What is wrong with one row; `read` adds where it stands."""


def read(path: Path) -> list[Record]:
    """All rows of one file.

    Raises UserError naming file and line: missing or empty file, unknown suffix, bad JSON, unknown keys, a row that
    does not fit the file's format.
    """
    return parse(str(path), list(_raw_rows(path)))


def parse(source: str, rows: list[tuple[int, dict[str, Any]]]) -> list[Record]:
    """Numbered raw rows -> records; `source` names them in errors. Raises UserError as `read` does."""
    if not rows:
        raise UserError(f"{source}: no rows", "Each line of a .jsonl file is one example.")
    name = _detect(source, rows)
    to_record = FORMATS[name][1]
    out = []
    for number, row in rows:
        try:
            record = to_record(source, number, row)
            _check_characters([record.messages, record.tools, record.text])
        except RowError as error:
            raise UserError(f"{source} {_place(source, number)}: {error} (format: {name})") from error
        out.append(record)
    return out


def _check_characters(value: Any) -> None:
    """Refuse lone surrogates: JSON can spell half an emoji, but no tokenizer can read it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            raise RowError(
                f"the text holds half a character ({half!r}), such as an emoji that was cut in two"
            ) from error
    elif isinstance(value, list):
        for item in value:
            _check_characters(item)
    elif isinstance(value, dict):
        _check_characters([*value.keys(), *value.values()])


def _raw_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based line or index, row) pairs of any file type."""
    if not path.is_file():
        raise UserError(f"no data file {path}")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown file type {path.suffix or '(none)'}", f"Allowed: {', '.join(SUFFIXES)}.")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a parquet file") from error
        yield from enumerate(table.to_pylist(), 1)
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (invalid UTF-8 at byte {error.start})") from error
    if path.suffix == ".csv":
        csv.field_size_limit(sys.maxsize)  # a long document is no error
        try:
            for number, row in enumerate(csv.DictReader(io.StringIO(text, newline=""), strict=True), 1):
                if None in row:
                    raise UserError(
                        f"{path} row {number}: more fields than the header has", "Quote the fields that hold a comma."
                    )
                yield number, row
        except csv.Error as error:
            raise UserError(f"{path}: not a CSV file ({error})") from error
    elif path.suffix == ".json":
        value = _parse(text, path, 0)
        rows = value if isinstance(value, list) else [value]
        for number, row in enumerate(rows, 1):
            yield number, _object(row, path, number)
    else:
        # Not splitlines(): JSON strings may hold U+2028 and its like, which are no line ends in JSON Lines.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, _object(_parse(line, path, number), path, number)


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "Each line of a .jsonl file is one JSON object." if line else ""
        raise UserError(
            f"{path} line {line or error.lineno}: not valid JSON ({error.msg}, column {error.colno})", hint
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise UserError(f"{path}{f' line {line}' if line else ''}: JSON that cannot be read ({error})") from error


def _object(row: Any, path: Path, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{path} {_place(path.name, number)}: expected a JSON object, found {type(row).__name__}")
    return row


def _detect(source: str, rows: list[tuple[int, dict[str, Any]]]) -> str:
    """The file's format, from its first row's keys; every other row must then fit it."""
    number, first = rows[0]
    for name, (keys, _) in FORMATS.items():
        if all(key in first for key in keys):
            return name
    known = "; ".join(" + ".join(keys) for keys, _ in FORMATS.values())
    raise UserError(
        f"{source} {_place(source, number)}: no known row format has the keys {', '.join(map(str, first)) or '(none)'}",
        f"Known: {known}. Rename the columns.",
    )


def _text(row: dict[str, Any], key: str, optional: bool = False) -> str:
    value = row.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{key} must be text, found {'nothing' if value is None else type(value).__name__}")
    return value


def _messages(file: str, number: int, row: dict[str, Any]) -> Record:
    return Record(file, number, messages=_checked(row.get("messages"), "messages"), tools=_tools(row))


def _checked(value: Any, key: str) -> list[dict[str, Any]]:
    """OpenAI messages, each with a known role and with text content (or tool calls)."""
    if isinstance(value, str):  # csv and some parquet files hold the list as JSON text
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{key} must be a list of messages") from error
    if not isinstance(value, list) or not value:
        raise RowError(f"{key} must be a non-empty list of messages")
    out = []
    for index, message in enumerate(value, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise RowError(f"message {index} has the role {role!r}; allowed: {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if content is None and message.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise RowError(f"message {index} ({message['role']}) must have text content")
        # Parquet fills absent fields with null; a template must not see them.
        out.append({**{k: v for k, v in message.items() if v is not None}, "content": content})
    return out


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowError("tools must be a JSON list") from error
    if tools is not None and tools != "" and not isinstance(tools, list):
        raise RowError(f"tools must be a list, found {type(tools).__name__}")
    return tools or None


def _conversations(file: str, number: int, row: dict[str, Any]) -> Record:
    turns = row.get("conversations")
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return Record(file, number, messages=_checked(turns, "conversations"), tools=_tools(row))
    if not isinstance(turns, list) or not turns:
        raise RowError("conversations must be a non-empty list of turns")
    messages = [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []
    for index, turn in enumerate(turns, 1):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise RowError(f"turn {index} is from {speaker!r}; allowed: {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": SHAREGPT_ROLES[speaker], "content": _text(turn, "value")})
    return Record(file, number, messages=messages, tools=_tools(row))


def _alpaca(file: str, number: int, row: dict[str, Any]) -> Record:
    """As a chat: the instruction, then the input after a blank line, as Alpaca's own prompt orders them."""
    question = _text(row, "instruction")
    if extra := _text(row, "input", optional=True):
        question += "\n\n" + extra
    answer = _text(row, "output" if "output" in row else "response")
    system = _text(row, "system", optional=True)
    return Record(file, number, messages=_exchange(system, question, answer))


def _prompt_completion(file: str, number: int, row: dict[str, Any]) -> Record:
    if isinstance(row.get("prompt"), list):
        messages = _checked(row["prompt"], "prompt") + _checked(row.get("completion"), "completion")
        return Record(file, number, messages=messages, tools=_tools(row))
    return Record(file, number, messages=_exchange("", _text(row, "prompt"), _text(row, "completion")))


def _exchange(system: str, question: str, answer: str) -> list[dict[str, Any]]:
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _plain(file: str, number: int, row: dict[str, Any]) -> Record:
    return Record(file, number, text=_text(row, "text"))


# Tried in this order: the keys that mark a format, and its parser.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[str, int, dict[str, Any]], Record]]] = {
    "messages": (("messages",), _messages),
    "conversations": (("conversations",), _conversations),
    "alpaca": (("instruction", "output"), _alpaca),
    "alpaca-response": (("instruction", "response"), _alpaca),
    "prompt-completion": (("prompt", "completion"), _prompt_completion),
    "text": (("text",), _plain),
}
