"""Rows of any known format -> conversations.

The format of a file is shown by the columns of its first row; every other row must then fit it. A row that does not
becomes a `Bad` row with its line: nothing is skipped in silence.

Where preferences are asked for, a row that can be read as a pair is one, whatever else it holds, and a `label` beside a
conversation rates its answer. Else rows that have an ordinary format are read by it, and a label is what `rated` says.

To add a format:
1. write its parser in `parsers.py`, or in `pairs.py`: a row -> the conversations or texts in it;
2. give it an entry in FORMATS below: its name, the columns that show it, and what else it reads;
3. add a row of it to tests/test_records.py, or tests/test_pairs.py, and one that is wrong with the words of its error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxtune.data.rows import pairs, parsers
from mlxtune.data.rows.parsers import Parsed
from mlxtune.data.rows.rated import LABEL, as_learned, rated
from mlxtune.data.rows.readers import Bad, Placed, kind_of, place, raw_rows
from mlxtune.data.rows.sides import Side
from mlxtune.data.rows.values import RowError
from mlxtune.errors import UserError


@dataclass(frozen=True)
class Format:
    """A way to write conversations or texts as rows."""

    required: tuple[str, ...]  # the columns that show the format: a first row that has all of them is of it
    parse: Callable[[dict[str, Any]], list[Parsed]]  # raises RowError for a row that does not fit
    optional: tuple[str, ...] = ()  # what else it reads, beside COMMON
    of_pairs: bool = False  # whether a row holds two answers to one prompt


COMMON = ("system", "tools", "functions")  # columns that every format of conversations reads
FORMATS = {  # tried in this order; where preferences are asked for, those of pairs first
    "messages": Format(("messages",), parsers.openai),
    "pairs-sharegpt": Format(("conversations", *pairs.NAMES), pairs.sharegpt, of_pairs=True),
    "conversations": Format(("conversations",), parsers.sharegpt),
    "alpaca": Format(("instruction", "output"), parsers.alpaca, ("input", "history", "response")),
    "alpaca-response": Format(("instruction", "response"), parsers.alpaca, ("input", "history")),
    "self-instruct": Format(("instruction", "instances"), parsers.self_instruct, ("history",)),
    "prompt-completion": Format(("prompt", "completion"), parsers.prompt_completion),
    "text": Format(("text",), parsers.plain_text),
    "pairs": Format(("prompt", *pairs.NAMES), pairs.with_prompt, of_pairs=True),
    "pairs-alpaca": Format(("instruction", *pairs.NAMES), pairs.alpaca, ("input", "history"), of_pairs=True),
    "pairs-orca": Format(("question", *pairs.NAMES), pairs.orca, of_pairs=True),
    "pairs-openai": Format(("input", "preferred_output", "non_preferred_output"), pairs.openai, of_pairs=True),
    "pairs-conversations": Format(pairs.NAMES, pairs.without_prompt, of_pairs=True),
}
# Columns that some ordinary format reads; what else a row has stays beside its conversation.
ORDINARY = [known for known in FORMATS.values() if not known.of_pairs]
USED = set(COMMON).union(*(known.required + known.optional for known in ORDINARY))
EMPTY = {  # what a file without rows lacks
    ".jsonl": "Each line of a .jsonl file is one example.",
    ".json": "A .json file holds a list of examples.",
    **dict.fromkeys((".csv", ".tsv"), "Its first line names the columns; each line after it is one example."),
}
LISTED = 12  # bad rows, and reasons, that an error message names
CHUNK_ROWS, CHUNK_LETTERS = 512, 16 << 20  # that are worked on together, and in memory meanwhile


@dataclass(frozen=True)
class Record(Placed):
    """One conversation or text. Exactly one of `messages` and `text` is set."""

    format: str  # a key of FORMATS
    messages: list[dict[str, Any]] | None = None  # OpenAI messages
    tools: list[dict[str, Any]] | None = None  # in OpenAI's form; None for none
    text: str | None = None  # trained on as it stands
    fields: Mapping[str, Any] = field(default_factory=dict)  # the row's other values: column -> value
    # What was said of its answer. The records of a pair follow each other, the chosen one first.
    side: Side = Side.NONE
    prompt: int = 0  # how many of the messages are those that the answer answers, where the row tells them apart
    teaches_nothing: str = ""  # why nothing can be learnt from it, though it can be read; "" for nearly all
    may_be_rated: bool = False  # its label may be a rating or a class: nobody said that labels are ratings


def chunks(records: Iterable[Record | Bad]) -> Iterator[list[Record | Bad]]:
    """The rows in lists: about CHUNK_ROWS of them, fewer where their texts are long. A pair is in one list."""
    chunk: list[Record | Bad] = []
    letters = 0
    for record in records:
        chunk.append(record)
        if isinstance(record, Record):
            letters += letters_of(record)
        if is_first_of_pair(record):
            continue
        if len(chunk) >= CHUNK_ROWS or letters >= CHUNK_LETTERS:
            yield chunk
            chunk, letters = [], 0
    if chunk:
        yield chunk


def is_first_of_pair(record: Record | Bad) -> bool:
    """Whether the next record is the other answer of the same row."""
    return isinstance(record, Record) and record.side is Side.CHOSEN


def count_rows(records: Iterable[Record | Bad]) -> int:
    """How many rows there are among records: a pair is one."""
    return sum(not is_first_of_pair(record) for record in records)


def letters_of(record: Record) -> int:
    """Characters of a record's texts."""
    contents = [message.get("content") for message in record.messages or []]
    return sum(len(text) for text in (record.text, *contents) if isinstance(text, str))


