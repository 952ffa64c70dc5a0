"""mlxtune data: what the model will see."""

from __future__ import annotations

from pathlib import Path

import click
from mlxtune_convert.shown import shown_json

from mlxtune.api.rendering import renderer_of
from mlxtune.cli import common, curate, in_project, pages
from mlxtune.cli.options import Command, Group, Need, OptionFor

SHOWN = 5  # rows that `data show` prints for people


model_option = click.option("--model", metavar="DIR", help=f"{common.MODEL}  [default: that of the configuration]")
config_option = click.option(
    "-c", "--config", "file", metavar="FILE", help="Take the data and the other keys from a configuration, or recipe."
)


@click.group(cls=Group)
def data() -> None:
    """Look at training data as the model sees it."""


data.add_command(curate.curate)


@data.command()
@model_option
@click.option("--data", "path", metavar="PATH", help="Folder, file, or hub dataset id.")
@config_option
@common.split_option("Which split is shown.  [default: all rows of the train files]")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first rows.  [default: 5, with --json all]")
@click.option("--json", "as_json", is_flag=True, help="JSON Lines with ids and mask.")
@common.settings_option
def show(
    model: str | None,
    path: str | None,
    file: str | None,
    split: str | None,
    limit: int | None,
    as_json: bool,
    settings: tuple[str, ...],
) -> None:
    """Print rows rendered by the model's chat template, coloured by what is trained on.

    Green (or between the marks where there is no colour) is what the model must produce; the rest is context.
    DIR may hold a tokenizer alone. A row is printed as its examples: turns that do not share one have their own. Of a
    pair the prompt is printed once, then the chosen answer (+, green) and the rejected one (-, red). With -c kto labels
    are ratings, shown by the same signs.
    --split train and valid divide the rows of a train file as training does, before data.dedup, data.cap and
    data.on_damage leave any out. In a folder with mlxtune.yaml, model and data may be left out.

    \b
    mlxtune data show --model model --data train.jsonl --limit 3
    mlxtune data show --model model --data data --split valid --json
    """
    from itertools import chain, islice

    from mlxtune.cli import shown_rows, survey_table
    from mlxtune.config import resolve as config
    from mlxtune.data.chat.by_row import by_row
    from mlxtune.data.dataset import holdout
    from mlxtune.data.rows.readers import Bad
    from mlxtune.data.rows.two_sides import TwoSides, records_of, together
    from mlxtune.errors import UserError
    from mlxtune.train import reach

    cache = () if split else ("data.cache",)  # only what training would hold out needs all rows
    common.refuse_idle(settings, "data.cap", "data.dedup", "data.order", "data.on_damage", *cache)
    named = reach.keys_named(settings, {"data.path": path, "model.path": model})
    file, model = in_project.for_rows(file, model, path)
    resolved = config.load(file, settings, {"data.path": path})
    if resolved.data.sources and len(resolved.data.sources) > 1:
        raise UserError(f"{file} names several sources", "Name the rows to show: --data PATH.")
    if file is not None:
        for line in reach.hub_notes(resolved, file, named):
            common.note(line)
    renderer = renderer_of(model, resolved)
    out = common.stdout()
    with survey_table.progress(common.console()) as progress:
        rows = holdout.rows_of_split(
            resolved.data, resolved.train.seed, split, renderer, progress, bool(resolved.preference.loss)
        )
    if limit is None and not as_json:
        limit = SHOWN
    for one in islice(together(rows), limit):
        records = [one] if isinstance(one, Bad) else records_of(one)
        parts = list(chain.from_iterable(by_row(renderer.stream(records))))
        if as_json:
            for row in parts:
                click.echo(shown_json(shown_rows.as_json(renderer.tokenizer, row)))
        elif isinstance(one, TwoSides):
            shown_rows.draw_pair(out, renderer.tokenizer, parts)
        else:
            for row in parts:
                shown_rows.draw(out, renderer.tokenizer, row)


