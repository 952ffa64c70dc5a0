"""Data files -> numbered raw rows, one after the other: a file of any size is never in memory as a whole.

.jsonl, .json, .csv and .parquet, the first three also gzipped. A row that cannot be read is a `Bad` row; the rows after
it are still read.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlxtune.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ZIPPED = tuple(f"{suffix}.gz" for suffix in SUFFIXES[:3])


@dataclass(frozen=True)
class Placed:
    """Something at a 1-based line (or index) of a file."""

    file: str
    row: int

    @property
    def place(self) -> str:
        return place(self.file, self.row)


@dataclass(frozen=True)
class Bad(Placed):
    """A row that cannot be used as it stands."""

    reason: str


Rows = Iterator[tuple[int, dict[str, Any]] | Bad]  # (1-based line or index, row)


def place(file: str, number: int) -> str:
    """Only in JSON Lines is a row a line."""
    return f"{'line' if '.jsonl' in Path(file).suffixes else 'row'} {number}"


def kind_of(path: Path) -> str:
    """The suffix that tells how to read a file, without .gz; "" for an unknown one."""
    name = path.name.removesuffix(".gz") if path.name.endswith(ZIPPED) else path.name
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def raw_rows(path: Path) -> Rows:
    """The rows of a file.

    Raises UserError when the file as a whole cannot be read: missing, of an unknown type, not what its name says.
    """
    if not path.is_file():
        raise UserError(f"no data file {path}")
    kind = kind_of(path)
    if not kind:
        raise UserError(f"{path}: unknown file type {path.suffix or '(none)'}", f"Allowed: {', '.join(SUFFIXES)}.")
    reader = {".csv": _csv, ".json": _json, ".jsonl": _json_lines, ".parquet": _parquet}[kind]
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            yield from reader(path, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (invalid UTF-8 at byte {error.start})") from error
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV file ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _json_lines(path: Path, file: IO[bytes]) -> Rows:
    # Lines end at a line feed alone: JSON strings may hold U+2028 and its like.
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield Bad(str(path), number, f"not text (invalid UTF-8 at byte {error.start} of the line)")
        except json.JSONDecodeError as error:
            yield Bad(str(path), number, f"not valid JSON ({error.msg}, column {error.colno})")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
            yield Bad(str(path), number, f"JSON that cannot be read ({error})")
        else:
            yield _object(path, number, row)


def _json(path: Path, file: IO[bytes]) -> Rows:
    text = file.read().decode("utf-8-sig")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "A file with one object per line is named .jsonl." if error.msg == "Extra data" else ""
        raise UserError(
            f"{path} line {error.lineno}: not valid JSON ({error.msg}, column {error.colno})", hint
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: JSON that cannot be read ({error})") from error
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield _object(path, number, row)


def _csv(path: Path, file: IO[bytes]) -> Rows:
    csv.field_size_limit(sys.maxsize)  # a long document is no error
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        names = list(reader.fieldnames or [])
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{path}: two columns are called {', '.join(twice)}", "Rename one of them.")
        for number, row in enumerate(reader, 1):
            if None in row:
                yield Bad(str(path), number, "more fields than the header has; quote the fields that hold a comma")
            else:
                yield number, row


def _parquet(path: Path, file: IO[bytes]) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, {key: _without_nulls(value) for key, value in row.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file, or a damaged one (after row {number})") from error


def _without_nulls(value: Any) -> Any:
    """Parquet gives every struct of a column the same fields, and fills those that a row does not have with null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _object(path: Path, number: int, row: Any) -> tuple[int, dict[str, Any]] | Bad:
    if isinstance(row, dict):
        return number, row
    return Bad(str(path), number, f"expected a JSON object, found {type(row).__name__}")
