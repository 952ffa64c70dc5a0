"""Tokenized rows on disk, memory-mapped: a million of them do not live in Python lists.

A store is a folder with one array per property of the examples of one data file, made once for each choice of data,
tokenizer, template and options (and day, where the template prints the date), and kept in a cache folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from mlxtune_convert.files import new_folder, read_json, write_json

from mlxtune.data import duplicates
from mlxtune.data.chat import Example
from mlxtune.data.examples import Renderer, Row
from mlxtune.data.files import Bad
from mlxtune.data.records import Record, require_good
from mlxtune.errors import UserError
from mlxtune.sections import DataSection

VERSION = 1  # of the examples made from the same data: raised when rendering changes
KEPT_SECONDS = 30 * 24 * 3600  # how long a store that is not used stays in the cache folder
LISTED = 10_000  # dropped and damaged rows that are remembered one by one
CHUNK = 512
SHORTENED, DAMAGED, CHAT = 1, 2, 4  # flags of an example
OPTIONS = ("max_tokens", "train_on", "expand_turns", "template", "template_kwargs")
COLUMNS = {
    "row": np.int64,
    "part": np.int32,
    "flags": np.uint8,
    "hash": np.uint64,
    "length": np.int64,
    "targets": np.int64,
    "key": np.float64,
}


@dataclass(frozen=True)
class Store:
    """The examples of one file. ids and mask: flat, all examples one after the other; starts: [N + 1] where each
    begins; columns: [N] each (targets: supervised tokens; key: the value of the column to go up by); signature:
    [N, HASHES] or empty; all_hashes: of every row that could be read; facts: what else is to know (file, rows,
    dropped, damaged, lost: damaged so that nothing is left, digest, highest token).
    """

    ids: np.ndarray
    mask: np.ndarray
    starts: np.ndarray
    columns: dict[str, np.ndarray]
    signature: np.ndarray
    all_hashes: np.ndarray
    facts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def example(self, index: int) -> Example:
        part = slice(self.starts[index], self.starts[index + 1])
        return Example(self.ids[part], self.mask[part])


def of(
    source: str,
    records: Callable[[], Iterator[Record | Bad]],
    content: str,
    renderer: Renderer,
    progress: Callable[[str, int], None] = lambda source, rows: None,
) -> Store:
    """The store of one file, from the cache when it is there.

    content: a digest of the file's bytes, or "" when it has none and nothing may be kept. Raises UserError listing the
    rows that cannot be read.
    """
    section = renderer.section
    root = cache_folder(section)
    if root is None or not content or not _writable(root):
        folder = Path(tempfile.mkdtemp(prefix="mlxtune-"))
        try:
            _build(folder, source, records(), renderer, progress)
            made = _open(folder)
        except BaseException:
            shutil.rmtree(folder)
            raise
        weakref.finalize(made, shutil.rmtree, folder, True)
        return made
    folder = root / _key(content, renderer)
    if not (folder / "facts.json").is_file():
        with new_folder(folder, force=True) as work:
            _build(work, source, records(), renderer, progress)
        _prune(root)
    os.utime(folder)
    made = _open(folder)
    made.facts["file"] = source  # the same bytes may have had another name
    return made


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def cache_folder(section: DataSection) -> Path | None:
    """Where stores are kept; None: nowhere."""
    if section.cache == "off":
        return None
    if section.cache != "auto":
        return Path(section.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlxtune" / "rows"


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _key(content: str, renderer: Renderer) -> str:
    tokenizer, section = renderer.tokenizer, renderer.section
    known = [VERSION, content, tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token, str(tokenizer.chat_template)]
    known += [getattr(section, name) for name in OPTIONS]
    known += [section.columns, section.dedup == "near", section.order]
    if tokenizer.chat_template is not None and renderer.template.prints_date:
        known.append(section.date or date.today().isoformat())
    return hashlib.blake2b(json.dumps(known, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _prune(root: Path) -> None:
    """Remove the stores that nobody used for a while."""
    for folder in root.iterdir():
        facts = folder / "facts.json"
        if facts.is_file() and time.time() - folder.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _build(
    folder: Path, source: str, records: Iterator[Record | Bad], renderer: Renderer, progress: Callable[[str, int], None]
) -> None:
    """Write a store's files."""
    section = renderer.section
    tables: dict[str, list[np.ndarray]] = {name: [] for name in (*COLUMNS, "signature")}
    dropped: Counter[str] = Counter()
    facts: dict[str, Any] = {"file": source, "rows": 0, "dropped": {}, "damaged": [], "lost": 0, "highest": 0}
    bad: list[Bad] = []
    hashes: list[np.ndarray] = []
    digest = hashlib.blake2b(digest_size=16)
    with (folder / "ids.bin").open("wb") as ids, (folder / "mask.bin").open("wb") as mask:
        while chunk := list(islice(records, CHUNK)):
            good = [record for record in chunk if isinstance(record, Record)]
            bad += [record for record in chunk if isinstance(record, Bad)]
            facts["rows"] += len(chunk)
            hashes.append(np.array([duplicates.content_hash(record) for record in good], np.uint64))
            rows = renderer.rows(good)
            for row in rows:
                if row.dropped:
                    dropped[row.dropped] += 1
                    if sum(dropped.values()) <= LISTED:
                        facts["dropped"].setdefault(row.dropped, []).append(row.record.row)
                    facts["lost"] += bool(row.damage)
                if row.damage and len(facts["damaged"]) < LISTED:
                    facts["damaged"].append([row.place, "; ".join(damage.text for damage in row.damage)])
            kept = [row for row in rows if row.example is not None]
            if kept:
                flat, flags = (
                    np.concatenate([np.asarray(values, kind) for values in lists])
                    for lists, kind in (
                        ([row.example.ids for row in kept if row.example], np.int32),
                        ([row.example.mask for row in kept if row.example], np.uint8),
                    )
                )
                ids.write(flat.tobytes())
                mask.write(flags.tobytes())
                digest.update(flat.tobytes() + flags.tobytes())
                facts["highest"] = max(facts["highest"], int(flat.max()))
                for name, values in _values(kept, section).items():
                    tables[name].append(values)
            progress(source, facts["rows"])
    require_good(bad, facts["rows"])
    for name, parts in tables.items():
        empty = np.zeros((0, duplicates.HASHES), np.uint32) if name == "signature" else np.zeros(0, COLUMNS[name])
        np.save(folder / f"{name}.npy", np.concatenate(parts) if parts else empty)
    np.save(folder / "hashes.npy", np.concatenate(hashes) if hashes else np.zeros(0, np.uint64))
    facts["counts"] = dict(dropped)
    write_json(folder / "facts.json", {**facts, "digest": digest.hexdigest()})


