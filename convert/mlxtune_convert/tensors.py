"""safetensors folders: checked headers in, bounded shards out.

The format in one line: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then
the tensors' bytes (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mlxtune_convert.errors import UserError
from mlxtune_convert.files import read_json, write_json

SHARD_BYTES = 2 << 30
DTYPES = {
    **{
        f"{kind}{bits}": f"{letter}{bits}" for kind, letter in (("int", "I"), ("uint", "U")) for bits in (8, 16, 32, 64)
    },
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "bool": "BOOL",
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def read_header(path: Path) -> dict[str, dict]:
    """Name -> {dtype, shape, data_offsets} of one file.

    Raises UserError when the file is no safetensors file or is shorter or longer than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise UserError(f"{path}: not a safetensors file (or a torn one)", "Copy or download it again.")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}: not a safetensors file (unreadable header)", "Copy or download it again."
            ) from error
    if 8 + length + end != size:
        raise UserError(
            f"{path}: {size:,} bytes, its header promises {8 + length + end:,}",
            "The file is incomplete: copy or download it again.",
        )
    return header


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
        others = [path.name for path in folder.glob("*.bin")] + [path.name for path in folder.glob("*.pt*")]
        why = f" (only {others[0]}: pickled weights are never loaded)" if others else ""
        raise UserError(
            f"{folder} has no model*.safetensors{why}", "A model folder holds config.json and safetensors files."
        )
    for file in files:
        read_header(file)
    return files


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
        at = self._file.tell()
        if self._entries and at + array.nbytes > self.shard_bytes:
            self._flush()
            at = 0
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        place = {"shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        self._entries[name] = {"dtype": DTYPES[array.dtype.name], **place}
        self.total_bytes += array.nbytes

    def _flush(self) -> None:
        self._file.close()
        path = self.folder / f"shard-{len(self._shards) + 1:05d}.safetensors"
        header = json.dumps({"__metadata__": self.metadata, **self._entries}).encode()
        header += b" " * (-len(header) % 8)
        with path.open("wb") as out, self._data.open("rb") as data:
            out.write(struct.pack("<Q", len(header)) + header)
            shutil.copyfileobj(data, out, 16 << 20)
        self._shards.append((path, list(self._entries)))
        self._entries = {}
        self._file = self._data.open("wb")

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
    """Write one safetensors file. A full disk raises OSError (the library reports it as its own error)."""
    try:
        save_file(tensors, path, metadata)
    except Exception as error:  # safetensors wraps the operating system's error in its own type
        text = str(error)
        if "os error 28" in text or "No space left" in text:
            raise OSError(28, "No space left on device", str(path)) from error
        if "os error 13" in text or "Permission denied" in text:
            raise PermissionError(13, "Permission denied", str(path)) from error
        raise
    # The library writes through a private temporary file; give the result the mode any other new file has.
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
