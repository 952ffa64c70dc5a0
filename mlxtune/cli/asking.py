"""Questions on a terminal, each of which an option answers as well: numbered lines and a prompt, on standard error.

What stands in a question may come from others (names of files and models), and is shown as any name is. An answer that
will not do is asked for again. Ctrl-C and the end of input stop the command.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import click
from mlxtune_convert.shown import brief, shown_name

from mlxtune.cli import common
from mlxtune.errors import UserError

T = TypeVar("T")


def can_ask() -> bool:
    """Whether somebody is there to answer."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def asked(question: str, options: Sequence[tuple[str, str]], default: str, read: Callable[[str], T]) -> T:
    """What was answered, as `read` understands it; asked for again where `read` raises UserError.

    options: (an answer, what is said of it), which a number from 1 chooses too; default: what an empty line means, "":
    nothing does.
    """
    from rich.table import Table
    from rich.text import Text

    console = common.console()
    console.print()
    console.print(question, style="bold")
    if options:
        listed = Table.grid(padding=(0, 2))
        listed.add_column(justify="right")
        listed.add_column(overflow="fold")
        for number, (answer, text) in enumerate(options, 1):
            listed.add_row(f"  {number}", Text(brief(shown_name(answer))), Text(shown_name(text), style="dim"))
        console.print(listed)
    while True:
        said = _line(default)
        if said.isdigit() and 1 <= int(said) <= len(options):
            said = options[int(said) - 1][0]
        try:
            return read(said)
        except UserError as error:
            click.echo(f"{brief(shown_name(error.message))}\n  {shown_name(error.hint)}".rstrip(), err=True)


def _line(default: str) -> str:
    """A line that somebody types, or the default for an empty one."""
    shown = f"[{brief(shown_name(default))}] " if default else ""
    while True:
        said = str(click.prompt(f"{shown}>", default="", show_default=False, prompt_suffix=" ", err=True)).strip()
        if said or default:
            return said or default
