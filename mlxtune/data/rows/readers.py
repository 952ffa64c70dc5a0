"""Data files -> numbered raw rows, one after the other: a file of any size is never in memory as a whole.

.jsonl, .json, .csv, .tsv and .parquet, all but the last also gzipped. Text is UTF-8, or UTF-16 or UTF-32 with a byte
order mark. A row that cannot be read is a `Bad` row; the rows after it are still read.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlxtune_convert.sizes import size

from mlxtune.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
ZIPPED = tuple(f"{suffix}.gz" for suffix in SUFFIXES[:4])
BYTE_ORDER_MARKS = {  # what a file begins with -> its encoding, the longer ones first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}  # of the fields of a .csv, as its header tells
# Bytes of a line or characters of a field: more than any text, less than a small machine's memory.
LONGEST = 256_000_000
PARQUET_ROWS = 32  # that are in memory at a time: a file of a few hundred bytes may name one long text a thousand times
LARGEST_JSON = 1_000_000_000  # bytes of a .json file, which is read as a whole; compressed ones are counted unpacked
LOOKED_AT = 1 << 24  # bytes of a .jsonl file that are looked at to say what else it is


@dataclass(frozen=True)
class Placed:
    """Something at a row of a file."""

    file: str  # its path, or another name of where the rows are from
    row: int  # line or index, from 1

    @property
    def place(self) -> str:
        return place(self.file, self.row)


@dataclass(frozen=True)
class Bad(Placed):
    """A row that cannot be used as it stands."""

    reason: str  # for people


Rows = Iterator[tuple[int, dict[str, Any]] | Bad]  # (1-based line or index, row)


def whole_text(file: Path, option: str) -> str:
    """What a text file holds. option: of the command line, that names it. Raises UserError for what is no text."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{option} {file}: {error.strerror}", "Name a text file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{option} {file}: not a text file (invalid UTF-8 at byte {error.start})") from error


def place(file: str, number: int) -> str:
    """Where a row is, in words. Only in JSON Lines is a row a line."""
    what = "line" if ".jsonl" in Path(file).suffixes else "row"
    return f"{what} {number}"


def kind_of(path: Path) -> str:
    """The suffix that tells how to read a file, without .gz; "" for an unknown one."""
    name = path.name
    if name.endswith(ZIPPED):
        name = name.removesuffix(".gz")
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    return ""


def raw_rows(path: Path) -> Rows:
    """The rows of a file.

    Raises UserError when the file as a whole cannot be read: missing, of an unknown type, not what its name says.
    """
    if not path.is_file():
        raise UserError(f"no data file {path}")
    kind = kind_of(path)
    if not kind:
        raise UserError(f"{path}: unknown file type {path.suffix or '(none)'}", f"Allowed: {', '.join(SUFFIXES)}.")
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            if kind == ".parquet":
                yield from _parquet(path, file)
            else:
                reader = {".csv": _csv, ".tsv": _csv, ".json": _json, ".jsonl": _json_lines}[kind]
                yield from reader(path, file, _encoding(path, file))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({_undecoded(error)})") from error
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV file ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _encoding(path: Path, file: IO[bytes]) -> str:
    """How a text file is encoded, by its first bytes. Raises UserError for UTF-16 that does not say which one it is."""
    start = file.read(4)
    file.seek(0)
    if 0 in start and not start.startswith(tuple(BYTE_ORDER_MARKS)):
        raise UserError(
            f"{path}: not UTF-8: a NUL byte is among the first four, as in UTF-16 without a byte order mark",
            "Save it as UTF-8.",
        )
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            return encoding
    return "utf-8-sig"


def _undecoded(error: UnicodeDecodeError) -> str:
    """What is no text, and where."""
    name = "UTF-8" if error.encoding.startswith("utf-8") else error.encoding.upper()
    return f"invalid {name} at byte {error.start}"


def _json_lines(path: Path, file: IO[bytes], encoding: str) -> Rows:
    first = True  # no row was read so far: the file may be something else as a whole
    for number, line in enumerate(_lines(file, encoding), 1):
        if line is None:
            yield Bad(str(path), number, f"longer than {size(LONGEST)}")
            continue
        if not line.strip():
            continue
        try:
            text = line if isinstance(line, str) else line.decode("utf-8-sig" if number == 1 else "utf-8")
            row = json.loads(text)
        except UnicodeDecodeError as error:
            yield Bad(str(path), number, f"not text ({_undecoded(error)} of the line)")
        except json.JSONDecodeError as error:
            if first:
                _refuse_json(path, encoding)
            yield Bad(str(path), number, f"not valid JSON ({error.msg}, column {error.colno})")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
            yield Bad(str(path), number, f"JSON that cannot be read ({error})")
        else:
            if first and isinstance(row, list):
                _refuse_json(path, encoding)
            yield _object(path, number, row)
        first = False


