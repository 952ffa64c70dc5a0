"""safetensors folders: whole files in, bounded shards out.

The format in one line: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then
the tensors' bytes (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - gives numpy the bfloat16 that safetensors' own reader asks it for
import numpy as np
from safetensors import SafetensorError, safe_open

from mlxtune_convert.errors import UserError
from mlxtune_convert.files import matching, read_json, write_json

SHARD_BYTES = 2 << 30


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> {shape} of one file. Raises UserError when it is no safetensors file, or not a whole one."""
    try:
        with safe_open(path, "numpy") as file:
            return {name: {"shape": file.get_slice(name).get_shape()} for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: torn, or not a safetensors file ({error})",
            "The file is incomplete or damaged: copy or download it again.",
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, each checked to be whole.

    Raises UserError naming a missing or torn shard.
    """
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("model*.safetensors"))
    if index.is_file():
        table = read_json(index, "the list of shards").get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise UserError(f"{index}: weight_map must give the file of each tensor", "Copy or download it again.")
        named = sorted(set(table.values()))
        for name in named:
            if name != Path(name).name:
                raise UserError(f"{index} names a file outside the folder: {name[:80]}", "Copy or download it again.")
        missing = [name for name in named if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(named)} weight files are missing, first {missing[0]}",
                "Copy or download the folder again.",
            )
    if not files:
        others = [path.name for pattern in ("*.bin", "*.pt*") for path in matching(folder, pattern)]
        why = f" (only {others[0]}: pickled weights are never loaded)" if others else ""
        raise UserError(
            f"{folder} has no model*.safetensors{why}", "A model folder holds config.json and safetensors files."
        )
    for file in files:
        read_header(file)
    return files


def _entry(array: np.ndarray, at: int) -> dict[str, Any]:
    """A tensor's line in the header. at: where its bytes begin."""
    kind = array.dtype.name
    for name, short in (("bfloat", "BF"), ("float", "F"), ("uint", "U"), ("int", "I"), ("bool", "BOOL")):
        kind = kind.replace(name, short)
    return {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}


def _header(entries: dict[str, Any], metadata: dict[str, str]) -> bytes:
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def _raw(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class ShardWriter:
    """Writes tensors as numbered safetensors shards of bounded size.

    Use: `add(name, array)` for every tensor, then `close()`. A shard's data goes to disk as it comes, and behind its
    header when the shard is full: no more than one tensor is in memory.
    """

    def __init__(self, folder: Path, metadata: dict[str, str], shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.metadata = metadata
        self.shard_bytes = shard_bytes
        self.total_bytes = 0
        self._data = folder / "shard.data"
        self._file = self._data.open("wb")
        self._entries: dict[str, dict[str, Any]] = {}
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, name: str, array: np.ndarray) -> None:
        if self._entries and self._file.tell() + array.nbytes > self.shard_bytes:
            self._flush()
        self._entries[name] = _entry(array, self._file.tell())
        self._file.write(_raw(array))
        self.total_bytes += array.nbytes

    def _flush(self) -> None:
        self._file.close()
        path = self.folder / f"shard-{len(self._shards) + 1:05d}.safetensors"
        with path.open("wb") as out, self._data.open("rb") as data:
            out.write(_header(self._entries, self.metadata))
            shutil.copyfileobj(data, out, 16 << 20)
        self._shards.append((path, list(self._entries)))
        self._entries = {}
        self._file = self._data.open("wb")

    def abandon(self) -> None:
        """Close what is open, after an error: the folder is thrown away."""
        self._file.close()

    def close(self) -> None:
        """Write the last shard, give all their final names, and write the index when there are several."""
        self._flush()
        self._file.close()
        self._data.unlink()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._shards, 1):
            final = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / "model.safetensors.index.json", index)


def save_checked(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write one safetensors file. A full disk raises OSError (the library would report it as an error of its own)."""
    entries, at = {}, 0
    for name, array in tensors.items():
        entries[name] = _entry(array, at)
        at += array.nbytes
    with path.open("wb") as out:
        out.write(_header(entries, metadata))
        for array in tensors.values():
            out.write(_raw(array))
