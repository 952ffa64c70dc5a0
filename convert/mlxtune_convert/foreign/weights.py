"""Every tensor of a model folder's safetensors files, read one at a time, in types that MLX and numpy do not have."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mlxtune_convert.errors import UserError
from mlxtune_convert.foreign.original import advice
from mlxtune_convert.gguf.quant_blocks import unpack
from mlxtune_convert.tensors import weight_files

TYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
FLOAT8 = ("F8_E4M3", "F8_E5M2")
FLOATS = ("F64", "F32", "F16", "BF16")
HINT = "The folder is damaged, or of a format that is not known: download it again, or take the 16-bit original."


@dataclass(frozen=True)
class Place:
    """Where a tensor is."""

    file: Path  # that holds it
    kind: str  # its type, by safetensors' name, such as BF16
    shape: tuple[int, ...]  # as the file has it
    start: int  # of its bytes in the file
    end: int  # of its bytes in the file


class Weights:
    """The tensors of a folder. Headers are read at once, data only when asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError as `weight_files` does."""
        self.folder = folder
        self.places: dict[str, Place] = {}
        self._files: dict[Path, np.ndarray] = {}
        for file in weight_files(folder):
            header, begin = _header(file)
            for name, entry in header.items():
                first, last = entry["data_offsets"]
                self.places[name] = Place(file, entry["dtype"], tuple(entry["shape"]), begin + first, begin + last)

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def kind(self, name: str) -> str:
        """safetensors' name of a tensor's type, or "" where there is no such tensor."""
        return self.places[name].kind if name in self.places else ""

    def shape(self, name: str) -> tuple[int, ...]:
        return self.places[name].shape

    def ending(self, suffix: str) -> list[str]:
        """Names with this ending, without it."""
        return [name.removesuffix(suffix) for name in self if name.endswith(suffix)]

    def array(self, name: str) -> np.ndarray:
        """A tensor in the file's shape, mapped: nothing is read before it is used.

        Raises UserError for an unknown type.
        """
        place = self.places[name]
        kind = TYPES.get(place.kind)
        if kind is None:
            raise UserError(f"{self.folder}: {name} has the type {place.kind}, which is not known", HINT)
        if place.file not in self._files:  # one mapping per file: each holds a file descriptor
            self._files[place.file] = np.memmap(place.file, np.uint8, "r").view(np.ndarray)
        data = self._files[place.file][place.start : place.end]
        return data.view(kind).reshape(place.shape)

    def needed(self, name: str, owner: str) -> np.ndarray:
        """A tensor, in the file's shape, that `owner` cannot do without. Raises UserError where it is missing."""
        if name not in self:
            raise UserError(f"{self.folder}: {owner} has no {name}", HINT)
        return self.array(name)

    def wrong(self, name: str, why: str) -> UserError:
        """The error for a tensor that does not fit what it belongs to."""
        return UserError(f"{self.folder}: {name} {why}", HINT)

    def unread(self, what: str) -> UserError:
        """The error for a variant of a format that is not read."""
        return UserError(f"{self.folder}: {what} cannot be read", advice(self.folder))

    def words(self, name: str, owner: str, axes: int = 2) -> np.ndarray:
        """A tensor of packed codes as uint32, in the file's shape. Raises UserError for another type or other axes."""
        array = self.needed(name, owner)
        if array.dtype not in (np.int32, np.uint32) or array.ndim != axes:
            raise self.wrong(name, f"must be int32 with {axes} axes: it is {self.described(name)}")
        return array.view(np.uint32)

    def scales(self, name: str, owner: str, exponents: bool = False) -> np.ndarray:
        """Scales as float32, in the file's shape. exponents: bytes stand for powers of two (E8M0).

        Raises UserError where they are missing, of a type that no scale has, or not finite.
        """
        array = self.needed(name, owner)
        if exponents and array.dtype == np.uint8:
            array = array.view(TYPES["F8_E8M0"])
        elif self.kind(name) not in (*FLOATS, *FLOAT8, "F8_E8M0"):
            raise self.wrong(name, f"holds scales, which must be floats: it is {self.described(name)}")
        values: np.ndarray = array.astype(np.float32)
        if not np.isfinite(values).all():
            raise self.wrong(name, "holds a scale that is no finite number")
        return values

    def described(self, name: str) -> str:
        """Type and shape, for messages."""
        return f"{self.kind(name)} {list(self.shape(name))}"


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a file that `weight_files` found whole, and where its data begin."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def unpacked(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """[rows, words] uint32 -> [rows, columns] uint8: codes as one stream per row, least significant bit first."""
    rows, count = words.shape
    padded = -count % bits  # whole words of codes only
    if padded:
        words = np.concatenate([words, np.zeros((rows, padded), np.uint32)], axis=1)
    return unpack(np.ascontiguousarray(words), bits)[:, :columns]


def module_of(name: str) -> str:
    """model.layers.0.mlp.up_proj for its weight."""
    return name.removesuffix(".weight")


# What only a quantized activation or cache needs: the weights do not depend on it.
OF_ACTIVATIONS = re.compile(
    r"[._](activation_scale(_inv)?|(input|output)(_global)?_scale|(input|output)_zero_point|[kvq]_(scale|zero_point))$"
)
