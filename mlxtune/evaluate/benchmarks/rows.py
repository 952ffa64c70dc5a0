"""A benchmark's rows from files of this machine, in the columns that the hub's set has.

    DIR/gsm8k/test.jsonl            the rows of a split; any suffix that training reads
    DIR/gsm8k/train.jsonl           examples to show come from here
    DIR/gsm8k.jsonl                 the split that is asked, alone
    DIR/mmlu/test.jsonl             all subjects, each row with its "subject"; or DIR/mmlu/anatomy/test.jsonl

None of these sets comes with mlxtune.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxtune_convert.files import digest, explained, json_text, new_file

from mlxtune.data.rows.readers import SUFFIXES, ZIPPED, Bad, raw_rows
from mlxtune.errors import UserError

SPLITS = ("train", "validation", "dev", "test")  # those that tasks name
SUBJECT = "subject"  # the column of a set whose tasks ask one subject each


@dataclass
class Rows:
    """The rows of a folder, read once for all tasks that ask them."""

    folder: Path  # --benchmark-data
    _read: dict[Path, list[dict[str, Any]]] = field(default_factory=dict)  # of each file

    def splits(self, name: str, subject: str | None, asked: str, wanted: Sequence[str]) -> dict[str, Any]:
        """The name of each split that is here -> its rows.

        name: of the benchmark; subject: of it, None for all of it; asked: the split whose rows are asked; wanted: those
        that a task names. Raises UserError where the asked one is not here, or a row cannot be read.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        for split in dict.fromkeys([asked, *wanted]):
            rows = self._of_split(name, subject, split, split == asked)
            if rows:
                found[split] = rows
        if asked not in found:
            of = f" of the subject {subject}" if subject else ""
            raise UserError(
                f"{self.folder} has no rows of {name}{of}: expected {name}/{asked}.jsonl",
                "Put the file there, in the columns of the hub's set, or download it: --fetch.",
            )
        return found

    def has(self, name: str, subject: str | None, split: str) -> bool:
        """Whether there is a row of a subject in the split that is asked."""
        return bool(self._of_split(name, subject, split, is_asked=True))

    def digest(self) -> str:
        """SHA-256 of all files that were read, in hexadecimal."""
        whole = hashlib.sha256()
        for file in sorted(self._read):
            whole.update(f"{file.relative_to(self.folder)} {digest(file)}\n".encode())
        return whole.hexdigest()

    def _of_split(self, name: str, subject: str | None, split: str, is_asked: bool) -> list[dict[str, Any]]:
        if subject is not None:
            own = _file(self.folder / name / subject / split)
            if own is not None:
                return self._rows(own)
        stems = [self.folder / name / split, *([self.folder / name] if is_asked else [])]
        for stem in stems:
            file = _file(stem)
            if file is not None:
                rows = self._rows(file)
                return rows if subject is None else [row for row in rows if row.get(SUBJECT) == subject]
        return []

    def _rows(self, file: Path) -> list[dict[str, Any]]:
        if file not in self._read:
            rows = []
            for row in raw_rows(file):
                if isinstance(row, Bad):
                    raise UserError(f"{file} {row.place}: {row.reason}", "Mend the row, or remove it.")
                rows.append(row[1])
            self._read[file] = rows
        return self._read[file]


def _file(stem: Path) -> Path | None:
    for suffix in (*SUFFIXES, *ZIPPED):
        file = stem.with_name(stem.name + suffix)
        if file.is_file():
            return file
    return None


def download(folder: Path, name: str, subject: str | None, hub_id: str, part: str | None) -> int:
    """Write the splits of a set of the hub that are not here; how many files. part: of the set, None for its only one.

    Raises UserError where it cannot be had.
    """
    import datasets

    target = folder / name if subject is None else folder / name / subject
    if any(_file(target / split) for split in SPLITS):
        return 0
    try:
        found = datasets.load_dataset(hub_id, part)
    except Exception as error:  # whatever the hub's client raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{hub_id} cannot be downloaded: {reason}", "Is there a network? Else bring the files."
        ) from error
    count = 0
    for split, rows in found.items():
        if split in SPLITS:
            with explained(target):
                target.mkdir(parents=True, exist_ok=True)
            with new_file(target / f"{split}.jsonl") as file:
                for row in rows:
                    file.write(json_text(row) + "\n")
            count += 1
    return count
