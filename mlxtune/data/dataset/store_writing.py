"""Records -> the files of a store."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from mlxtune_convert.files import write_json

from mlxtune.config.schema import DataSection
from mlxtune.data.chat.by_row import by_row, side_of
from mlxtune.data.chat.renderer import Renderer, Row
from mlxtune.data.dataset import duplicates
from mlxtune.data.dataset.store import CHAT, COLUMNS, DAMAGED, FACTS_FILE, FILES, SHORTENED, digest_beside
from mlxtune.data.dataset.store_facts import Facts
from mlxtune.data.rows.formats import Record, chunks, count_rows, require_good
from mlxtune.data.rows.readers import Bad
from mlxtune.errors import UserError

Progress = Callable[[str, int], None]  # called with a file's name and how many of its rows were read


def untold(name: str, rows: int) -> None:
    """A Progress for whoever wants none."""


def write_store(
    folder: Path, name: str, records: Iterator[Record | Bad], renderer: Renderer, progress: Progress
) -> None:
    """Write a store into an empty folder. name: of the file that the records are of.

    Raises UserError listing the rows that cannot be read, for conversations where the tokenizer has no template, and
    for a row without the number that data.order goes by.
    """
    facts = Facts(name)
    bad: list[Bad] = []
    digest = hashlib.blake2b(digest_size=16)
    groups = 0  # rows that gave examples
    with ExitStack() as opened:
        files = {}
        for file in FILES:
            files[file] = opened.enter_context((folder / f"{file}.bin").open("wb"))
        for chunk in chunks(records):
            good = []
            for record in chunk:
                if isinstance(record, Bad):
                    bad.append(record)
                else:
                    good.append(record)
            facts.rows += count_rows(chunk)
            for parts in by_row(renderer.stream(good)):
                facts.add(parts)
                if all(part.dropped for part in parts):
                    continue
                values = _values(parts, groups, renderer.section)
                groups += 1
                for file, array in values.items():
                    files[file].write(array.tobytes())
                digest.update(values["ids"].tobytes() + values["mask"].tobytes())
                facts.highest = max(facts.highest, int(values["ids"].max(initial=0)))
            progress(name, facts.rows)
    require_good(bad, facts.rows)
    facts.digest = digest.hexdigest()
    facts.beside = digest_beside(folder, vars(facts))
    write_json(folder / FACTS_FILE, vars(facts))


def _values(parts: list[Row], group: int, section: DataSection) -> dict[str, np.ndarray]:
    """What is kept of one row, by file: its ids and masks, [tokens]; its columns, [examples]; its signature,
    [1, HASHES] or none. group: the number of the row.
    """
    ids, mask, columns, signatures = [], [], [], []
    records = _records(parts)
    record = records[0]
    content, asked = duplicates.hash_of_row(records), duplicates.asked_hash(record)
    key = 0.0 if section.order in ("shuffled", "length") else _number(record, section.order)
    if section.dedup == "near":
        signatures.append(duplicates.signature(duplicates.words_of_row(records)))
    of_row = 0 if record.text is not None else CHAT
    if any(part.damage for part in parts):  # of a dropped one too: rows stay or go as a whole
        of_row |= DAMAGED
    once = sum(max(part.once for part in parts if part.record is one) for one in records)
    for part in parts:
        example = part.example
        if example is None:
            continue
        ids.append(np.asarray(example.ids, np.int32))
        mask.append(np.asarray(example.mask, np.uint8))
        flags = of_row | SHORTENED if part.shortened else of_row
        length, targets = len(example.ids), int(example.mask[1:].sum())
        known = (record.row, group, part.part, flags, content, length, targets, key)
        columns.append((*known, part.turns, once, part.untrue, side_of(part), asked))
    return {
        "ids": np.concatenate(ids),
        "mask": np.concatenate(mask),
        "columns": np.array(columns, COLUMNS),
        "signature": np.array(signatures, np.uint32),
    }


def _records(parts: list[Row]) -> list[Record]:
    """What the parts of a row were made of: of a pair the records of both answers."""
    found = {id(part.record): part.record for part in parts}
    return [record for record in found.values() if isinstance(record, Record)]


def _number(record: Record, column: str) -> float:
    """The value of a column. Raises UserError where it is no number."""
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
