"""mlxtune data: what the model will see."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import common

if TYPE_CHECKING:
    from rich.console import Console

    from mlxtune.data.sources import Row


@click.group()
def data() -> None:
    """Look at training data as the model sees it."""


@data.command()
@common.model_option()
@click.option("--data", "path", required=True, metavar="PATH", help="Folder, file, or hub dataset id.")
@click.option(
    "--split", type=click.Choice(["train", "valid", "test"]), help="Which split.  [default: train; a file: all rows]"
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first rows.  [default: 5, with --json all]")
@click.option("--json", "as_json", is_flag=True, help="JSON Lines with ids and mask.")
@common.settings_option
def show(model: str, path: str, split: str | None, limit: int | None, as_json: bool, settings: tuple[str, ...]) -> None:
    """Print rows rendered by the model's chat template, coloured by what is trained on.

    Green (or between the marks where there is no colour) is what the model must produce; the rest is context.
    DIR may hold a tokenizer alone.

    \b
    mlxtune data show --model model --data train.jsonl --limit 3
    mlxtune data show --model model --data data --split valid --json
    """
    from mlxtune import config
    from mlxtune.data import sources
    from mlxtune.data.tokenizer import load_tokenizer
    from mlxtune.model import hub

    section = config.load(None, settings, {"data.path": path}).data
    rows = sources.rows_of(path, section, 0, split, "train")
    folder = hub.resolve(model)
    tokenizer = load_tokenizer(folder)
    sources.require_template(tokenizer, folder, rows)
    out = common.stdout()
    for record in rows[: limit or (None if as_json else 5)]:
        row = sources.to_row(tokenizer, record, section)
        if as_json:
            click.echo(json.dumps(_as_json(tokenizer, row), ensure_ascii=False))
        else:
            _print(out, tokenizer, row)


def _as_json(tokenizer: Any, row: Row) -> dict[str, Any]:
    if row.example is None:
        return {"row": row.record.row, "dropped": row.dropped}
    text = tokenizer.decode(row.example.ids, clean_up_tokenization_spaces=False)
    return {"row": row.record.row, "ids": row.example.ids, "mask": row.example.mask, "text": text}


def _print(out: Console, tokenizer: Any, row: Row) -> None:
    from rich.text import Text

    if row.example is None:
        out.print(Text(f"{row.record.place}: dropped ({row.dropped})", style="bold red"))
        return
    ids, mask = row.example.ids, row.example.mask
    ending = ", shortened" if row.shortened else ""
    out.print(Text(f"{row.record.place}: {len(ids)} tokens, {sum(mask)} trained on{ending}", style="bold"))
    body = Text()
    for supervised, run in groupby(range(len(ids)), key=mask.__getitem__):
        text = tokenizer.decode([ids[index] for index in run], clean_up_tokenization_spaces=False)
        shown = text if out.is_terminal or not supervised else f"⟦{text}⟧"
        body.append(shown, style="green" if supervised else "dim")
    out.print(body)
    out.print()
