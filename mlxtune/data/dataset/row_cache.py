"""Tokenized rows on disk, memory-mapped: a million of them do not live in Python lists.

A store is a folder with a few flat files that hold the examples of one data file, made once for each choice of data,
tokenizer, template and options (and day, where the template prints the date), and kept in a cache folder. The examples
of a row lie one after the other; whatever is counted for people is counted in rows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from mlxtune_convert.files import new_folder, read_json, write_json

from mlxtune.config.schema import DataSection
from mlxtune.data.chat.masking import Example
from mlxtune.data.chat.renderer import Renderer, Row
from mlxtune.data.chat.turn_kinds import Kinds
from mlxtune.data.dataset import duplicates
from mlxtune.data.rows.formats import Record, chunks, require_good
from mlxtune.data.rows.readers import Bad
from mlxtune.errors import UserError

VERSION = 5  # of the files made from the same data: raised when rendering or their layout changes
KEPT_SECONDS = 30 * 24 * 3600  # how long a store that is not used stays in the cache folder
LISTED = 10_000  # dropped and damaged rows that are remembered one by one
FACTS_FILE = "facts.json"
NAME = re.compile("[0-9a-f]{32}")  # of a store in the cache folder
SHORTENED, DAMAGED, CHAT = 1, 2, 4  # flags of an example
OPTIONS = ("max_tokens", "train_on", "expand_turns", "template", "template_kwargs", "order")
# What is known of each example. row: its place in the file; group: the number of its row among those that gave examples
# (one place of the file may hold several conversations); part: which turn of an expanded row; hash: of the row's
# content; targets: supervised tokens; key: the value of the column to go up by; turns, once, untrue: as `examples.Row`.
COLUMNS = np.dtype(
    [
        ("row", np.int64),
        ("group", np.int64),
        ("part", np.int32),
        ("flags", np.uint8),
        ("hash", np.uint64),
        ("length", np.int64),
        ("targets", np.int64),
        ("key", np.float64),
        ("turns", np.int32),
        ("once", np.int64),
        ("untrue", np.int32),
    ]
)
FILES: dict[str, tuple[Any, tuple[int, ...]]] = {  # of a store: the type and the shape of what each one holds
    "ids": (np.int32, (-1,)),
    "mask": (np.uint8, (-1,)),
    "columns": (COLUMNS, (-1,)),
    "signature": (np.uint32, (-1, duplicates.HASHES)),
}


@dataclass(frozen=True)
class Store:
    """The examples of one file. ids and mask: flat, all examples one after the other; columns: [N] of COLUMNS;
    signature: [R, HASHES], of each row that gave examples, or empty; starts: [N + 1] where each example begins; facts:
    what else is to know, as `_Facts` has it.
    """

    ids: np.ndarray
    mask: np.ndarray
    columns: np.ndarray
    signature: np.ndarray
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
    found = _kept(folder)
    if found is None:
        with new_folder(folder, own=True) as work:
            _build(work, source, records(), renderer, progress)
        _prune(root)
        found = _open(folder)
    os.utime(folder)
    found.facts["file"] = source  # the same bytes may have had another name
    return found


def _writable(folder: Path) -> bool:
    """Whether stores may be kept here: the folder is there, or could be made, and nobody else can change it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError:
        return False
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    return os.access(folder, os.W_OK)


def _kept(folder: Path) -> Store | None:
    """The store in a folder of the cache; None where there is none, or it does not hold what was written."""
    names = [FACTS_FILE, *(f"{name}.bin" for name in FILES)]
    if folder.is_symlink() or not all((folder / name).is_file() for name in names):
        return None
    try:
        found = _open(folder)
        is_as_written = found.facts["beside"] == _digest_beside(folder, found.facts)
        return found if is_as_written and _is_whole(found) else None
    except (UserError, OSError, ValueError, KeyError, TypeError):  # torn, or written by something else
        return None


def _is_whole(store: Store) -> bool:
    """Whether the ids and masks are those whose digest was taken when they were written. They are read by number
    later, and a wrong one would be read from anywhere in memory.
    """
    lengths, groups = store.columns["length"], store.columns["group"]
    total = int(store.starts[-1])
    if (lengths < 0).any() or len(store.ids) != total or len(store.mask) != total:
        return False
    digest = hashlib.blake2b(digest_size=16)
    first_of_group = np.flatnonzero(np.diff(groups, prepend=-1))
    borders = store.starts[np.append(first_of_group, len(groups))]
    for begin, end in pairwise(borders.tolist()):  # as they were written: the ids of a row, then its mask
        digest.update(store.ids[begin:end].tobytes() + store.mask[begin:end].tobytes())
    highest = int(store.ids.max(initial=0))
    return digest.hexdigest() == store.facts["digest"] and highest == store.facts["highest"]


def _digest_beside(folder: Path, facts: dict[str, Any]) -> str:
    """Of what a store keeps beside ids and masks: its columns and signatures, and all other facts."""
    others = {name: value for name, value in facts.items() if name != "beside"}
    digest = hashlib.blake2b(json.dumps(others, sort_keys=True).encode(), digest_size=16)
    for name in ("columns", "signature"):
        digest.update((folder / f"{name}.bin").read_bytes())
    return digest.hexdigest()


