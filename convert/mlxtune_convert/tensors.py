"""safetensors folders: whole files in, bounded shards out.

The format in one line: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then
the tensors' bytes (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - gives numpy the bfloat16 that safetensors' own reader asks it for
import numpy as np
from safetensors import SafetensorError, safe_open

from mlxtune_convert.errors import UserError
from mlxtune_convert.files import matching, read_json, refuse_links_out, write_json

SHARD_BYTES = 2 << 30
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NUMBERED = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class Weights:
    """Where a model's weights are."""

    files: list[Path]  # that hold them, each whole
    places: dict[str, Path]  # tensor -> its file
    notes: list[str]  # what a person must know of the folder's other files

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self.places)


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


def require_fractions(path: Path, name: str, array: np.ndarray) -> None:
    """Raise UserError for a tensor of an adapter, of any shape, that cannot have been trained: of whole numbers, or
    with one that is none (NaN) or infinite.
    """
    kind = array.dtype.name
    if "float" not in kind:
        raise UserError(f"{path}: {name} holds {kind}, not fractions", "It is damaged: copy it again.")
    if not np.isfinite(array.astype(np.float32)).all():
        raise UserError(f"{path}: {name} holds NaN or infinity", "The adapter is damaged, or its training diverged.")


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, each checked to be whole. Raises UserError as `weights_of` does."""
    return weights_of(folder).files


def weights_of(folder: Path) -> Weights:
    """The files that hold a model's weights, as transformers chooses them; none is ever mixed with what lies beside it.

    First what config.json names as transformers_weights, then model.safetensors, then the files of the index. Without
    any of these: the one model*.safetensors, or a complete set of numbered ones. Raises UserError naming a missing or
    torn file, what is wrong with the index, a tensor that two files hold with other numbers, or a link that leads out.
    """
    refuse_links_out(folder)
    notes: list[str] = []
    chosen = _chosen(folder)
    by_index = chosen is not None and chosen.suffix == ".json"
    if chosen is None:
        files = _without_index(folder, notes)
    elif by_index:
        files = _of_index(chosen)
    else:
        files = [chosen]
    headers = {file: read_header(file) for file in files}
    if chosen is not None and by_index:
        _compare(chosen, headers, notes)
    _refuse_two_of_one(headers)
    stray = [path.name for path in matching(folder, "model*.safetensors") if path not in files]
    if stray and chosen is not None:
        more = f" and {len(stray) - 1} more" if len(stray) > 1 else ""
        why = "names the model's files" if by_index else "is the model"
        notes.append(f"{stray[0]}{more} in {folder} is not read: {chosen.name} {why}")
    places = {}
    for file, header in headers.items():
        places.update(dict.fromkeys(header, file))
    return Weights(files, places, notes)


def _chosen(folder: Path) -> Path | None:
    """The one file that is the model, or the index that names its files; None without either."""
    asked = _asked_for(folder)
    if asked:
        return asked
    for name in (SINGLE, INDEX):
        if (folder / name).is_file():
            return folder / name
    return None


def _asked_for(folder: Path) -> Path | None:
    """The file that config.json names as the one with the weights, or None."""
    config = read_json(folder / "config.json", "a model folder") if (folder / "config.json").is_file() else {}
    name = config.get("transformers_weights")
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(
            f"{folder / 'config.json'}: transformers_weights is {str(name)[:80]!r}",
            "It must be the name of a .safetensors file, or of an index of them, in the folder.",
        )
    if name != Path(name).name:
        raise UserError(f"{folder / 'config.json'} names a weight file outside the folder: {name[:80]}")
    if not (folder / name).is_file():
        raise UserError(f"{folder} has no {name}, which config.json names", "Copy or download the folder again.")
    return folder / name


def read_index(index: Path) -> dict[str, str]:
    """Tensor -> file name, from an index. Raises UserError for what is none, or names a file outside the folder."""
    table = read_json(index, "the list of shards").get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise UserError(f"{index}: weight_map must give the file of each tensor", "Copy or download it again.")
    for name in sorted(set(table.values())):
        if name != Path(name).name:
            raise UserError(f"{index} names a file outside the folder: {name[:80]}", "Copy or download it again.")
        if not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name[:80]!r}, which is no safetensors file", "Copy or download it again.")
    return table


def _of_index(index: Path) -> list[Path]:
    folder, named = index.parent, sorted(set(read_index(index).values()))
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(named)} weight files are missing, first {missing[0][:80]}",
            "Copy or download the folder again.",
        )
    return [folder / name for name in named]


def _without_index(folder: Path, notes: list[str]) -> list[Path]:
    """The weights of a folder that has neither model.safetensors nor an index."""
    files = matching(folder, "model*.safetensors")
    if not files:
        others = [path.name for pattern in ("*.bin", "*.pt*") for path in matching(folder, pattern)]
        why = f" (only {others[0]}: pickled weights are never loaded)" if others else ""
        if matching(folder, "consolidated*.safetensors"):
            why = " (only consolidated.safetensors, which has the names of Mistral's own programs)"
        raise UserError(
            f"{folder} has no model*.safetensors{why}", "A model folder holds config.json and safetensors files."
        )
    numbered = [found for path in files if (found := NUMBERED.fullmatch(path.name))]
    counts = {int(found[2]) for found in numbered}
    if len(files) == 1 and not numbered:
        notes.append(f"{folder} has no {SINGLE}: {files[0].name} is read")
    elif len(numbered) < len(files) or len(counts) != 1:
        raise UserError(
            f"{folder}: which of {len(files)} files are the model is not said: {', '.join(p.name for p in files[:4])}",
            f"Leave those of one model in the folder: {SINGLE}, or the shards with their {INDEX}.",
        )
    elif len(files) != counts.pop():
        raise UserError(
            f"{folder} has {len(files)} of {int(numbered[0][2])} weight files, first {files[0].name}",
            "Copy or download the folder again.",
        )
    return files


def _compare(index: Path, headers: dict[Path, dict[str, Any]], notes: list[str]) -> None:
    """Hold the index against its files. Raises UserError for a tensor that none of them has; notes one that it does
    not name, which is read all the same (as transformers does).
    """
    named = read_index(index)
    held = {name for header in headers.values() for name in header}
    lacking = [name for name in named if name not in held]
    if lacking:
        raise UserError(
            f"{index} names {len(lacking)} tensors that its files do not hold, first {lacking[0][:80]} of "
            f"{named[lacking[0]]}",
            "The index and the files are of different models, or damaged: copy or download the folder again.",
        )
    more = sorted(held - named.keys())
    if more:
        notes.append(f"{index.name} does not name {len(more)} tensors of its files, first {more[0]}: they are read")


def _refuse_two_of_one(headers: dict[Path, dict[str, Any]]) -> None:
    """Raise UserError when two files hold one tensor with other numbers: which is the model's, nobody can know."""
    first: dict[str, Path] = {}
    for file, header in headers.items():
        for name in header:
            other = first.setdefault(name, file)
            if other != file and _stored(other, name) != _stored(file, name):
                raise UserError(
                    f"{other} and {file.name} both hold {name[:80]}, with other numbers",
                    "One is of another model: copy or download the folder again.",
                )


def _stored(path: Path, name: str) -> bytes:
    """The line of a tensor in its file's header, without the place, and its bytes."""
    with path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        entry = json.loads(file.read(size))[name]
        begin, end = entry["data_offsets"]
        file.seek(8 + size + begin)
        return json.dumps([entry["dtype"], entry["shape"]]).encode() + file.read(end - begin)


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
        """array: of any shape, which the file keeps."""
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
            final = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / INDEX, index)


def save_checked(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write one safetensors file. tensors: by name, of any shape.

    A full disk raises OSError (the library would report it as an error of its own).
    """
    entries, at = {}, 0
    for name, array in tensors.items():
        entries[name] = _entry(array, at)
        at += array.nbytes
    with path.open("wb") as out:
        out.write(_header(entries, metadata))
        for array in tensors.values():
            out.write(_raw(array))