def read(path: Path, columns: Mapping[str, str] = {}, preferences: bool = False) -> Iterator[Record | Bad]:
    """All rows of one file, one after the other.

    columns: the file's name of a column -> the name meant; some row must have each of them; preferences: whether rows
    are read to learn from what was preferred: pairs before all, and labels are ratings.

    Raises UserError when the file cannot be read, is empty, or has no known format.
    """
    yield from parse(str(path), raw_rows(path), columns, preferences)


def parse(
    source: str,
    rows: Iterable[tuple[int, dict[str, Any]] | Bad],
    columns: Mapping[str, str] = {},
    preferences: bool = False,
) -> Iterator[Record | Bad]:
    """Numbered raw rows -> records; `source` names them. preferences: as `read`. Raises UserError as `read` does."""
    name = ""  # of the format, once a row has shown it
    are_rated = False  # whether labels are ratings, as the same row shows
    is_empty, all_fit = True, True
    unseen = set(columns)
    for item in rows:
        is_empty = False
        if isinstance(item, Bad):
            yield item
            continue
        number, raw = item
        unseen -= raw.keys()
        names = [columns.get(key, key) for key in raw]
        if taken := _twice(names):
            yield Bad(source, number, f"data.columns gives {' and '.join(taken)} a name that is already taken")
            continue
        row = dict(zip(names, raw.values(), strict=True))
        if not name:
            name = _format_of_first_row(source, number, row, columns, preferences)
            are_rated = preferences and LABEL in row and not FORMATS[name].of_pairs
        known = FORMATS[name]
        try:
            if are_rated:
                conversations = rated(known.parse, row)
            else:
                conversations = known.parse(row) if known.of_pairs else as_learned(row, known.parse(row))
            for parsed in conversations:
                _check_characters([*parsed])
        except RowError as error:
            all_fit = False
            yield Bad(source, number, f"{error} (format: {name})")
            continue
        except RecursionError:
            yield Bad(source, number, "nested too deeply")
            continue
        others = {key: value for key, value in row.items() if key not in columns_read(name, are_rated)}
        for parsed in conversations:
            yield Record(
                source,
                number,
                name,
                messages=parsed.messages,
                tools=parsed.tools,
                text=parsed.text,
                fields=others,
                side=parsed.side,
                prompt=parsed.prompt,
                teaches_nothing=parsed.teaches_nothing,
                may_be_rated=parsed.may_be_rated,
            )
    if unseen and name and all_fit:
        raise UserError(f"{source}: no row has the column {', '.join(sorted(unseen))} that data.columns names")
    if is_empty:
        raise UserError(f"{source}: no rows", EMPTY.get(kind_of(Path(source)), ""))


