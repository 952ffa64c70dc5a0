"""mlxtune report."""

from __future__ import annotations

from pathlib import Path

import click
from mlxtune_convert.files import json_text
from mlxtune_convert.shown import shown_name

from mlxtune.cli import common


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="[default: RUN/report.html]")
@click.option("--open", "is_opened", is_flag=True, help="Show it in the browser.")
@click.option("--json", "as_json", is_flag=True, help="What the page shows, as one JSON document; no page is written.")
@common.force_option
def report(run: Path, out: Path | None, is_opened: bool, as_json: bool, force: bool) -> None:
    """Write the page of a run: what was done, whether it is better, curves, settings.

    One HTML file that needs no network and runs no script: it can be mailed, printed, and read on a phone. `mlxtune
    train` writes it at the end of every run (train.report); this makes it again, also of a run that goes on, was
    killed, or is damaged. A page of an earlier time is replaced.

    \b
    mlxtune report run
    mlxtune report run --out page.html
    mlxtune report run --json
    """
    from mlxtune.errors import UserError
    from mlxtune.report.composed import as_json as shown
    from mlxtune.report.run_record import read_run
    from mlxtune.report.written import write_page

    if as_json and (out is not None or is_opened or force):
        raise UserError("--json writes no page", "Leave out --out, --open and --force, or --json.")
    record = read_run(run)
    if as_json:
        click.echo(json_text(shown(record)))
        return
    for warning in record.warnings:
        common.note(shown_name(warning))
    page = write_page(record, out, force)
    common.stdout().print(shown_name(page), soft_wrap=True)
    if is_opened and click.launch(page.resolve().as_uri()) != 0:
        common.note("no browser could be opened: open the file yourself")