def _values(rows: list[Row], section: DataSection) -> dict[str, np.ndarray]:
    """The columns of some examples."""
    records = [row.record for row in rows if isinstance(row.record, Record)]
    column = section.order not in ("shuffled", "length")
    found: dict[str, Any] = {
        "row": [record.row for record in records],
        "part": [row.part for row in rows],
        "flags": [
            SHORTENED * row.shortened + DAMAGED * bool(row.damage) + CHAT * (record.text is None)
            for row, record in zip(rows, records, strict=True)
        ],
        "hash": [duplicates.content_hash(record) for record in records],
        "length": [len(row.example.ids) for row in rows if row.example],
        "targets": [int(row.example.mask[1:].sum()) for row in rows if row.example],
        "key": [_number(record, section.order) if column else 0.0 for record in records],
    }
    out = {name: np.array(found[name], kind) for name, kind in COLUMNS.items()}
    if section.dedup == "near":
        out["signature"] = np.stack([duplicates.signature(duplicates.words_of(record)) for record in records])
    return out


def _number(record: Record, column: str) -> float:
    try:
        value = float((record.fields or {})[column])
        if not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{record.file} {record.place}: no number in the column {column}, by which data.order goes",
            "Allowed: shuffled, length, or a column that holds a number in every row.",
        ) from error


def _open(folder: Path) -> Store:
    columns = {name: np.load(folder / f"{name}.npy") for name in COLUMNS}
    starts = np.concatenate([[0], np.cumsum(columns["length"])])
    flat = {
        name: np.memmap(folder / f"{name}.bin", kind, "r") if starts[-1] else np.zeros(0, kind)
        for name, kind in (("ids", np.int32), ("mask", np.uint8))
    }
    signature = np.load(folder / "signature.npy", mmap_mode="r")
    facts = read_json(folder / "facts.json", "tokenized rows")
    return Store(flat["ids"], flat["mask"], starts, columns, signature, np.load(folder / "hashes.npy"), facts)
