"""The GGUF container, version 3: checked headers in, streamed tensors out (ggml/docs/gguf.md).

A header is: magic, version, two counts; key-value pairs; for every tensor its name, shape (innermost first), type and
offset; padding; then the tensors. The gguf package's own reader trusts every count and offset in the file, and its
writer needs every tensor's bytes before the first is written; here a damaged file ends in one line, and a model is
never whole in memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mlxtune_convert.errors import UserError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
MAX_ITEMS = 1 << 23  # entries in a file's arrays: some ten times the largest vocabulary
MAX_DIMENSIONS, MAX_NAME = 4, 256  # ggml has tensors of up to 4 dimensions; a name has so many letters
ALIGNMENTS = tuple(1 << power for power in range(17))
# Value types by number: struct's letter; None for strings and arrays.
LETTERS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


class Field(NamedTuple):
    """A metadata value with its type."""

    kind: int  # number of its type: U32, STRING, ARRAY or another index of LETTERS
    value: Any  # a number, a string, or a list of either
    item: int = 0  # of an array: the type of its entries

    @staticmethod
    def of(value: Any) -> Field:
        """The usual type of a Python value: uint32, float32, bool, string, or an array of strings, int32 or so."""
        if isinstance(value, list | tuple):
            first = Field.of(value[0]).kind if value else STRING
            item = I32 if first == U32 else first  # as gguf's own writer has it
            return Field(ARRAY, list(value), item)
        kinds = {bool: BOOL, int: U32, float: F32, str: STRING}
        return Field(kinds[type(value)], value)


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is in a file."""

    name: str  # such as blk.0.attn_q.weight
    kind: str  # GGUF type, such as F32 or Q4_0
    shape: tuple[int, ...]  # in weights, outermost first (the file has it innermost first)
    offset: int  # of its first byte, from the start of the file

    @property
    def nbytes(self) -> int:
        return stored_bytes(self.kind, self.shape)


