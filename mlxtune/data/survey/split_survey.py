"""What is known of one split after a survey: counts, and findings with the rows that they name."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlxtune.data.chat.turn_kinds import Expansion, Kinds
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.readers import Bad
from mlxtune.data.survey import lint
from mlxtune.data.survey.consistency import Style
from mlxtune.data.survey.preferences import Preferences

LISTED = 200  # rows that a finding names


@dataclass
class Finding:
    """Rows of one split with the same trouble."""

    code: str  # a key of lint.KINDS
    split: str  # its name
    count: int = 0  # rows
    rows: list[int | str] = field(default_factory=list)  # names of the first LISTED of them
    reasons: dict[str, int] = field(default_factory=dict)  # what is said of them -> of how many
    last: int | str = ""  # name of the row that was added last

    def add(self, row: int | str, reason: str = "") -> None:
        if row != self.last:  # rows come in order; one with several faults counts once
            self.count += 1
            if len(self.rows) < LISTED:
                self.rows.append(row)
        self.last = row
        if reason and (reason in self.reasons or len(self.reasons) < LISTED):
            self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def as_json(self) -> dict[str, Any]:
        kind = lint.KINDS[self.code]
        found = {
            "severity": kind.severity,
            "code": self.code,
            "split": self.split,
            "count": self.count,
            "what": kind.what,
            "fix": kind.fix,
            "rows": self.rows,
        }
        if self.reasons:
            found["reasons"] = self.reasons
        return found


@dataclass
class SplitSurvey:
    """What one split holds. Of each row its name, two hashes and a signature of 128 bytes are kept, and no text."""

    name: str  # of the split, with the number of its source where a configuration lists several
    file: str  # name of its first file
    several: bool = False  # it has more than one file
    sample: str = ""  # of which of its rows this is, in words; "": of all of them
    rows: int = 0  # all of them
    held_out: int = 0  # rows that give examples and that training would not train on
    examples: int = 0  # that training would have
    tokens: int = 0  # of these, cut at data.max_tokens
    targets: int = 0  # supervised ones among them
    formats: Counter[str] = field(default_factory=Counter)  # rows of each
    outcomes: Counter[str] = field(default_factory=Counter)  # rows with each: used, shortened, or why not
    roles: Counter[str] = field(default_factory=Counter)  # messages of each
    answers: Counter[int] = field(default_factory=Counter)  # conversations with so many
    tasks: Counter[str] = field(default_factory=Counter)  # conversations whose first question asks for each
    english: int = 0  # conversations whose first question is likely English
    talks: Counter[str] = field(default_factory=Counter)  # conversations of each of `subjects.KINDS`
    made: Counter[str] = field(default_factory=Counter)  # rows that were made, by how
    style: Style = field(default_factory=Style)  # of its conversations
    scripts: Counter[str] = field(default_factory=Counter)  # rows that are written in each
    # Rows with each system prompt, by hash; None: without.
    systems: Counter[int | None] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)  # examples of so many tokens, uncut
    prefix: np.ndarray | None = None  # [T] token ids that every example begins with; None: there is no example yet
    used_hashes: array[int] = field(default_factory=lambda: array("Q"))  # of the content of rows that give examples
    # Of each of the N rows that could be read:
    names: list[int | str] = field(default_factory=list)  # as `name_of`
    hashes: array[int] = field(default_factory=lambda: array("Q"))  # of the content
    # Of the messages before the first answer; 0: none.
    questions: array[int] = field(default_factory=lambda: array("Q"))
    signatures: list[np.ndarray] = field(default_factory=list)  # [rows, HASHES] of each chunk of them, while it is read
    findings: dict[str, Finding] = field(default_factory=dict)  # by code
    expansion: Expansion = field(default_factory=Expansion)  # what became of conversations
    kinds: Kinds = field(default_factory=Kinds)  # what is to be told of turns
    preferences: Preferences = field(default_factory=Preferences)  # its pairs and rated answers

    @property
    def trained(self) -> int:
        """Rows that training would train on."""
        return len(self.used_hashes) - self.held_out

    def name_of(self, row: Record | Bad) -> int | str:
        """What a finding calls a row: its number, with the file where there are several."""
        return f"{Path(row.file).name}:{row.row}" if self.several else row.row

    def find(self, code: str, row: int | str, reason: str = "") -> None:
        self.findings.setdefault(code, Finding(code, self.name)).add(row, reason)

    def find_all(self, code: str, rows: np.ndarray) -> None:
        """rows: [N] bool, of those that could be read."""
        for place in np.flatnonzero(rows).tolist():
            self.find(code, self.names[place])

    def find_many(self, code: str, count: int, reasons: Sequence[str] = ()) -> None:
        """A finding about so many rows, of which none is named. reasons: what is said of all of them."""
        self.findings[code] = Finding(code, self.name, count, reasons=dict.fromkeys(reasons, count))

    def find_unused(self, names: Sequence[str]) -> None:
        """names: of data files or splits that stand beside this one and that nothing reads."""
        for name in names:
            self.find("unused", name)
