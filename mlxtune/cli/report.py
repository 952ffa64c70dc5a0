"""mlxtune report."""

from __future__ import annotations

from pathlib import Path

import click
from mlxtune_convert.files import json_text
from mlxtune_convert.shown import shown_name

from mlxtune.cli import common, live


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="[default: RUN/report.html]")
@click.option("--open", "is_opened", is_flag=True, help="Show it in the browser.")
@click.option("--json", "as_json", is_flag=True, help="What the page shows, as one JSON document; no page is written.")
@common.force_option
@click.option(
    "--with",
    "others",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Another run, drawn over this one; may be given several times.",
)
@click.option("--live", "is_live", is_flag=True, help="Serve the page on this machine alone, fresh until Ctrl-C.")
@click.option(
    "--port", type=click.IntRange(1, 65535), metavar="N", help="Where --live serves it.  [default: any that is free]"
)
def report(
    run: Path,
    out: Path | None,
    is_opened: bool,
    as_json: bool,
    force: bool,
    others: tuple[Path, ...],
    is_live: bool,
    port: int | None,
) -> None:
    """Write the page of a run: what was done, whether it is better, curves, settings.

    One HTML file that needs no network and runs no script: it can be mailed, printed, and read on a phone. `mlxtune
    train` writes it at the end of every run (train.report); this makes it again, also of a run that goes on, was
    killed, or is damaged. A page of an earlier time is replaced.

    With --live no file is written: the page is served on 127.0.0.1 to whoever has the printed address, and follows the
    run. Ctrl-C ends the page and never the run.

    \b
    mlxtune report run
    mlxtune report run --out page.html --open
    mlxtune report run --with other-run --out both.html
    mlxtune report run --live
    mlxtune report run --json
    """
    from mlxtune.errors import UserError
    from mlxtune.report.composed import as_json as shown
    from mlxtune.report.run_record import read_run
    from mlxtune.report.written import write_page

    if as_json and (out is not None or is_opened or force):
        raise UserError("--json writes no page", "Leave out --out, --open and --force, or --json.")
    _refuse_same(run, others)
    if port is not None and not is_live:
        raise UserError("--port has no effect without --live", "Add --live, or leave out --port.")
    if is_live:
        if out is not None or as_json or force:
            raise UserError("--live writes nothing", "Leave out --out, --force and --json, or --live.")
        live.serve(run, others, port or 0, is_opened)
        return
    record = read_run(run)
    compared = [read_run(other) for other in others]
    if as_json:
        click.echo(json_text(shown(record, compared)))
        return
    for warning in record.warnings:
        common.note(shown_name(warning))
    page = write_page(record, out, force, others=compared)
    common.stdout().print(shown_name(page), soft_wrap=True)
    if is_opened and click.launch(page.resolve().as_uri()) != 0:
        common.note("no browser could be opened: open the file yourself")


def _refuse_same(run: Path, others: tuple[Path, ...]) -> None:
    """Raise UserError for a run that is compared with itself, and for more than can be told apart."""
    from mlxtune.errors import UserError
    from mlxtune.report.sections.comparing import MOST_RUNS

    places = [path.resolve() for path in (run, *others)]
    for number, path in enumerate(others, 1):
        if places[number] in places[:number]:
            raise UserError(f"{path} is named twice", "Name each run once.")
    if len(places) > MOST_RUNS:
        hint = f"Compare {MOST_RUNS} runs at most: more curves over each other cannot be told apart."
        raise UserError(f"{len(places)} runs on one page", hint)