def _lines(file: IO[bytes], encoding: str) -> Iterator[bytes | str | None]:
    """Lines end at a line feed alone: JSON strings may hold U+2028 and its like. UTF-8 is not decoded yet, so that a
    line that is broken does not take the others with it. None stands for a line longer than LONGEST.
    """
    if encoding == "utf-8-sig":
        yield from _of_bounded_length(file, b"\n")
    else:
        with io.TextIOWrapper(file, encoding, newline="\n") as text:
            yield from _of_bounded_length(text, "\n")


def _of_bounded_length(file: Any, line_feed: Any) -> Iterator[Any]:
    """The lines of a file; None for one that is longer than LONGEST, of which no more is kept in memory.

    line_feed: as bytes or text, whatever the file gives.
    """
    while line := file.readline(LONGEST):
        if len(line) < LONGEST or line.endswith(line_feed):
            yield line
            continue
        rest = line
        while rest and not rest.endswith(line_feed):
            rest = file.readline(LONGEST)
        yield None


def _refuse_json(path: Path, encoding: str) -> None:
    """Raise UserError when a .jsonl file, whose first line is no object, is something else as a whole: one JSON array,
    or objects that go over several lines.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        text = codecs.getincrementaldecoder(encoding)(errors="replace").decode(file.read(LOOKED_AT)).lstrip()
    name = path.name.replace(".jsonl", ".json")
    is_array = text.startswith("[")
    first_object = text[1:].lstrip() if is_array else text
    try:
        found, end = json.JSONDecoder().raw_decode(first_object)
    except (ValueError, RecursionError):
        return
    if not isinstance(found, dict):
        return
    if is_array:
        line, _, others = text.partition("\n")
        if line.rstrip().endswith("]") and others.strip():  # a list in each line
            return
        raise UserError(f"{path}: this is one JSON array, not JSON Lines", f"Name it {name}.")
    if "\n" in text[:end]:
        raise UserError(
            f"{path}: its JSON objects go over several lines; in JSON Lines each is on a line of its own",
            f"Write each on one line, or put all of them into one array, [...], in a file {name}.",
        )


def _json(path: Path, file: IO[bytes], encoding: str) -> Rows:
    """The objects of a list, or one object: the whole file is one JSON value."""
    whole = file.read(LARGEST_JSON + 1)
    if len(whole) > LARGEST_JSON:
        raise UserError(
            f"{path}: larger than {size(LARGEST_JSON)}, and a .json file is read as a whole",
            "Write it as JSON Lines, one object per line, in a .jsonl file: these may be of any size.",
        )
    text = whole.decode(encoding)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "A file with one object per line is named .jsonl." if error.msg == "Extra data" else ""
        raise UserError(
            f"{path} line {error.lineno}: not valid JSON ({error.msg}, column {error.colno})", hint
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: JSON that cannot be read ({error})") from error
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, 1):
        yield _object(path, number, row)


def _csv(path: Path, file: IO[bytes], encoding: str) -> Rows:
    csv.field_size_limit(LONGEST)
    with io.TextIOWrapper(file, encoding=encoding, newline="") as text:
        separator = "\t" if kind_of(path) == ".tsv" else _separator(text)
        reader = csv.DictReader(text, strict=True, delimiter=separator)
        names = list(reader.fieldnames or [])
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"{path}: two columns are called {', '.join(twice)}", "Rename one of them.")
        for number, row in enumerate(reader, 1):
            if None in row:  # where the library puts fields without a name
                sign = f"a {SEPARATORS[separator]}"
                yield Bad(str(path), number, f"more fields than the header has; quote the fields that hold {sign}")
            else:
                yield number, row


def _separator(text: io.TextIOWrapper) -> str:
    """What stands between the fields of the header: commas, but for a header that no comma divides and semicolons or
    tabs do. A separator that leaves a quote sign in a name, as one inside of quotes does, is none.
    """
    for separator in SEPARATORS:
        text.seek(0)
        try:
            names = next(csv.reader(text, strict=True, delimiter=separator), [])
        except csv.Error:
            continue
        if len(names) > 1 and not any('"' in name for name in names):
            text.seek(0)
            return separator
    text.seek(0)
    return ","


def _parquet(path: Path, file: IO[bytes]) -> Rows:
    import pyarrow
    import pyarrow.parquet

    from mlxtune.data.rows import arrow

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=PARQUET_ROWS):
            yield from arrow.rows(str(path), batch, number)
            number += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file, or a damaged one (after row {number})") from error


def _object(path: Path, number: int, row: Any) -> tuple[int, dict[str, Any]] | Bad:
    """A numbered row; a Bad one where it is no JSON object."""
    if isinstance(row, dict):
        return number, row
    return Bad(str(path), number, f"expected a JSON object, found {type(row).__name__}")
