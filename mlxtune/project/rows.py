"""The rows that a project is given -> its files data/train.jsonl, valid.jsonl and test.jsonl.

Any format that training reads becomes OpenAI messages, a row of text stays one; what is given stays as it is. Splits
that a folder names are kept. The others are taken from its train rows, by what is asked and the seed alone: rows that
ask the same are on one side, whatever they answer, so that no answer to a test prompt was learned by heart.

    asks       q1    q2    Q1    q3    q4        case and spaces aside
    answers    a     b     c     d     e
    split      test  train test  train valid     a tenth each, but one prompt at least
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from mlxtune_convert.files import json_text

from mlxtune.config.schema import SourceSection
from mlxtune.data.dataset import duplicates, holdout
from mlxtune.data.dataset.sources import Source, files_by_split, unused_note
from mlxtune.data.rows import formats
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.readers import Bad
from mlxtune.data.rows.sides import Side
from mlxtune.data.rows.writers import to_messages
from mlxtune.errors import UserError

SPLITS = ("train", "valid", "test")
SHARE, MOST = 0.1, 500  # of the prompts, to validate and to test on: a tenth, and no more than a comparison needs
LEAST = 3  # prompts: one for each split


@dataclass(frozen=True)
class Given:
    """Rows that were looked at, all of them readable."""

    source: SourceSection  # where they are
    files: Mapping[str, list[Source]]  # by the splits that it names; there is always "train"
    formats: tuple[str, ...]  # of the rows, as `data.rows.formats` calls them
    asked: Mapping[str, np.ndarray]  # split -> [rows] uint64: what each row asks
    is_text: bool  # there are rows of plain text, which ask nothing
    notes: tuple[str, ...]  # what a person must know

    def told(self) -> str:
        """How many rows of what form, in a few words."""
        counts = [f"{len(self.asked[split]):,} {split}" for split in SPLITS if split in self.asked]
        rows = f"{len(self.asked['train']):,} rows" if len(counts) == 1 else f"{', '.join(counts)} rows"
        return f"{rows}, {', '.join(self.formats)}"


def look(source: SourceSection) -> Given:
    """Read all rows once. Raises UserError for what is not there, and for rows that cannot be read."""
    files = files_by_split(source)
    kinds: dict[str, None] = {}
    asked: dict[str, np.ndarray] = {}
    is_text = False
    for split, own in files.items():
        hashes: list[int] = []
        for file in own:
            bad: list[Bad] = []
            count = 0
            for row in file.read():
                count += 1
                if isinstance(row, Bad):
                    bad.append(row)
                    continue
                if row.side != Side.NONE:
                    raise UserError(
                        f"{source.path}: its rows are pairs of answers, and init makes projects of conversations",
                        f"Learn from them with mlxtune train -c dpo --model MODEL --data {source.path} --out RUN "
                        "(docs/preference.md).",
                    )
                kinds.setdefault(row.format)
                is_text = is_text or row.text is not None
                hashes.append(duplicates.question_hash(row))
            formats.require_good(bad, count)
        asked[split] = np.array(hashes, np.uint64)
    notes = [note] if (note := unused_note(source, files)) else []
    notes += _shared(asked)
    return Given(source, files, tuple(kinds), asked, is_text, tuple(notes))


def _shared(asked: Mapping[str, np.ndarray]) -> list[str]:
    """What two splits of the data's own have in common, in words."""
    notes = []
    for split in ("valid", "test"):
        if split in asked:
            count = int(np.isin(asked[split], asked["train"]).sum())
            if count:
                notes.append(
                    f"{count} of {len(asked[split])} {split} rows ask what train rows ask too: an answer that was "
                    "learned by heart says nothing about new prompts"
                )
    return notes


def divided(given: Given, seed: int) -> np.ndarray:
    """[rows of train] where each goes, as a place in SPLITS. Raises UserError for fewer than LEAST prompts."""
    asked = given.asked["train"]
    sides = np.zeros(len(asked), int)
    for split in ("test", "valid"):
        if split in given.files:
            continue
        others = [given.asked[other] for other in ("valid", "test") if other in given.files]
        free = (sides == 0) & ~np.isin(asked, np.concatenate([np.zeros(0, np.uint64), *others]))
        different = len(np.unique(asked[free]))
        highest = holdout.limit(asked[free], min(SHARE, MOST / max(different, 1)), seed) if different > 1 else None
        if highest is None:
            raise UserError(
                f"{given.source.path}: {len(np.unique(asked))} different prompts, too few to train, to validate and to "
                "test on",
                f"Add rows: {LEAST} different prompts are the least, some hundred are a beginning.",
            )
        sides[free & (holdout.seeded(asked, seed) <= highest)] = SPLITS.index(split)
    return sides


def write(given: Given, sides: np.ndarray, folder: Path) -> dict[str, int]:
    """Make the three files in `folder`; return the rows of each. sides: [rows of train], as
    `divided` tells them.
    """
    folder.mkdir(parents=True)
    counts = dict.fromkeys(SPLITS, 0)
    with ExitStack() as stack:
        out: dict[str, IO[str]] = {}
        for split in SPLITS:
            out[split] = stack.enter_context((folder / f"{split}.jsonl").open("w", encoding="utf-8"))
        for split, files in given.files.items():
            for place, record in enumerate(records(files)):
                to = SPLITS[sides[place]] if split == "train" else split
                out[to].write(json_text(_row(record), default=str) + "\n")
                counts[to] += 1
    return counts


def records(files: Iterable[Source]) -> Iterator[Record]:
    """The rows of some files, of which `look` has found all readable."""
    for row in chain.from_iterable(file.read() for file in files):
        if isinstance(row, Bad):
            raise UserError(f"{row.file} {row.place}: {row.reason}", "The file changed while it was read: try again.")
        yield row


def _row(record: Record) -> dict[str, Any]:
    """As it stands in a file of the project; columns that nothing reads stay beside it."""
    if record.text is not None:
        return {**record.fields, "text": record.text}
    return {**record.fields, **to_messages(record)}
