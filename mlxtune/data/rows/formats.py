"""Rows of any known format -> conversations.

Six row formats, told apart per file: OpenAI `messages` (+ `tools`), ShareGPT `conversations`, Alpaca
`instruction/input/output`, Self-Instruct `instruction/instances`, `prompt/completion`, and plain `text`. A row that
does not fit its file's format becomes a `Bad` row with its line: nothing is skipped in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxtune.data.rows.messages import ROLES, RowError, arguments_of, checked, from_json, listed, text_of, tools_of
from mlxtune.data.rows.readers import Bad, Placed, kind_of, place, raw_rows
from mlxtune.errors import UserError

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
USED = {  # columns that some format reads
    *("messages", "conversations", "instruction", "input", "output", "response", "instances", "prompt", "completion"),
    *("text", "tools", "functions", "system", "history"),
}
EMPTY = {  # what a file without rows lacks
    ".jsonl": "Each line of a .jsonl file is one example.",
    ".json": "A .json file holds a list of examples.",
    **dict.fromkeys((".csv", ".tsv"), "Its first line names the columns; each line after it is one example."),
}
LISTED = 12  # bad rows, and reasons, that an error message names


@dataclass(frozen=True)
class Record(Placed):
    """One conversation or text. Exactly one of `messages` and `text` is set; `fields` holds the row's other values, by
    column.
    """

    format: str
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


CHUNK_ROWS, CHUNK_LETTERS = 512, 16 << 20  # that are worked on together, and in memory meanwhile


def chunks(records: Iterable[Record | Bad]) -> Iterator[list[Record | Bad]]:
    """The rows in lists: up to CHUNK_ROWS of them, fewer where their texts are long."""
    chunk: list[Record | Bad] = []
    letters = 0
    for record in records:
        chunk.append(record)
        if isinstance(record, Record):
            letters += _letters(record)
        if len(chunk) == CHUNK_ROWS or letters >= CHUNK_LETTERS:
            yield chunk
            chunk, letters = [], 0
    if chunk:
        yield chunk


def _letters(record: Record) -> int:
    contents = [message.get("content") for message in record.messages or []]
    return sum(len(text) for text in (record.text, *contents) if isinstance(text, str))


Parsed = tuple[list[dict[str, Any]] | None, list[dict[str, Any]] | None, str | None]  # messages, tools, text


def read(path: Path, columns: Mapping[str, str] = {}) -> Iterator[Record | Bad]:
    """All rows of one file, one after the other; columns: the file's name of a column -> the name meant; some row must
    have each of them.

    Raises UserError when the file cannot be read, is empty, or has no known format.
    """
    yield from parse(str(path), raw_rows(path), columns)


def parse(
    source: str, rows: Iterable[tuple[int, dict[str, Any]] | Bad], columns: Mapping[str, str] = {}
) -> Iterator[Record | Bad]:
    """Numbered raw rows -> records; `source` names them. Raises UserError as `read` does."""
    name = ""
    empty, good = True, True
    unseen = set(columns)
    for item in rows:
        empty = False
        if isinstance(item, Bad):
            yield item
            continue
        number, raw = item
        unseen -= raw.keys()
        names = [columns.get(key, key) for key in raw]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            yield Bad(source, number, f"data.columns gives {' and '.join(twice)} a name that is already taken")
            continue
        row = dict(zip(names, raw.values(), strict=True))
        name = name or _detect(source, number, row, columns)
        try:
            found = FORMATS[name][1](row)
            _check_characters([part for parsed in found for part in parsed])
        except RowError as error:
            good = False
            yield Bad(source, number, f"{error} (format: {name})")
        except RecursionError:
            yield Bad(source, number, "nested too deeply")
        else:
            others = {key: value for key, value in row.items() if key not in USED}
            for messages, tools, text in found:
                yield Record(source, number, name, messages, tools, text, others)
    if unseen and name and good:
        raise UserError(f"{source}: no row has the column {', '.join(sorted(unseen))} that data.columns names")
    if empty:
        raise UserError(f"{source}: no rows", EMPTY.get(kind_of(Path(source)), ""))


def require_good(bad: list[Bad], total: int) -> None:
    """Raise UserError naming the rows that cannot be read, when there are any; bad: of one file."""
    same: dict[str, list[Bad]] = {}
    for row in bad:
        same.setdefault(row.reason, []).append(row)
    told = []
    for reason, rows in same.items():
        others = "".join(f", {row.row}" for row in rows[1:LISTED])
        more = f" and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
        told.append(f"{rows[0].place}{others}{more}: {reason}")
    if told:
        more = f"; and {len(told) - LISTED} other reasons" if len(told) > LISTED else ""
        count = f": {len(bad)} of {total} rows cannot be used:" if len(bad) > 1 else ""
        raise UserError(
            f"{bad[0].file}{count} {'; '.join(told[:LISTED])}{more}",
            "Mend or remove them; `mlxtune data check` lists every one.",
        )


def _detect(source: str, number: int, row: dict[str, Any], columns: Mapping[str, str]) -> str:
    """The file's format, from its first row's keys; every other row must then fit it."""
    for name, (keys, _) in FORMATS.items():
        if all(key in row for key in keys):
            return name
    names = list(row)
    example = f"{{{names[0]}: prompt, {names[1]}: completion}}" if len(names) > 1 else "{NAME: text}"
    unused = ", ".join(name for name, meant in columns.items() if meant not in row)
    hint = f"Rename columns with --set 'data.columns={example}'."
    if inside := _rows_inside(row):
        hint = f"The rows are inside `{inside}`: make that list the whole file (jq .{inside} OLD.json > NEW.json)."
    raise UserError(
        f"{source} {place(source, number)}: no known row format has the keys {', '.join(names) or '(none)'}"
        + (f" (data.columns names {unused}, which the row does not have)" if unused else ""),
        f"Known: {'; '.join(' + '.join(keys) for keys, _ in FORMATS.values())}. {hint}",
    )


def _rows_inside(row: dict[str, Any]) -> str:
    """The key that holds the rows of a whole file, as a list of objects of a known format; "" where none does."""
    for key, value in row.items():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, dict) and any(all(name in first for name in keys) for keys, _ in FORMATS.values()):
            return key
    return ""


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
    return _chat(row, checked(row.get("messages"), "messages"))


def _chat(row: dict[str, Any], messages: list[dict[str, Any]]) -> list[Parsed]:
    """A conversation with the row's `system` column, as the first turn where it has none, and its tools."""
    system = text_of(row, "system", optional=True)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return [(messages, tools_of(row), None)]