def columns_read(name: str, are_rated: bool = False) -> set[str]:
    """The columns of a format that are not the user's own. A label is one where answers are rated; else it stays beside
    the conversation, for it may be the class of a text.
    """
    known = FORMATS[name]
    if known.of_pairs:
        return {*COMMON, *known.required, *known.optional}
    return USED | {LABEL} if are_rated else USED


def _twice(names: list[str]) -> list[str]:
    """The names that occur more than once, sorted."""
    return sorted({name for name in names if names.count(name) > 1})


def require_good(bad: list[Bad], total: int, or_else: str = "") -> None:
    """Raise UserError naming the rows that cannot be used, when there are any. bad: of one file; or_else: what else the
    command can do about them, a sentence.
    """
    if not bad:
        return
    by_reason: dict[str, list[Bad]] = {}
    for row in bad:
        by_reason.setdefault(row.reason, []).append(row)
    reasons = []
    for reason, rows in by_reason.items():
        places = rows[0].place + "".join(f", {row.row}" for row in rows[1:LISTED])
        if len(rows) > LISTED:
            places += f" and {len(rows) - LISTED} more"
        reasons.append(f"{places}: {reason}")
    count = f": {len(bad)} of {total} rows cannot be used:" if len(bad) > 1 else ""
    more = f"; and {len(reasons) - LISTED} other reasons" if len(reasons) > LISTED else ""
    raise UserError(
        f"{bad[0].file}{count} {'; '.join(reasons[:LISTED])}{more}",
        f"Mend or remove them; `mlxtune data check` lists every one. {or_else}".rstrip(),
    )


def without_pairs(records: Iterable[Record | Bad]) -> Iterator[Record | Bad]:
    """The same, for who takes every answer for a good one. Raises UserError for a pair, of which one answer is not."""
    for record in records:
        if is_first_of_pair(record):
            raise UserError(
                f"{record.file}: pairs of answers, of which one is preferred, are not read here",
                "Give rows with one answer each, such as the chosen ones.",
            )
        yield record


def _format_of(row: Mapping[str, Any], preferences: bool = False) -> str:
    """The first known format whose columns a row has; "" for none."""
    in_order = list(FORMATS.items())
    if preferences:
        in_order.sort(key=lambda item: not item[1].of_pairs)  # stable
    for name, known in in_order:
        if all(column in row for column in known.required):
            return name
    return ""


def _format_of_first_row(
    source: str, number: int, row: dict[str, Any], columns: Mapping[str, str], preferences: bool
) -> str:
    """The file's format, from its first row's columns; every other row must then fit it. Raises UserError for none."""
    found = _format_of(row, preferences)
    if found:
        return found
    names = list(row)
    message = f"{source} {place(source, number)}: no known row format has the keys {', '.join(names) or '(none)'}"
    unused = [name for name, meant in columns.items() if meant not in row]
    if unused:
        message += f" (data.columns names {', '.join(unused)}, which the row does not have)"
    inside = _rows_inside(row)
    if inside:
        hint = f"The rows are inside `{inside}`: make that list the whole file (jq .{inside} OLD.json > NEW.json)."
    else:
        hint = f"Rename columns with --set 'data.columns={_renaming(names)}'."
    known = "; ".join(" + ".join(known.required) for known in FORMATS.values())
    raise UserError(message, f"Known: {known}. {hint}")


def _renaming(names: list[str]) -> str:
    """How columns of such names might be meant, for a hint."""
    sides = [next((name for name in names if side[:6] in name.lower()), "") for side in pairs.NAMES]
    if all(sides):
        return "{" + ", ".join(f"{name}: {side}" for name, side in zip(sides, pairs.NAMES, strict=True)) + "}"
    if len(names) > 1:
        return f"{{{names[0]}: prompt, {names[1]}: completion}}"
    return "{NAME: text}"


def _rows_inside(row: dict[str, Any]) -> str:
    """The key that holds the rows of a whole file, as a list of objects of a known format; "" where none does."""
    for key, value in row.items():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, dict) and _format_of(first):
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
