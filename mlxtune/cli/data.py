"""mlxtune data: what the model will see."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.shown import shown, shown_json, shown_name

from mlxtune.cli import common

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from mlxtune.config.resolve import Config
    from mlxtune.data.chat.renderer import Renderer, Row


@click.group()
def data() -> None:
    """Look at training data as the model sees it."""


@data.command()
@common.model_option()
@click.option("--data", "path", required=True, metavar="PATH", help="Folder, file, or hub dataset id.")
@common.split_option("Which split.  [default: all rows of the train files]")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first rows.  [default: 5, with --json all]")
@click.option("--json", "as_json", is_flag=True, help="JSON Lines with ids and mask.")
@common.settings_option
def show(model: str, path: str, split: str | None, limit: int | None, as_json: bool, settings: tuple[str, ...]) -> None:
    """Print rows rendered by the model's chat template, coloured by what is trained on.

    Green (or between the marks where there is no colour) is what the model must produce; the rest is context.
    DIR may hold a tokenizer alone. A row is printed as its examples: turns that do not share one have their own.
    --split train and valid divide the rows of a train file as training does, before data.dedup, data.cap and
    data.on_damage leave any out.

    \b
    mlxtune data show --model model --data train.jsonl --limit 3
    mlxtune data show --model model --data data --split valid --json
    """
    from itertools import islice

    from mlxtune.cli import survey_table
    from mlxtune.config import resolve as config
    from mlxtune.data.dataset import mixture, sources

    cache = () if split else ("data.cache",)  # only what training would hold out needs all rows
    common.refuse_idle(settings, "data.cap", "data.dedup", "data.order", "data.on_damage", *cache)
    resolved = config.load(None, settings, {"data.path": path})
    folder, renderer = _renderer(model, resolved)
    out, tokenizer = common.stdout(), renderer.tokenizer
    with survey_table.progress(common.console()) as progress:

        def good(source: sources.Source) -> np.ndarray:
            told = progress(source.name)
            return mixture.hashes_of(source, renderer, folder, lambda name, count: told(count))

        found = sources.rows_of(resolved.data, resolved.train.seed, split, good)
    rows = sources.with_template(found, tokenizer, folder, resolved.data.template)
    for record in islice(rows, limit or (None if as_json else 5)):
        for row in renderer.rows([record]):
            if as_json:
                click.echo(shown_json(_as_json(tokenizer, row)))
            else:
                _print(out, tokenizer, row)


def _renderer(model: str, config: Config) -> tuple[Path, Renderer]:
    """The tokenizer's folder, and what makes its examples; the data is known to be there."""
    from mlxtune.data.chat.renderer import Renderer
    from mlxtune.data.dataset import sources
    from mlxtune.data.template.tokenizer_changes import for_rows
    from mlxtune.model import hub

    sources.glance(config.data)
    folder = hub.resolve(model)
    return folder, Renderer(for_rows(folder, config), config.data)


def _as_json(tokenizer: Any, row: Row) -> dict[str, Any]:
    part = {"part": row.part} if row.part else {}
    damage = {"damage": [found.text for found in row.damage]} if row.damage else {}
    kinds = {"kinds": [[kind, message + 1] for kind, message in row.kinds]} if row.kinds else {}
    if row.example is None:
        return {"row": row.record.row, **part, "dropped": row.dropped, **damage, **kinds}
    ids = [int(token) for token in row.example.ids]
    text = row.text if not row.shortened else tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return {
        "row": row.record.row,
        **part,
        "ids": ids,
        "mask": row.example.mask.tolist(),
        "text": text,
        **damage,
        **kinds,
    }


def _print(out: Console, tokenizer: Any, row: Row) -> None:
    import numpy as np
    from rich.text import Text

    from mlxtune.data.chat.asked import KINDS

    if row.example is None:
        out.print(Text(shown_name(f"{row.place}: dropped ({row.dropped})"), style="bold red"))
        return
    ids, mask = row.example.ids, row.example.mask
    ending = ", shortened" if row.shortened else ""
    told = f"{row.place}: {len(ids)} tokens, {np.count_nonzero(mask)} trained on{ending}"
    out.print(Text(shown_name(told), style="bold"))
    for damage in row.damage:
        out.print(Text(f"damage: {shown_name(damage.text)}", style="bold red"))
    for kind, message in row.kinds:
        out.print(Text(f"message {message + 1}: {KINDS[kind]}", style="yellow"))
    body = Text()
    for supervised, run in groupby(range(len(ids)), key=mask.__getitem__):
        text = shown(tokenizer.decode([ids[index] for index in run], clean_up_tokenization_spaces=False))
        marked = text if out.is_terminal or not supervised else f"⟦{text}⟧"
        body.append(marked, style="green" if supervised else "dim")
    out.print(body)
    out.print()


