"""Tokenized rows on disk, memory-mapped: a million of them do not live in Python lists.

A store is a folder with a few flat files that hold the examples of one data file, made once for each choice of data,
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
from contextlib import ExitStack
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

VERSION = 2  # of the files made from the same data: raised when rendering or their layout changes
KEPT_SECONDS = 30 * 24 * 3600  # how long a store that is not used stays in the cache folder
LISTED = 10_000  # dropped and damaged rows that are remembered one by one
CHUNK = 512
SHORTENED, DAMAGED, CHAT = 1, 2, 4  # flags of an example
OPTIONS = ("max_tokens", "train_on", "expand_turns", "template", "template_kwargs", "order")
# What is known of each example. targets: supervised tokens; key: the value of the column to go up by.
COLUMNS = np.dtype(
    [
        ("row", np.int64),
        ("part", np.int32),
        ("flags", np.uint8),
        ("hash", np.uint64),
        ("length", np.int64),
        ("targets", np.int64),
        ("key", np.float64),
    ]
)
FILES: dict[str, tuple[Any, tuple[int, ...]]] = {  # of a store: the type and the shape of what each one holds
    "ids": (np.int32, (-1,)),
    "mask": (np.uint8, (-1,)),
    "columns": (COLUMNS, (-1,)),
    "signature": (np.uint32, (-1, duplicates.HASHES)),
    "all_hashes": (np.uint64, (-1,)),
}


@dataclass(frozen=True)
class Store:
    """The examples of one file. ids and mask: flat, all examples one after the other; columns: [N] of COLUMNS;
    signature: [N, HASHES] or empty; all_hashes: of every row that could be read; starts: [N + 1] where each example
    begins; facts: what else is to know (file, rows, dropped, damaged, lost: damaged so that nothing is left, digest,
    highest token).
    """

    ids: np.ndarray
    mask: np.ndarray
    columns: np.ndarray
    signature: np.ndarray
    all_hashes: np.ndarray
    starts: np.ndarray
    facts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.columns)

    def example(self, index: int) -> Example:
        part = slice(self.starts[index], self.starts[index + 1])
        return Example(self.ids[part], self.mask[part])


def of(
    source: str,
    records: Callable[[], Iterator[Record | Bad]],
    content: str,
    renderer: Renderer,
    progress: Callable[[str, int], None],
) -> Store:
    """The store of one file, from the cache when it is there.

    content: a digest of the file's bytes, or "" when it has none and nothing may be kept. Raises UserError listing the
    rows that cannot be read.
    """
    root = cache_folder(renderer.section)
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


def _key(content: str, renderer: Renderer) -> str:
    tokenizer, section = renderer.tokenizer, renderer.section
    known = [VERSION, content, tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token, str(tokenizer.chat_template)]
    known += [*(getattr(section, name) for name in OPTIONS), section.dedup == "near"]
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
    facts: dict[str, Any] = {"file": source, "rows": 0, "dropped": {}, "damaged": [], "lost": 0, "highest": 0}
    dropped: Counter[str] = Counter()
    bad: list[Bad] = []
    digest = hashlib.blake2b(digest_size=16)
    with ExitStack() as opened:
        files = {name: opened.enter_context((folder / f"{name}.bin").open("wb")) for name in FILES}
        while chunk := list(islice(records, CHUNK)):
            good = [record for record in chunk if isinstance(record, Record)]
            bad += [record for record in chunk if isinstance(record, Bad)]
            facts["rows"] += len(chunk)
            files["all_hashes"].write(
                np.array([duplicates.content_hash(record) for record in good], np.uint64).tobytes()
            )
            rows = renderer.rows(good)
            for row in rows:
                if row.dropped:
                    dropped[row.dropped] += 1
                    if dropped.total() <= LISTED:
                        facts["dropped"].setdefault(row.dropped, []).append(row.record.row)
                    facts["lost"] += bool(row.damage)
                if row.damage and len(facts["damaged"]) < LISTED:
                    facts["damaged"].append([row.place, "; ".join(damage.text for damage in row.damage)])
            made = _values([row for row in rows if not row.dropped], renderer.section)
            for name, values in made.items():
                files[name].write(values.tobytes())
            digest.update(made["ids"].tobytes() + made["mask"].tobytes())
            facts["highest"] = max(facts["highest"], int(made["ids"].max(initial=0)))
            progress(source, facts["rows"])
    require_good(bad, facts["rows"])
    write_json(folder / "facts.json", {**facts, "counts": dict(dropped), "digest": digest.hexdigest()})


def _values(rows: list[Row], section: DataSection) -> dict[str, np.ndarray]:
    """What is kept of some examples, by file."""
    ids, mask, columns, signatures = [], [], [], []
    for row in rows:
        record, example = row.record, row.example
        assert isinstance(record, Record) and example is not None
        ids.append(np.asarray(example.ids, np.int32))
        mask.append(example.mask)
        flags = SHORTENED * row.shortened + DAMAGED * bool(row.damage) + CHAT * (record.text is None)
        key = 0.0 if section.order in ("shuffled", "length") else _number(record, section.order)
        targets = int(example.mask[1:].sum())
        known = (record.row, row.part, flags, duplicates.content_hash(record), len(example.ids), targets, key)
        columns.append(known)
        if section.dedup == "near":
            signatures.append(duplicates.signature(duplicates.words_of(record)))
    return {
        "ids": np.concatenate([np.zeros(0, np.int32), *ids]),
        "mask": np.concatenate([np.zeros(0, np.uint8), *mask]),
        "columns": np.array(columns, COLUMNS),
        "signature": np.array(signatures, np.uint32),
    }


def _number(record: Record, column: str) -> float:
    try:
        value = float(record.fields[column])
        if not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{record.file} {record.place}: no number in the column {column}, by which data.order goes",
            "Allowed: shuffled, length, or a column that holds a number in every row.",
        ) from error


def _open(folder: Path) -> Store:
    found: dict[str, np.ndarray] = {}
    for name, (kind, shape) in FILES.items():
        file = folder / f"{name}.bin"
        flat = np.memmap(file, kind, "r") if file.stat().st_size else np.zeros(0, kind)
        found[name] = flat.reshape(shape)
    starts = np.concatenate([[0], np.cumsum(found["columns"]["length"])])
    return Store(**found, starts=starts, facts=read_json(folder / "facts.json", "tokenized rows"))
