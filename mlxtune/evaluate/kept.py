"""What took long to compute, kept in a file as it comes, so that a command that was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxtune_convert.files import explained, flush_open, json_text

from mlxtune.data.rows.readers import Bad, raw_rows
from mlxtune.errors import UserError


def append_lines(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add JSON Lines to a file, and see them on the disk. A line that a kill cut off before is left as it is."""
    with explained(file), file.open("ab+") as opened:
        if opened.tell():
            opened.seek(-1, 2)
            if opened.read(1) != b"\n":
                opened.write(b"\n")
        opened.write("".join(json_text(line) + "\n" for line in lines).encode())
        opened.flush()
        flush_open(opened.fileno())


def require_own(file: Path, begins: str, what: str) -> None:
    """Raise UserError for a file to which lines of ours must not be added: a link, which leads to a file of somebody
    else, and one that does not begin as ours do. begins: how each of ours does, and so one of which a kill left a part
    of its first line; what: is kept in it.
    """
    hint = "Move it away, or choose another --out."
    if file.is_symlink():
        raise UserError(f"{file} is a link, and {what} would be kept there", hint)
    if not file.exists():
        return
    if not file.is_file():
        raise UserError(f"{file} is no file, and {what} would be kept there", hint)
    try:
        with file.open("rb") as opened:
            start = opened.read(len(begins.encode()))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})", hint) from error
    if not begins.encode().startswith(start):
        raise UserError(f"{file} holds something else, and {what} would be kept there", hint)


class Kept:
    """Values by name: {"name": "answer of g7", "value": [...]} a line. A line that cannot be read is computed again."""

    def __init__(self, file: Path | None) -> None:
        """file: None keeps them in memory alone."""
        self.file = file
        self._known: dict[str, Any] = {}
        if file is not None and file.exists():
            for row in raw_rows(file):
                if not isinstance(row, Bad) and isinstance(row[1].get("name"), str) and "value" in row[1]:
                    self._known[row[1]["name"]] = row[1]["value"]

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> Any:
        return self._known[name]

    def keep(self, values: Mapping[str, Any]) -> None:
        """Remember values, which are JSON, and write them at once."""
        self._known |= values
        if self.file is not None:
            append_lines(self.file, ({"name": name, "value": value} for name, value in values.items()))
