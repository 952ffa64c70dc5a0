"""How --help is laid out: as click does it, and on a narrow terminal too, where click would go on at 50 columns."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

import click

NARROW = 52  # columns; from here on click's own layout fits
NARROWEST = 24  # of a line


class Formatter(click.HelpFormatter):
    """Lines as long as the terminal's; where these are short, long names of options stand on lines of their own."""

    def __init__(self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None) -> None:
        columns = shutil.get_terminal_size().columns
        if width is None and columns < NARROW:
            width = max(columns - 2, NARROWEST)
        super().__init__(indent_increment, width, max_width)

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl(rows, min(col_max, self.width // 3), col_spacing)


class Context(click.Context):
    formatter_class = Formatter


def lay_out(command: click.Command) -> None:
    """Lay out the help of a command, and of those below it."""
    command.context_class = Context
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            lay_out(inner)
