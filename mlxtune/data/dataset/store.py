"""The tokenized examples of one data file on disk, memory-mapped: a million of them do not live in Python lists.

A store is a folder of flat files, in which the examples of a row lie one after the other. For a data file of three
rows, of which the first gives two examples (5 and 3 tokens), the second none and the third one (4 tokens):

    ids.bin        12 numbers: the 5 ids of the first example, then 3, then 4
    mask.bin       12 numbers, 1 where the token is a target
    columns.bin    3 entries of COLUMNS: row 1, group 0, length 5
                                         row 1, group 0, length 3
                                         row 3, group 1, length 4
    signature.bin  one signature for each of the 2 groups; none at all where nobody looks for near duplicates
    facts.json     what else is known of the 3 rows: `store_facts.Facts`

The examples of a pair are those of one row: first those of the chosen answer, then those of the rejected one.

Whatever is counted for people is counted in rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from mlxtune_convert.files import read_json

from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset import duplicates
from mlxtune.data.dataset.store_facts import Facts

SHORTENED, DAMAGED, CHAT = 1, 2, 4  # flags of an example
# What is known of each example.
COLUMNS = np.dtype(
    [
        ("row", np.int64),  # the place of its row in the file, from 1
        # The number of its row among those that gave examples, from 0: one place may hold several conversations.
        ("group", np.int64),
        ("part", np.int32),  # which turn of an expanded row it ends with, from 1; 0: the row's only example
        ("flags", np.uint8),  # SHORTENED, DAMAGED, CHAT
        ("hash", np.uint64),  # of the row's content
        ("length", np.int64),  # tokens
        ("targets", np.int64),  # supervised tokens
        ("key", np.float64),  # value of the column that data.order goes by
        ("turns", np.int32),  # assistant turns that it trains
        ("once", np.int64),  # tokens of the row rendered once; of a pair, of both answers
        ("untrue", np.int32),  # turns that data.expand_turns=none would train behind another prompt
        ("side", np.uint8),  # of `sides.Side`: which answer of a preference it is of
        ("asked", np.uint64),  # by which its row is held out: `duplicates.asked_hash`
    ]
)
FACTS_FILE = "facts.json"
# The type and the shape of what each of the other files holds.
FILES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "ids": (np.int32, (-1,)),
    "mask": (np.uint8, (-1,)),
    "columns": (COLUMNS, (-1,)),
    "signature": (np.uint32, (-1, duplicates.HASHES)),
}
NAMES = {FACTS_FILE, *(f"{name}.bin" for name in FILES)}  # of all files of a store


@dataclass(frozen=True)
class Store:
    """The N examples of one file, of R rows."""

    ids: np.ndarray  # [all tokens] int32: those of all examples one after the other
    mask: np.ndarray  # [all tokens] uint8: 1 where the token is a target
    columns: np.ndarray  # [N] of COLUMNS
    signature: np.ndarray  # [R, HASHES] uint32, of each row that gave examples; [0, HASHES]: of none
    starts: np.ndarray  # [N + 1] where each example begins in ids and mask
    facts: Facts  # of the file's rows

    def __len__(self) -> int:
        return len(self.columns)

    def example(self, index: int) -> Example:
        part = slice(self.starts[index], self.starts[index + 1])
        return Example(self.ids[part], self.mask[part])


def open_store(folder: Path) -> Store:
    """The store in a folder, whatever it holds. Raises UserError, OSError, ValueError or TypeError where it is none."""
    arrays: dict[str, np.ndarray] = {}
    for name, (kind, shape) in FILES.items():
        file = folder / f"{name}.bin"
        flat = np.memmap(file, kind, "r") if file.stat().st_size else np.zeros(0, kind)
        arrays[name] = flat.reshape(shape)
    starts = np.concatenate([[0], np.cumsum(arrays["columns"]["length"])])
    return Store(**arrays, starts=starts, facts=Facts(**read_json(folder / FACTS_FILE, "tokenized rows")))


def digest_beside(folder: Path, facts: Mapping[str, Any]) -> str:
    """Of what a store keeps beside ids and masks: its columns and signatures, and all other facts."""
    others = {name: value for name, value in facts.items() if name != "beside"}
    digest = hashlib.blake2b(json.dumps(others, sort_keys=True).encode(), digest_size=16)
    for name in ("columns", "signature"):
        digest.update((folder / f"{name}.bin").read_bytes())
    return digest.hexdigest()


def is_as_written(folder: Path, store: Store) -> bool:
    """Whether a store still holds what was written into its folder."""
    return store.facts.beside == digest_beside(folder, vars(store.facts)) and _tokens_are_as_written(store)


def _tokens_are_as_written(store: Store) -> bool:
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
    return digest.hexdigest() == store.facts.digest and highest == store.facts.highest
