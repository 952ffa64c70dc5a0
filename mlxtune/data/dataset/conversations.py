"""The rows of a run's data, as they stand in its files: for who compares texts, not tokens."""

from __future__ import annotations

import numpy as np

from mlxtune.config.schema import DataSection
from mlxtune.data.dataset import duplicates, holdout
from mlxtune.data.dataset.sources import files_by_split
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.sides import Side


def by_split(
    section: DataSection, seed: int, local_only: str = "", preferences: bool = False
) -> dict[str, list[Record]]:
    """The conversations of each split, rows that cannot be read aside; there is always "train" and "valid".

    seed: of the run, by which rows are held out. Here that is done among all rows, in training among those that give
    examples: where some do not, a row at the border may be on the other side. local_only, preferences: as
    `files_by_split`. Of a pair both sides are there.
    """
    found: dict[str, list[Record]] = {"train": [], "valid": []}
    undivided: list[Record] = []
    for source in section.mixture():
        splits = files_by_split(source, section.hub == "stream", local_only, preferences)
        for split, files in splits.items():
            records = [row for file in files for row in file.read() if isinstance(row, Record)]
            if split == "train" and "valid" not in splits:
                undivided += records
            else:
                found.setdefault(split, []).extend(records)
    hashes = np.array([duplicates.asked_hash(record) for record in undivided], np.uint64)
    highest = holdout.limit(hashes, section.valid_fraction, seed) if undivided else None
    for record, number in zip(undivided, holdout.seeded(hashes, seed), strict=True):
        held_out = highest is not None and int(number) <= highest
        found["valid" if held_out else "train"].append(record)
    return {split: [record for record in records if record.messages] for split, records in found.items()}


def learned(records: list[Record]) -> list[Record]:
    """Those whose answers a model is taught: not the rejected side of a pair, nor what was rated bad."""
    return [record for record in records if record.side not in (Side.REJECTED, Side.BAD)]