def cache_folder(section: DataSection) -> Path | None:
    """Where stores are kept; None: nowhere."""
    if section.cache == "off":
        return None
    if section.cache != "auto":
        return Path(section.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlxtune" / "rows"


def _key(content: str, renderer: Renderer) -> str:
    from transformers import __version__ as release  # what prints the templates

    tokenizer, section = renderer.tokenizer, renderer.section
    known = [VERSION, content, tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token, str(tokenizer.chat_template)]
    known += [*(getattr(section, name) for name in OPTIONS), section.dedup == "near"]
    known.append(release)
    if tokenizer.chat_template is not None:
        known.append(sorted(renderer.template.named_ends))
        if renderer.template.prints_date:
            known.append(section.date or date.today().isoformat())
    return hashlib.blake2b(json.dumps(known, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _prune(root: Path) -> None:
    """Remove the stores that nobody used for a while, and nothing else that lies there."""
    held = {FACTS_FILE, *(f"{name}.bin" for name in FILES)}
    for folder in root.iterdir():
        if folder.is_symlink() or not NAME.fullmatch(folder.name) or not folder.is_dir():
            continue
        unused = time.time() - folder.stat().st_mtime > KEPT_SECONDS
        if unused and {path.name for path in folder.iterdir()} == held:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Facts:
    """What is known of a file's rows, beside their examples. rows: all of them; counts: rows that gave no example, by
    reason; dropped: the first of these, by reason; turns: reason -> [turns, rows] left out of rows that gave others;
    damaged: [place, text] of the first damaged rows; lost: damaged rows of which no example is left; kinds, kind_rows:
    what is to be told of turns, as `told.Kinds`; highest: token id; digest: of all ids and masks; beside: as
    `_digest_beside`.
    """

    file: str
    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    turns: dict[str, list[int]] = field(default_factory=dict)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    lost: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    kind_rows: dict[str, list[int]] = field(default_factory=dict)
    highest: int = 0
    digest: str = ""
    beside: str = ""

    def add(self, parts: list[Row]) -> None:
        """Count what is not used, or not as it stands, of one row. parts: all that was made of it."""
        Kinds(self.kinds, self.kind_rows).add(parts, parts[0].record.row)
        record, reasons = parts[0].record, Counter[str]()
        for part in parts:
            if part.dropped:
                reasons[part.dropped] += max(1, part.turns)
        if all(part.dropped for part in parts):
            reason = "; ".join(reasons)
            self.counts[reason] += 1
            if self.counts.total() <= LISTED:
                self.dropped.setdefault(reason, []).append(record.row)
        else:
            for reason, count in reasons.items():
                known = self.turns.setdefault(reason, [0, 0])
                self.turns[reason] = [known[0] + count, known[1] + 1]
        damaged = [part for part in parts if part.damage]
        if damaged:
            self.lost += all(part.dropped for part in parts)
            if len(self.damaged) < LISTED:
                texts = dict.fromkeys(damage.text for part in damaged for damage in part.damage)
                self.damaged.append((record.place, "; ".join(texts)))


def _build(
    folder: Path, source: str, records: Iterator[Record | Bad], renderer: Renderer, progress: Callable[[str, int], None]
) -> None:
    """Write a store's files."""
    facts = _Facts(source)
    bad: list[Bad] = []
    digest = hashlib.blake2b(digest_size=16)
    groups = 0
    with ExitStack() as opened:
        files = {name: opened.enter_context((folder / f"{name}.bin").open("wb")) for name in FILES}
        for chunk in chunks(records):
            good = [record for record in chunk if isinstance(record, Record)]
            bad += [record for record in chunk if isinstance(record, Bad)]
            facts.rows += len(chunk)
            for _, made in groupby(renderer.stream(good), key=lambda row: id(row.record)):
                parts = list(made)
                facts.add(parts)
                used = [part for part in parts if not part.dropped]
                if not used:
                    continue
                damaged = any(part.damage for part in parts)  # of a dropped one too: rows stay or go as a whole
                values = _values(used, groups, damaged, renderer.section)
                groups += 1
                for name, array in values.items():
                    files[name].write(array.tobytes())
                digest.update(values["ids"].tobytes() + values["mask"].tobytes())
                facts.highest = max(facts.highest, int(values["ids"].max(initial=0)))
            progress(source, facts.rows)
    require_good(bad, facts.rows)
    facts.digest = digest.hexdigest()
    facts.beside = _digest_beside(folder, vars(facts))
    write_json(folder / FACTS_FILE, vars(facts))


def _values(parts: list[Row], group: int, damaged: bool, section: DataSection) -> dict[str, np.ndarray]:
    """What is kept of one row's examples, by file. group: the number of the row; damaged: whether one of them is."""
    ids, mask, columns, signatures = [], [], [], []
    record = parts[0].record
    assert isinstance(record, Record)
    content = duplicates.content_hash(record)
    key = 0.0 if section.order in ("shuffled", "length") else _number(record, section.order)
    if section.dedup == "near":
        signatures.append(duplicates.signature(duplicates.words_of(record)))
    for row in parts:
        example = row.example
        assert example is not None
        ids.append(np.asarray(example.ids, np.int32))
        mask.append(np.asarray(example.mask, np.uint8))
        flags = SHORTENED * row.shortened + DAMAGED * damaged + CHAT * (record.text is None)
        targets = int(example.mask[1:].sum())
        known = (record.row, group, row.part, flags, content, len(example.ids), targets, key)
        columns.append((*known, row.turns, row.once, row.untrue))
    return {
        "ids": np.concatenate(ids),
        "mask": np.concatenate(mask),
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
    return Store(**found, starts=starts, facts=read_json(folder / FACTS_FILE, "tokenized rows"))
