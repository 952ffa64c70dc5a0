"""Rows of any known format -> conversations.

Six row formats, told apart per file: OpenAI `messages` (+ `tools`), ShareGPT `conversations`, Alpaca
`instruction/input/output`, Self-Instruct `instruction/instances`, `prompt/completion`, and plain `text`. A row that
does not fit its file's format becomes a `Bad` row with its line: nothing is skipped in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune.data.files import Bad, place, raw_rows
from mlxtune.data.messages import ROLES, WEIGHTS, RowError, checked, from_json, text_of, tools_of, with_system
from mlxtune.errors import UserError

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
USED = {  # columns that some format reads
    *("messages", "conversations", "instruction", "input", "output", "response", "instances", "prompt", "completion"),
    *("text", "tools", "functions", "system", "history"),
}
LISTED = 12  # bad rows, and reasons, that an error message names


@dataclass(frozen=True)
class Record:
    """One conversation or text. Exactly one of `messages` and `text` is set; `row` is its 1-based line (or index) in
    `file`; `fields` holds the row's other values, by column.
    """

    file: str
    row: int
    format: str
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    fields: Mapping[str, Any] | None = None

    @property
    def place(self) -> str:
        return place(self.file, self.row)


Parsed = tuple[list[dict[str, Any]] | None, list[dict[str, Any]] | None, str | None]  # messages, tools, text


def read(path: Path, columns: Mapping[str, str] | None = None, required: bool = True) -> Iterator[Record | Bad]:
    """All rows of one file, one after the other; columns: the file's name of a column -> the name meant; required:
    some row must have each of them.

    Raises UserError when the file cannot be read, is empty, or has no known format.
    """
    yield from parse(str(path), raw_rows(path), columns, required)


def parse(
    source: str,
    rows: Iterable[tuple[int, dict[str, Any]] | Bad],
    columns: Mapping[str, str] | None = None,
    required: bool = True,
) -> Iterator[Record | Bad]:
    """Numbered raw rows -> records; `source` names them. Raises UserError as `read` does."""
    name = ""
    empty = True
    unseen = set(columns or {})
    good = True
    for item in rows:
        empty = False
        if isinstance(item, Bad):
            yield item
            continue
        number, raw = item
        unseen -= raw.keys()
        meant = {given: name for given, name in (columns or {}).items() if given in raw}
        hidden = [name for name in meant.values() if name in raw and name not in meant]
        if hidden or len(set(meant.values())) < len(meant):
            yield Bad(
                source, number, f"data.columns gives {' and '.join(hidden or meant)} a name that is already taken"
            )
            continue
        row = {meant.get(key, key): value for key, value in raw.items()}
        if not name:
            name = _detect(source, number, row, columns)
        to_parsed = FORMATS[name][1]
        try:
            found = to_parsed(row)
            for messages, tools, text in found:
                _check_characters([messages, tools, text])
        except RowError as error:
            good = False
            yield Bad(source, number, f"{error} (format: {name})")
            continue
        except RecursionError:
            yield Bad(source, number, "nested too deeply")
            continue
        fields = {key: value for key, value in row.items() if key not in USED}
        for messages, tools, text in found:
            yield Record(source, number, name, messages, tools, text, fields)
    if unseen and name and good and required:
        raise UserError(f"{source}: no row has the column {', '.join(sorted(unseen))} that data.columns names")
    if empty:
        raise UserError(f"{source}: no rows", "Each line of a .jsonl file is one example.")


def require_good(bad: list[Bad], total: int) -> None:
    """Raise UserError naming the rows that cannot be read, when there are any; bad: of one file."""
    if bad:
        same: dict[str, list[Bad]] = {}
        for row in bad:
            same.setdefault(row.reason, []).append(row)
        told = [f"{_rows(rows)}: {reason}" for reason, rows in same.items()]
        listed = "; ".join(told[:LISTED])
        more = f"; and {len(told) - LISTED} other reasons" if len(told) > LISTED else ""
        count = f": {len(bad)} of {total} rows cannot be used:" if len(bad) > 1 else ""
        raise UserError(
            f"{bad[0].file}{count} {listed}{more}", "Mend or remove them; `mlxtune data check` lists every one."
        )


def _rows(rows: list[Bad]) -> str:
    others = "".join(f", {row.row}" for row in rows[1:LISTED])
    return rows[0].place + others + (f" and {len(rows) - LISTED} more" if len(rows) > LISTED else "")


def _detect(source: str, number: int, row: dict[str, Any], columns: Mapping[str, str] | None) -> str:
    """The file's format, from its first row's keys; every other row must then fit it."""
    for name, (keys, _) in FORMATS.items():
        if all(key in row for key in keys):
            return name
    known = "; ".join(" + ".join(keys) for keys, _ in FORMATS.values())
    names = list(map(str, row))
    example = f"{{{names[0]}: prompt, {names[1]}: completion}}" if len(names) > 1 else "{NAME: text}"
    unused = [name for name in columns or {} if columns and columns[name] not in row]
    raise UserError(
        f"{source} {place(source, number)}: no known row format has the keys {', '.join(names) or '(none)'}"
        + (f" (data.columns names {', '.join(unused)}, which the row does not have)" if unused else ""),
        f"Known: {known}. Rename columns with --set 'data.columns={example}'.",
    )


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


def _messages(row: dict[str, Any]) -> list[Parsed]:
    return [(with_system(row, checked(row.get("messages"), "messages")), tools_of(row), None)]


def _conversations(row: dict[str, Any]) -> list[Parsed]:
    turns = from_json(row.get("conversations"), "conversations must be a list of turns")
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return [(with_system(row, checked(turns, "conversations")), tools_of(row), None)]
    if not isinstance(turns, list) or not turns:
        raise RowError("conversations must be a non-empty list of turns")
    messages: list[dict[str, Any]] = []
    waiting: list[str] = []  # ids of calls without an observation so far
    if row.get("system"):
        messages.append({"role": "system", "content": text_of(row, "system")})
    for index, turn in enumerate(turns, 1):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise RowError(f"turn {index} is from {speaker!r}; allowed: {', '.join(SHAREGPT_ROLES)}")
        if not isinstance(turn.get("value"), str):
            raise RowError(f"turn {index} ({speaker}) must have text as its value")
        messages.append(_turn(index, speaker, turn["value"], waiting))
        messages[-1].update({name: turn[name] for name in WEIGHTS if name in turn})
    return [(checked(messages, "conversations"), tools_of(row), None)]


def _turn(index: int, speaker: str, value: str, waiting: list[str]) -> dict[str, Any]:
    role = SHAREGPT_ROLES[speaker]
    if speaker == "function_call":
        call = from_json(value, f"turn {index}: a function_call must be a JSON object with name and arguments")
        calls = call if isinstance(call, list) else [call]
        if any(not isinstance(one, dict) or "name" not in one for one in calls):
            raise RowError(f"turn {index}: a function_call must be a JSON object with name and arguments")
        waiting[:] = [
            f"call{index:03d}{number:02d}" for number in range(len(calls))
        ]  # nine letters: Mistral wants them
        numbered = [
            {"id": name, "function": {"name": one["name"], "arguments": one.get("arguments", {})}}
            for name, one in zip(waiting, calls, strict=True)
        ]
        return {"role": role, "content": "", "tool_calls": numbered}
    if role == "tool":
        return {"role": role, "content": value, "tool_call_id": waiting.pop(0) if waiting else f"call{index:05d}"}
    return {"role": role, "content": value}


def _alpaca(row: dict[str, Any]) -> list[Parsed]:
    answer = text_of(row, "response" if row.get("response") is not None else "output")
    return [_instructed(row, text_of(row, "input", optional=True), answer)]


def _instructed(row: dict[str, Any], extra: str, answer: str) -> Parsed:
    """As a chat: the instruction, then the input after a blank line, as Alpaca's own prompt orders them."""
    instruction = text_of(row, "instruction")
    question = {"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction}
    if extra:
        question |= {"instruction": instruction, "input": extra}  # for templates that print them apart
    exchange = _exchange(text_of(row, "system", optional=True), question, answer)
    earlier = row.get("history") or []
    if not isinstance(earlier, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in earlier):
        raise RowError("history must be a list of [question, answer] pairs")
    said = [{"role": role, "content": text} for pair in earlier for role, text in zip(ROLES[2:4], pair, strict=True)]
    return checked([*exchange[:-2], *said, *exchange[-2:]], "history"), None, None


def _self_instruct(row: dict[str, Any]) -> list[Parsed]:
    instances = from_json(row.get("instances"), "instances must be a list")
    if not isinstance(instances, list) or not instances or any(not isinstance(one, dict) for one in instances):
        raise RowError("instances must be a non-empty list of objects with input and output")
    return [_instructed(row, text_of(one, "input", optional=True), text_of(one, "output")) for one in instances]


def _prompt_completion(row: dict[str, Any]) -> list[Parsed]:
    if isinstance(row.get("prompt"), list):
        asked, answered = row["prompt"], row.get("completion")
        messages = with_system(row, checked(asked, "prompt") + checked(answered, "completion"))
        return [(messages, tools_of(row), None)]
    question = {"role": "user", "content": text_of(row, "prompt")}
    system = text_of(row, "system", optional=True)
    return [(_exchange(system, question, text_of(row, "completion")), tools_of(row), None)]


def _exchange(system: str, question: dict[str, Any], answer: str) -> list[dict[str, Any]]:
    head = [{"role": "system", "content": system}] if system else []
    return [*head, question, {"role": "assistant", "content": answer}]


def _plain(row: dict[str, Any]) -> list[Parsed]:
    return [(None, None, text_of(row, "text"))]


# Tried in this order: the keys that mark a format, and its parser.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], list[Parsed]]]] = {
    "messages": (("messages",), _messages),
    "conversations": (("conversations",), _conversations),
    "alpaca": (("instruction", "output"), _alpaca),
    "alpaca-response": (("instruction", "response"), _alpaca),
    "self-instruct": (("instruction", "instances"), _self_instruct),
    "prompt-completion": (("prompt", "completion"), _prompt_completion),
    "text": (("text",), _plain),
}
