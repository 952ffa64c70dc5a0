"""mlxtune rate and compare for the logs of chats: thumbs up or down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.files import digest, json_text
from mlxtune_convert.shown import shown, shown_name

from mlxtune.cli import common
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from mlxtune.evaluate.chats.log import ChatLog, Said

KEYS = "+ thumbs up   - thumbs down   s skip   q stop, and go on later"


def are_logs(paths: Sequence[Path]) -> bool:
    """Whether these are logs of chats, and no folders of evaluations. Raises UserError for some of both."""
    files = [path for path in paths if path.is_file()]
    if files and len(files) < len(paths):
        other = next(path for path in paths if path not in files)
        raise UserError(f"{files[0]} is a file, {other} is not", "Name logs of chats, or folders of evaluations.")
    return bool(files)


def opened(path: Path, model: str, adapter: Path | None) -> ChatLog:
    """The log that a chat adds to. Raises UserError for a file that is none."""
    from mlxtune_convert.adapters import AdapterConfig

    from mlxtune.evaluate.chats.log import ChatLog, Speaker

    if adapter is None:
        return ChatLog(path, Speaker(model, None, None))
    tensors = adapter / AdapterConfig.read(adapter).file
    return ChatLog(path, Speaker(model, str(adapter), digest(tensors)))


def rate(paths: Sequence[Path], result: bool, as_json: bool) -> None:
    """Ask for the thumbs that are missing, and print the shares; result: nothing is asked."""
    from mlxtune.evaluate.chats import log

    out = common.stdout()
    if not result:
        for path in paths:
            if not _ask(out, path, log.read(path)):
                return
    compare(paths, as_json)


def compare(paths: Sequence[Path], as_json: bool) -> None:
    """Print the share of thumbs up of each adapter."""
    from mlxtune.evaluate.chats import log
    from mlxtune.evaluate.chats.thumbs import shares

    found = shares([said for path in paths for said in log.read(path)])
    if as_json:
        click.echo(json_text(found))
    else:
        _draw(common.stdout(), found)


def _ask(out: Console, path: Path, answers: list[Said]) -> bool:
    """Of each answer without a thumb; False where the person stops. Each decision is on the disk at once."""
    from mlxtune.evaluate.chats import log

    waiting = [place for place, said in enumerate(answers) if said.label is None]
    for done, place in enumerate(waiting):
        _show(out, answers[place], f"{shown_name(str(path))}: {done + 1} of {len(waiting)}")
        typed = _typed(out)
        if typed == "q":
            out.print(f"{done} of {len(waiting)} done. The same command goes on.", soft_wrap=True)
            return False
        if typed != "s":
            answers[place] = replace(answers[place], label=typed == "+")
            log.write(path, answers)
    return True


def _show(out: Console, said: Said, title: str) -> None:
    from rich.rule import Rule
    from rich.text import Text

    out.print(Rule(title))
    for message in said.prompt:
        out.print(Text(f"{shown_name(message['role'])}:", style="bold"))
        out.print(Text(shown(str(message.get("content") or "")), style="dim"))
    out.print(Text("Answer:", style="bold cyan"))
    out.print(Text(shown(said.text)))


def _typed(out: Console) -> str:
    """One of the keys; "q" at the end of input and for Ctrl-C."""
    while True:
        out.print(KEYS, style="dim", markup=False)
        try:
            typed = input("> ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return "q"
        if typed in ("+", "-", "s", "q"):
            return typed


def _draw(out: Console, found: dict[str, Any]) -> None:
    from rich.table import Table

    from mlxtune.evaluate.chats.thumbs import name_of

    table = Table("adapter", box=None, padding=(0, 2, 0, 0))
    for name in ("thumbs up", "rated", "not rated", "share", "95% interval"):
        table.add_column(name, justify="right")
    for entry in found["adapters"]:
        counts = [str(entry[name]) for name in ("up", "rated", "unrated")]
        shown_share = ["", ""]
        if entry["share"] is not None:
            low, high = entry["interval"]
            shown_share = [f"{entry['share']:.1%}", f"{low:.1%} to {high:.1%}"]
        table.add_row(shown_name(name_of(entry)), *counts, *shown_share)
    out.print(table)
    for note in found["notes"]:
        common.note(note)
