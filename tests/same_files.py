"""What a file holds, as named parts that two revisions can be compared by: tensors, settings, events, lines.

Left out is what differs between two runs of one revision: times, measured memory, and the folder of the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (numpy learns of bfloat16)
import numpy as np
import yaml

Parts = dict[str, str]  # name of a part -> what it holds, or its digest

Reader = Callable[[Path, Path], Parts]

# Keys whose values are measured by a clock or by the allocator.
MEASURED = {"seconds", "peak_bytes", "time", "tokens_per_second"}
# The same in what a person is told.
SPOKEN = (
    (re.compile(r"tokens/s [\d,.]+"), "tokens/s #"),
    (re.compile(r"left [\d:]+"), "left #"),
    (re.compile(r"peak memory [\d.]+ \w+"), "peak memory #"),
    (re.compile(r"\b\d+(\.\d+)? ?(s|seconds|ms)\b"), "# s"),
)
# How training goes is drawn by the clock; what the lines say is in events.jsonl.
DRAWN = re.compile(r"step \d+/\d+ ")
# Files of which each revision may have its own; what the page of a run shows is in its events.jsonl.
UNSEEN = {".lock", "report.html"}


def parts(path: Path, root: Path) -> Parts:
    """What `path` holds. root: the folder whose name is taken out of every text."""
    if path.is_symlink():
        return {"link": str(path.readlink())}
    readers = {
        ".safetensors": _tensors,
        ".gguf": _gguf,
        ".jsonl": _json_lines,
        ".json": _json,
        ".yaml": _yaml,
        ".txt": _text,
        ".md": _text,
    }
    reader = readers.get(path.suffix, _bytes)
    return {name: value.replace(str(root), "<here>") for name, value in reader(path).items()}


def computed(path: Path, root: Path) -> Parts:
    """As `parts`, of a run that may have been resumed: the same bits, wherever in a file they stand. An optimizer that
    was read from a file writes its tensors in another order, which changes the digest of that file in state.json.
    """
    if path.name == "events.jsonl":
        return _numbered(_computed(_read_lines(path)))
    found = parts(path, root)
    return {name: found[name] for name in sorted(found) if not name.startswith("sha256.")}


def walk(root: Path) -> dict[str, Path]:
    """Every file below `root` by its name there."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file() or path.is_symlink())
    return {str(path.relative_to(root)): path for path in files if path.name not in UNSEEN}


def first_difference(old: Parts, new: Parts) -> str:
    """The first part that is not the same in both, in words; "" when there is none."""
    for name in [*old, *(name for name in new if name not in old)]:
        if old.get(name) != new.get(name):
            before, after = _shortened(old.get(name, "(nothing)"), new.get(name, "(nothing)"))
            return f"{name}: {before} -> {after}"
    if list(old) != list(new):
        return "the same parts in another order"
    return ""


def _shortened(before: str, after: str, most: int = 60) -> tuple[str, str]:
    """Both texts from shortly before the place where they part."""
    same = 0
    while same < min(len(before), len(after)) and before[same] == after[same]:
        same += 1
    start = max(0, same - 20)
    dots = "..." if start else ""
    return dots + before[start : start + most], dots + after[start : start + most]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _bytes(path: Path) -> Parts:
    return {"bytes": _digest(path.read_bytes())}


def _tensors(path: Path) -> Parts:
    """Of safetensors: the metadata, and of each tensor its type, shape and digest, in the order of the file."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    found = _flat(header.pop("__metadata__", {}), "metadata")
    for name, tensor in header.items():
        start, end = tensor["data_offsets"]
        found[name] = f"{tensor['dtype']} {tensor['shape']} {_digest(whole[8 + length + start : 8 + length + end])}"
    return found


def _gguf(path: Path) -> Parts:
    """Of GGUF: every field and of each tensor its type, shape and digest, as the gguf package reads them, and the
    whole file.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except ValueError:  # a file without the tensors' bytes
        return _bytes(path)
    found: Parts = {}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            found[name] = json.dumps(field.contents(), default=str)
    for tensor in reader.tensors:
        data = _digest(np.ascontiguousarray(tensor.data).tobytes())
        found[tensor.name] = f"{tensor.tensor_type.name} {tensor.shape.tolist()} {data}"
    return {**found, **_bytes(path)}


def _json(path: Path) -> Parts:
    return _flat(json.loads(path.read_text(encoding="utf-8")))


def _yaml(path: Path) -> Parts:
    return _flat(yaml.safe_load(path.read_text(encoding="utf-8")))


def _json_lines(path: Path) -> Parts:
    values = _read_lines(path)
    resumed = path.name == "events.jsonl" and sum(event["kind"] == "begin" for event in values) > 1
    return _numbered(_computed(values) if resumed else values)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Every line but one that a kill cut off."""
    values = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            values.append(json.loads(line))
    return values


def _computed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The losses of a run's steps and evaluations. Where a kill met it is chance, and with it what was taken back and
    done again: of these the last counts.
    """
    last: dict[tuple[str, int], dict[str, Any]] = {}
    for event in events:
        if event["kind"] in ("train", "eval"):
            last[event["kind"], event["step"]] = event
    return [last[key] for key in sorted(last)]


def _numbered(values: list[dict[str, Any]]) -> Parts:
    found: Parts = {}
    for number, value in enumerate(values, 1):
        found.update(_flat(value, str(number)))
    return found


def _flat(value: Any, name: str = "") -> Parts:
    """{"a": {"b": [1]}} -> {"a.b.0": "1"}. Numbers at full precision."""
    if isinstance(value, dict) and value:
        pairs = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list) and value:
        pairs = [(str(index), inner) for index, inner in enumerate(value)]
    else:
        return {name: _spoken(value) if isinstance(value, str) else json.dumps(value, default=str)}
    found: Parts = {}
    for key, inner in pairs:
        if key not in MEASURED:
            found.update(_flat(inner, f"{name}.{key}" if name else key))
    return found


def _text(path: Path) -> Parts:
    """Line by line; a line that is JSON as what it holds."""
    found: Parts = {}
    kept = (line for line in path.read_text(encoding="utf-8").splitlines() if not DRAWN.match(line))
    for number, line in enumerate(kept, 1):
        if line.startswith("{"):
            try:
                found.update(_flat(json.loads(line), f"line {number}"))
                continue
            except json.JSONDecodeError:
                pass
        found[f"line {number}"] = _spoken(line)
    return found


def _spoken(text: str) -> str:
    for pattern, instead in SPOKEN:
        text = pattern.sub(instead, text)
    return text
