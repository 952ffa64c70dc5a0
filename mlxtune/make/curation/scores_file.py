"""Scores on the disk as they are computed: a second choice out of the same rows, or a choice that was stopped, computes
none of them again.

    {"of": {"model": "5c1f...", "max_tokens": 2048, ...}}                              what the scores depend on
    {"row": "09ab...", "behind": 1.21, "alone": 1.93, "tokens": 118, "row_tokens": 190}
    {"row": "77cd...", "none": true}                                                  a row that gives no score
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlxtune_convert.files import explained, flush_open, json_text

from mlxtune.data.rows.readers import Bad, raw_rows
from mlxtune.errors import UserError
from mlxtune.make.curation.losses import Losses


class ScoresFile:
    """The scores of rows, by the rows' keys."""

    def __init__(self, path: Path, of: Mapping[str, Any]) -> None:
        """of: what scores depend on; where a file has others, it is begun anew. Raises UserError for a file that holds
        something else.
        """
        self.path = path
        self.of = dict(of)
        self.known: dict[str, Losses | None] = {}
        if path.is_file():
            self._read()

    def keep(self, found: Mapping[str, Losses | None]) -> None:
        """Add scores, on the disk at once."""
        lines: list[dict[str, Any]] = []
        if not self.known:
            lines.append({"of": self.of})
        for key, losses in found.items():
            lines.append({"row": key, "none": True} if losses is None else {"row": key, **asdict(losses)})
        mode = "ab" if self.known else "wb"
        self.known |= found
        with explained(self.path), self.path.open(mode) as file:
            file.write("".join(json_text(line) + "\n" for line in lines).encode())
            file.flush()
            flush_open(file.fileno())

    def _read(self) -> None:
        """A line that was cut when a process ended is no score."""
        found: dict[str, Losses | None] = {}
        same = False
        for row in raw_rows(self.path):
            if isinstance(row, Bad):
                continue
            number, line = row
            try:
                if "of" in line:
                    same = line["of"] == self.of
                elif line.get("none"):
                    found[str(line["row"])] = None
                else:
                    means, counts = (float(line["behind"]), float(line["alone"])), (line["tokens"], line["row_tokens"])
                    found[str(line["row"])] = Losses(*means, *map(int, counts))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self.path} line {number}: not a score, and scores would be kept in this file",
                    "Move it away, or choose another --out.",
                ) from error
        if same:
            self.known = found
