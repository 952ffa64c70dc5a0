"""Scores on the disk as they are computed: a second choice out of the same rows, or a choice that was stopped, computes
none of them again.

    {"of": {"model": "5c1f...", "max_tokens": 2048, ...}}                              what the scores depend on
    {"row": "09ab...", "behind": 1.21, "alone": 1.93, "tokens": 118, "row_tokens": 190}
    {"row": "77cd...", "none": true}                                                  a row that gives no score

Scores that depend on something else stand behind a line of their own that says on what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlxtune.data.rows.readers import Bad, raw_rows
from mlxtune.errors import UserError
from mlxtune.evaluate.kept import append_lines, require_own
from mlxtune.make.curation.losses import Losses


class ScoresFile:
    """The scores of rows, by the rows' keys."""

    def __init__(self, path: Path, of: Mapping[str, Any]) -> None:
        """of: what scores depend on; those of a file that depend on something else stay in it, unused. Raises UserError
        for a link, and a file that holds something else.
        """
        require_own(path, '{"of": ', "scores")
        self.path = path
        self.of = dict(of)
        self.known: dict[str, Losses | None] = {}
        self._is_begun = False  # the last scores of the file are of the same
        if path.is_file():
            self._read()

    def keep(self, found: Mapping[str, Losses | None]) -> None:
        """Add scores, on the disk at once."""
        lines: list[dict[str, Any]] = []
        if not self._is_begun:
            lines.append({"of": self.of})
            self._is_begun = True
        for key, losses in found.items():
            lines.append({"row": key, "none": True} if losses is None else {"row": key, **asdict(losses)})
        self.known |= found
        append_lines(self.path, lines)

    def _read(self) -> None:
        """A line that was cut when a process ended is no score."""
        for row in raw_rows(self.path):
            if isinstance(row, Bad):
                continue
            number, line = row
            try:
                if "of" in line:
                    self._is_begun = line["of"] == self.of
                elif self._is_begun:
                    self.known[str(line["row"])] = _score(line)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self.path} line {number}: not a score, and scores would be kept in this file",
                    "Move it away, or choose another --out.",
                ) from error


def _score(line: Mapping[str, Any]) -> Losses | None:
    """Raises KeyError, TypeError or ValueError for a line that is none."""
    if line.get("none"):
        return None
    means, counts = (float(line["behind"]), float(line["alone"])), (line["tokens"], line["row_tokens"])
    return Losses(*means, *map(int, counts))