@data.command()
@common.model_option()
@click.option("--data", "path", metavar="PATH", help="Folder, file, or hub dataset id.")
@click.option(
    "-c", "--config", "file", metavar="FILE", help="Take data.sources and the other keys from a configuration."
)
@common.json_option
@click.option("--strict", is_flag=True, help="Exit with 2 when there is an error among the findings.")
@common.settings_option
def check(
    model: str, path: str | None, file: str | None, as_json: bool, strict: bool, settings: tuple[str, ...]
) -> None:
    """Survey training data: what will be learned from it, and what looks wrong.

    Lengths, roles, duplicates, leaks, damage, odd answers, suspected secrets; each finding names rows and what to do.
    All rows are looked at as they stand, before data.dedup, data.cap and data.order choose among them.

    \b
    mlxtune data check --model model --data data
    mlxtune data check --model model --data train.jsonl --strict --json
    """
    from itertools import chain

    from mlxtune.cli import survey_table
    from mlxtune.config import resolve as configuration
    from mlxtune.data.dataset import sources
    from mlxtune.data.survey import survey as checks
    from mlxtune.errors import UserError
    from mlxtune.train import reach

    common.refuse_idle(
        settings, "data.cap", "data.dedup", "data.order", "data.on_damage", "data.cache", "data.valid_fraction"
    )
    config = configuration.load(file, settings, {"data.path": path})
    if file is not None:
        for line in reach.hub_notes(config, file, {"model.path"} | reach.keys_named(settings, {"data.path": path})):
            common.note(line)
    folder, renderer = _renderer(model, config)
    splits: dict[str, checks.Split] = {}
    with survey_table.progress(common.console()) as progress:
        for number, source in enumerate(config.data.mixture(), 1):
            found = sources.find(source, config.data.hub == "stream")
            for split, files in found.items():
                name = split if config.data.sources is None else f"{split} {number}"
                splits[name] = checks.Split(name, files[0].name, len(files) > 1)
                read = chain.from_iterable(file.read() for file in files)
                rows = sources.with_template(read, renderer.tokenizer, folder, config.data.template)
                checks.survey(splits[name], rows, renderer, progress(files[0].name))
                if split == "train":
                    splits[name].find_unused(sources.unused(found))
    for name, other in splits.items():
        for trained, train in splits.items():
            if trained.startswith("train") and not name.startswith("train"):
                checks.leaks(train, other)
    told = checks.report(splits, config)
    if as_json:
        click.echo(shown_json(told))
    else:
        survey_table.draw(common.stdout(), told)
    errors = [finding for finding in told["findings"] if finding["severity"] == "error"]
    if strict and errors:
        listed = ", ".join(f"{finding['count']} {finding['what']} ({finding['split']})" for finding in errors)
        raise UserError(f"--strict: {listed}")


@data.command()
@click.argument("source", metavar="SOURCE")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT.jsonl")
@click.option(
    "--to", "target", type=click.Choice(["messages", "sharegpt", "alpaca"]), default="messages", show_default=True
)
@common.split_option("Of a folder.", default="train", show_default=True)
@click.option("--drop", is_flag=True, help="Leave out rows that do not fit, instead of refusing.")
@common.force_option
@common.settings_option
def convert(
    source: str, out: Path, target: str, split: str, drop: bool, force: bool, settings: tuple[str, ...]
) -> None:
    """Rewrite rows of any known format as JSON Lines of another.

    \b
    mlxtune data convert alpaca.json train.jsonl
    mlxtune data convert train.jsonl sharegpt.jsonl --to sharegpt
    mlxtune data convert gsm8k.csv train.jsonl --set 'data.columns={question: prompt, answer: completion}'
    """
    from itertools import chain

    from mlxtune.config import resolve as config
    from mlxtune.data.dataset import sources
    from mlxtune.data.rows.writers import rewrite
    from mlxtune.errors import UserError

    common.refuse_idle(settings, "", but=("data.columns",))
    if out.suffix != ".jsonl":
        raise UserError(f"{out}: JSON Lines are written", "Give it a name that ends with .jsonl.")
    section = config.load(None, settings, {"data.path": source}).data
    (given,) = section.mixture()
    found = sources.find(given)
    if split not in found:
        raise UserError(f"{source} has no {split} file", f"It has: {', '.join(found)}.")
    rows = chain.from_iterable(one.read() for one in found[split])
    written, left = rewrite(rows, target, out, force, drop, [Path(source)])
    for row in left:
        common.console().print(f"left out: {row.place}: {row.reason}", style="yellow", soft_wrap=True)
    common.stdout().print(f"{out}: {written:,} rows" + (f", {len(left):,} left out" if left else ""))