def stored_bytes(kind: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor takes in a file. shape: in weights, outermost first."""
    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return prod(shape) // weights * size


@dataclass(frozen=True)
class File:
    """An opened GGUF file; each tensor is read when it is asked for."""

    path: Path  # of the file
    fields: dict[str, Field]  # the metadata by key, in the file's order
    tensors: dict[str, Tensor]  # by name, in the file's order
    header_bytes: int  # before the first tensor

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key."""
        return self.fields[key].value if key in self.fields else default

    def rows(self, name: str) -> np.ndarray:
        """A tensor as the file holds it: floats in their shape; blocks as uint8 with the row's bytes last."""
        tensor = self.tensors[name]
        raw = np.fromfile(self.path, np.uint8, tensor.nbytes, offset=tensor.offset)
        if tensor.kind in FLOATS:
            return raw.view(FLOATS[tensor.kind]).reshape(tensor.shape)
        return raw.reshape(*tensor.shape[:-1], -1)


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does, whatever it is called."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read(path: Path, header_only: bool = False) -> File:
    """Open and check a GGUF file. header_only: the file is known to hold no tensor bytes.

    Raises UserError for what is not GGUF, is torn, or contradicts itself: counts, names, types, sizes, overlaps.
    """
    try:
        if path.stat().st_size < 24:
            raise _Torn("it is too short")
        mapped = np.memmap(path, mode="r")
        fields, tensors, at = _Cursor(memoryview(mapped.data)).header()
        alignment = _alignment(fields)
        start = -(-at // alignment) * alignment
        placed = {t.name: Tensor(t.name, t.kind, t.shape, t.offset + start) for t in tensors}
        if not header_only:
            _check_places(list(placed.values()), alignment, start, len(mapped))
    except (_Torn, struct.error) as error:
        raise UserError(f"{path}: not a GGUF file, or a damaged one ({error})", "Copy or download it again.") from error
    return File(path, fields, placed, start)


def read_back(path: Path, tensors: Iterable[tuple[str, str, np.ndarray]]) -> int:
    """Compare a file with what was to be written; return how many tensors that is. Raises UserError.

    tensors: (name, GGUF type, array of any shape: floats or uint8 blocks).
    """
    file, count = read(path), 0
    for name, kind, rows in tensors:
        if kind != file.tensors[name].kind or rows.tobytes() != file.rows(name).tobytes():
            raise UserError(f"{name}: the file does not hold what was written", "Check the disk.")
        count += 1
    return count


class _Torn(Exception):
    """The file contradicts itself, or ends too early; `read` says so to the user."""


def _alignment(fields: dict[str, Field]) -> int:
    """Tensors begin at multiples of so many bytes."""
    found = fields["general.alignment"].value if "general.alignment" in fields else ALIGNMENT
    if found not in ALIGNMENTS:
        raise _Torn(f"its alignment is {found}")
    return int(found)


def _check_places(tensors: list[Tensor], alignment: int, start: int, size: int) -> None:
    """start: where tensors may begin; size: of the file, both in bytes."""
    end = start
    for tensor in sorted(tensors, key=lambda t: t.offset):
        if tensor.offset < end or tensor.offset % alignment:
            raise _Torn(f"tensor {tensor.name} overlaps another, or is not aligned")
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise _Torn(f"tensor {tensor.name} ends at byte {end:,}, the file at {size:,}")


class _Cursor:
    """Reads the header; every length is checked against what is left before it is used."""

    def __init__(self, data: memoryview) -> None:
        self.data = data  # the whole file
        self.at = 0  # the byte that is read next
        self.items = 0  # entries of all arrays so far

    def header(self) -> tuple[dict[str, Field], list[Tensor], int]:
        """Fields, tensors (their offsets from the first tensor) and the number of bytes that were read."""
        if bytes(self.take(4)) != MAGIC:
            raise _Torn("it does not begin with GGUF")
        version = self.number("I")
        if version not in (2, VERSION):
            other = "big-endian" if version > 0xFFFF else f"version {version}"
            raise _Torn(f"{other}; versions 2 and 3, little-endian, can be read")
        tensor_count, field_count = self.number("Q"), self.number("Q")
        if field_count > MAX_ITEMS or tensor_count > MAX_ITEMS:
            raise _Torn(f"it claims {tensor_count:,} tensors and {field_count:,} values")
        fields: dict[str, Field] = {}
        for _ in range(field_count):
            key = self.name()
            if key in fields:
                raise _Torn(f"the key {key!r} occurs twice")
            fields[key] = self.value(self.number("I"))
        tensors = [self.tensor() for _ in range(tensor_count)]
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise _Torn("a tensor's name occurs twice")
        return fields, tensors, self.at

    def take(self, count: int) -> memoryview:
        """The next bytes."""
        if count > len(self.data) - self.at:
            raise _Torn(f"it ends at byte {len(self.data):,}, in the middle of its header")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, letter: str) -> Any:
        """The next number. letter: struct's, of its type."""
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def text(self) -> str:
        """The next string: its length, then UTF-8."""
        raw = self.take(self.number("Q"))
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise _Torn(f"invalid UTF-8 before byte {self.at:,}") from error

    def name(self) -> str:
        name = self.text()
        if not name.isprintable() or len(name) > MAX_NAME:
            raise _Torn(f"the name {name[:40]!r}")
        return name

    def value(self, kind: int) -> Field:
        if kind == STRING:
            return Field(STRING, self.text())
        if kind == ARRAY:
            return self.array()
        return Field(kind, self.number(self.letter(kind)))

    def array(self) -> Field:
        """The next array: the type of its entries, their number, and they."""
        item, count = self.number("I"), self.number("Q")
        self.items += count
        if self.items > MAX_ITEMS:
            raise _Torn(f"an array of {count:,} entries")
        if item == STRING:
            return Field(ARRAY, [self.text() for _ in range(count)], item)
        letter = self.letter(item)
        raw = self.take(count * struct.calcsize("<" + letter))
        return Field(ARRAY, np.frombuffer(raw, "<" + letter).tolist(), item)

    def letter(self, kind: int) -> str:
        """struct's letter of a type that is a number."""
        letter = LETTERS[kind] if kind < len(LETTERS) else None
        if letter is None:
            raise _Torn(f"unknown value type {kind} before byte {self.at:,}")
        return letter

    def tensor(self) -> Tensor:
        """The next entry of the table of tensors."""
        name, dimensions = self.name(), self.number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _Torn(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(reversed([self.number("Q") for _ in range(dimensions)]))
        number, offset = self.number("I"), self.number("Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise _Torn(f"tensor {name!r} has the unknown type {number}") from None
        if 0 in shape or shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise _Torn(f"tensor {name!r} of type {kind.name} has the shape {shape}")
        return Tensor(name, kind.name, shape, offset)


def _packed_text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _packed_value(kind: int, value: Any) -> bytes:
    return _packed_text(value) if kind == STRING else struct.pack(f"<{LETTERS[kind]}", value)


def _packed(field: Field) -> bytes:
    """A field's type and value, as a header has them after the key."""
    if field.kind != ARRAY:
        return struct.pack("<I", field.kind) + _packed_value(field.kind, field.value)
    head = struct.pack("<IIQ", ARRAY, field.item, len(field.value))
    return head + b"".join(_packed_value(field.item, value) for value in field.value)


def header(fields: dict[str, Field], tensors: Sequence[Tensor], start: int = 0) -> bytes:
    """The bytes before the tensors; `start` is where those begin (the same length for any)."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(fields))]
    for key, field in fields.items():
        parts += [_packed_text(key), _packed(field)]
    for tensor in tensors:
        number = GGMLQuantizationType[tensor.kind].value
        dimensions = len(tensor.shape)
        parts += [_packed_text(tensor.name), struct.pack("<I", dimensions)]
        parts.append(struct.pack(f"<{dimensions}QIQ", *reversed(tensor.shape), number, tensor.offset - start))
    out = b"".join(parts)
    return out + b"\0" * (-len(out) % _alignment(fields))


class Writer:
    """Writes a GGUF file tensor by tensor; the header, whose length is known from the names, is written last.

    Use: `with Writer(path, fields, {name: shape}) as writer: writer.add(name, kind, array)` for each, in any order.
    """

    def __init__(self, path: Path, fields: dict[str, Field], shapes: dict[str, tuple[int, ...]]) -> None:
        self.path, self.fields, self.shapes = path, fields, shapes
        self.alignment = _alignment(fields)
        planned = [Tensor(name, "F32", shape, 0) for name, shape in shapes.items()]
        self.start = len(header(fields, planned))
        self.tensors: dict[str, Tensor] = {}

    def __enter__(self) -> Writer:
        self._file = self.path.open("wb")
        self._file.write(b"\0" * self.start)
        return self

    def add(self, name: str, kind: str, array: np.ndarray) -> None:
        """array: floats, or uint8 blocks, of any shape; its bytes are written as they are."""
        tensor = Tensor(name, kind, self.shapes[name], self._file.tell())
        assert name not in self.tensors and array.nbytes == tensor.nbytes, (name, kind, array.nbytes, tensor.nbytes)
        np.ascontiguousarray(array).view(np.uint8).tofile(self._file)
        self._file.write(b"\0" * (-self._file.tell() % self.alignment))
        self.tensors[name] = tensor

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                assert self.tensors.keys() == self.shapes.keys(), self.shapes.keys() ^ self.tensors.keys()
                self._file.seek(0)
                self._file.write(header(self.fields, list(self.tensors.values()), self.start))  # in the data's order
        finally:
            self._file.close()
