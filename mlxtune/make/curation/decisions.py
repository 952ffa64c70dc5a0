"""What a person decided of rows, on the disk as it is decided: the same command goes on.

{"row": "09ab...", "said": "keep"}
{"row": "77cd...", "said": "edit", "answer": "Within 30 days of delivery."}
{"row": "77cd...", "said": "undo"}                                               as if it had not been decided
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlxtune.data.rows.readers import Bad, raw_rows
from mlxtune.errors import UserError
from mlxtune.evaluate.kept import append_lines, require_own
from mlxtune.make.curation.candidates import Candidate
from mlxtune.make.curation.choosing import edited

SAID = ("keep", "drop", "edit", "undo")


@dataclass(frozen=True)
class Decision:
    """What was said of one row."""

    # "keep", "drop" or "edit".
    said: str
    # The new answer of an edited row; "" for another.
    answer: str = ""

    def applied(self, candidate: Candidate) -> Candidate | None:
        """The row as it is to be kept; None: it is dropped."""
        if self.said == "drop":
            return None
        return edited(candidate, self.answer) if self.said == "edit" else candidate


class Decisions:
    """A person's decisions, by the rows' keys, in their order."""

    def __init__(self, path: Path) -> None:
        """Reads what is there. Raises UserError for a link, and a file of something else."""
        require_own(path, '{"row": ', "decisions")
        self.path = path
        self.made: dict[str, Decision] = {}
        if path.is_file():
            self._read()

    def decide(self, key: str, decision: Decision) -> None:
        line = {"row": key, "said": decision.said}
        if decision.said == "edit":
            line["answer"] = decision.answer
        append_lines(self.path, [line])
        self.made[key] = decision

    def undo(self) -> str | None:
        """Take the last decision back; the key of its row, None where there is none."""
        if not self.made:
            return None
        key = next(reversed(self.made))
        append_lines(self.path, [{"row": key, "said": "undo"}])
        del self.made[key]
        return key

    def _read(self) -> None:
        for row in raw_rows(self.path):
            if isinstance(row, Bad):
                continue  # a line that was cut when the process ended: its row is asked again
            number, line = row
            said = line.get("said")
            if said not in SAID or not isinstance(line.get("row"), str):
                raise UserError(
                    f"{self.path} line {number}: not a decision, and decisions would be kept in this file",
                    "Move it away, or choose another --out.",
                )
            self.made.pop(line["row"], None)  # what was decided last is last
            if said != "undo":
                self.made[line["row"]] = Decision(said, str(line.get("answer", "")))