@data.command(cls=Command)
@model_option
@click.option("--data", "path", metavar="PATH", help="Folder, file, or hub dataset id.")
@config_option
@common.json_option
@click.option("--strict", is_flag=True, help="Exit with 2 when there is an error among the findings.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write all of it as one HTML page too.")
@click.option(
    "--force",
    is_flag=True,
    cls=OptionFor,
    needs=Need("html", why="nothing is written"),
    help="Replace a FILE that is no page of mlxtune.",
)
@common.settings_option
def check(
    model: str | None,
    path: str | None,
    file: str | None,
    as_json: bool,
    strict: bool,
    html: Path | None,
    force: bool,
    settings: tuple[str, ...],
) -> None:
    """Survey training data: what will be learned from it, and what looks wrong.

    Lengths, roles, duplicates, leaks, damage, odd answers, suspected secrets; each finding names rows and what to do.
    Also what questions ask for, kinds of conversation, style, and which rows were made. All rows are looked at as they
    stand, before data.dedup, data.cap and data.order choose among them. --html writes a page to pass on, with a row
    as it is trained on; what seems to be a secret is hidden in it. In a folder with mlxtune.yaml, its model and data
    are taken where none are named.

    \b
    mlxtune data check --model model --data data
    mlxtune data check --model model --data train.jsonl --strict --json
    mlxtune data check --model model --data data --html check.html
    """
    from mlxtune.cli import survey_table
    from mlxtune.config import resolve as configuration
    from mlxtune.data.survey import survey as checks
    from mlxtune.errors import UserError
    from mlxtune.train import reach

    common.refuse_idle(settings, "data.cap", "data.dedup", "data.order", "data.cache")
    named = reach.keys_named(settings, {"data.path": path, "model.path": model})
    file, model = in_project.for_rows(file, model, path)
    config = configuration.load(file, settings, {"data.path": path})
    if html is not None:  # what is wrong with it is said before the rows are read
        pages.require_place(html, force)
    if file is not None:
        for line in reach.hub_notes(config, file, named):
            common.note(line)
    renderer = renderer_of(model, config)
    with survey_table.progress(common.console()) as progress:
        told = checks.survey(config, renderer, progress)
    if html is not None:
        from mlxtune.report import data_page, surveyed

        found = surveyed.Surveyed(told, surveyed.first_row(config, renderer))
        pages.write(html, data_page.of_data(path or str(file), model, found), force)
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
    "--to",
    "target",
    type=click.Choice(["messages", "sharegpt", "alpaca", "pairs", "pairs-implicit", "openai", "llama-factory", "kto"]),
    default="messages",
    show_default=True,
    help="The format to write.",
)
@common.split_option("Which split of a folder.", default="train", show_default=True)
@click.option(
    "--drop",
    is_flag=True,
    help="Leave out what does not fit, instead of refusing: rows; of pairs, the rejected answers.",
)
@common.force_option
@common.json_option
@common.settings_option
def convert(
    source: str,
    out: Path,
    target: str,
    split: str,
    drop: bool,
    force: bool,
    as_json: bool,
    settings: tuple[str, ...],
) -> None:
    """Rewrite rows of any known format as JSON Lines of another.

    Pairs (a better and a worse answer to one prompt) are written as pairs, pairs-implicit, openai or llama-factory have
    them, or as kto: two rated answers each.

    \b
    mlxtune data convert alpaca.json train.jsonl
    mlxtune data convert train.jsonl sharegpt.jsonl --to sharegpt
    mlxtune data convert gsm8k.csv train.jsonl --set 'data.columns={question: prompt, answer: completion}'
    mlxtune data convert pairs.jsonl openai.jsonl --to openai
    mlxtune data convert pairs.jsonl chosen.jsonl --drop
    """
    from itertools import chain

    from mlxtune.config import resolve as config
    from mlxtune.data.dataset import sources
    from mlxtune.data.rows.rewriting import PREFERENCES, rewrite
    from mlxtune.errors import UserError

    common.refuse_idle(settings, "", but=("data.columns",))
    if out.suffix != ".jsonl":
        raise UserError(f"{out}: JSON Lines are written", "Give it a name that ends with .jsonl.")
    section = config.load(None, settings, {"data.path": source}).data
    (given,) = section.mixture()
    found = sources.files_by_split(given, preferences=target in PREFERENCES)
    if split not in found:
        raise UserError(f"{source} has no {split} file", f"It has: {', '.join(found)}.")
    rows = chain.from_iterable(one.read() for one in found[split])
    done = rewrite(rows, target, out, force, drop, [Path(source)])
    if as_json:
        lost = [{"file": row.file, "row": row.row, "reason": row.reason} for row in done.left_out]
        told = {"path": str(out), "rows": done.written, "left_out": lost, "rejected_answers_left_out": done.rejected}
        click.echo(shown_json(told))
        return
    for row in done.left_out:
        common.say(common.console(), f"left out: {row.place}: {row.reason}", style="yellow")
    if done.rejected:
        common.note(f"the rejected answers of {done.rejected:,} pairs are left out: a row of {target} has one answer")
    left = f", {len(done.left_out):,} left out" if done.left_out else ""
    common.stdout().print(f"{out}: {done.written:,} rows{left}")