def _conversations(row: dict[str, Any]) -> list[Parsed]:
    turns = listed(row.get("conversations"), "conversations must be a non-empty list of turns")
    if not all(isinstance(turn, dict) and "role" in turn for turn in turns):
        turns = _from_sharegpt(turns)
    return _chat(row, checked(turns, "conversations"))


def _from_sharegpt(turns: list[Any]) -> list[dict[str, Any]]:
    """OpenAI messages. What the assistant does without another speaking in between is one message: calls that follow
    one another, and a text before them. Observations answer the calls before them, in order.
    """
    messages: list[dict[str, Any]] = []
    calling = any(isinstance(turn, dict) and turn.get("from") == "function_call" for turn in turns)
    waiting: list[str] = []  # ids of calls without an observation so far
    for index, turn in enumerate(turns, 1):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise RowError(f"turn {index} is from {speaker!r}; allowed: {', '.join(SHAREGPT_ROLES)}")
        if not isinstance(turn.get("value"), str):
            raise RowError(f"turn {index} ({speaker}) must have text as its value")
        others = {key: value for key, value in turn.items() if key not in ("from", "value") and value is not None}
        message = {**others, "role": SHAREGPT_ROLES[speaker], "content": turn["value"]}
        if speaker == "function_call":
            message |= {"content": "", "tool_calls": _sharegpt_calls(index, turn["value"])}
            waiting += [call["id"] for call in message["tool_calls"]]
            if messages and _one_turn(messages[-1], others):
                messages[-1]["tool_calls"] = [*messages[-1].get("tool_calls", []), *message["tool_calls"]]
                continue
        elif message["role"] == "tool":
            if calling and not waiting:
                raise RowError(f"turn {index} ({speaker}) answers no call: each function_call has one already")
            message["tool_call_id"] = waiting.pop(0) if waiting else f"call{index:05d}"
        elif message["role"] != "assistant":
            waiting = []  # a call that was passed over gets no later observation
        messages.append(message)
    return messages


def _one_turn(before: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether calls belong to the message before them; others: what else their turn has, such as a weight."""
    kept = {key: value for key, value in before.items() if key not in ("role", "content", "tool_calls")}
    return before["role"] == "assistant" and kept == others


def _sharegpt_calls(index: int, value: str) -> list[dict[str, Any]]:
    wrong = f"turn {index}: a function_call must be a JSON object with name and arguments"
    call = from_json(value, wrong)
    calls = call if isinstance(call, list) else [call]
    if any(not isinstance(one, dict) or not isinstance(one.get("name"), str) for one in calls):
        raise RowError(wrong)
    return [  # an id has nine letters: Mistral wants them
        {
            "id": f"call{index:03d}{at:02d}",
            "function": {"name": one["name"], "arguments": arguments_of(one, f"turn {index}")},
        }
        for at, one in enumerate(calls)
    ]


def _alpaca(row: dict[str, Any]) -> list[Parsed]:
    answer = text_of(row, "response" if row.get("response") is not None else "output")
    return _instructed(row, text_of(row, "input", optional=True), answer)


def _instructed(row: dict[str, Any], extra: str, answer: str) -> list[Parsed]:
    """As a chat: the instruction, then the input after a blank line, as Alpaca's own prompt orders them."""
    instruction = text_of(row, "instruction")
    question = {"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction}
    if extra:
        question |= {"instruction": instruction, "input": extra}  # for templates that print them apart
    earlier = row.get("history") or []
    if not isinstance(earlier, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in earlier):
        raise RowError("history must be a list of [question, answer] pairs")
    said = [{"role": role, "content": text} for pair in earlier for role, text in zip(ROLES[2:4], pair, strict=True)]
    return _chat(row, checked([*said, question, {"role": "assistant", "content": answer}], "history"))


def _self_instruct(row: dict[str, Any]) -> list[Parsed]:
    what = "instances must be a non-empty list of objects with input and output"
    instances = listed(row.get("instances"), what)
    if any(not isinstance(one, dict) for one in instances):
        raise RowError(what)
    answers = [(text_of(one, "input", optional=True), text_of(one, "output")) for one in instances]
    return [parsed for asked, answer in answers for parsed in _instructed(row, asked, answer)]


def _prompt_completion(row: dict[str, Any]) -> list[Parsed]:
    if isinstance(row.get("prompt"), list):
        return _chat(row, checked(row["prompt"], "prompt") + checked(row.get("completion"), "completion"))
    question = {"role": "user", "content": text_of(row, "prompt")}
    return _chat(row, [question, {"role": "assistant", "content": text_of(row, "completion")}])


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
