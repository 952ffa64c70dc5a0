"""mlxtune report."""

from __future__ import annotations

from pathlib import Path

import click
from mlxtune_convert.files import json_text
from mlxtune_convert.shown import shown_name

from mlxtune.cli import common, in_project, live
from mlxtune.cli.in_project import RunArgument


@click.command()
@click.argument("run", type=click.Path(path_type=Path), cls=RunArgument)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="Where the page goes.  [default: RUN/report.html]"
)
@click.option(
    "--evaluation",
    "evaluations",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="What `mlxtune eval --out` kept of this run.  [default: those in and beside RUN]",
)
@click.option("--no-answers", is_flag=True, help="Leave what the models said out of the page.")
@click.option("--open", "is_opened", is_flag=True, help="Show it in the browser.")
@click.option("--json", "as_json", is_flag=True, help="What the page shows, as one JSON document; no page is written.")
@common.force_option
@click.option(
    "--with",
    "compared",
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
    evaluations: tuple[Path, ...],
    no_answers: bool,
    is_opened: bool,
    as_json: bool,
    force: bool,
    compared: tuple[Path, ...],
    is_live: bool,
    port: int | None,
) -> None:
    """Write the page of a run: what was done, whether it is better, curves, settings.

    One HTML file that needs no network and runs no script: it can be mailed, printed, and read on a phone. `mlxtune
    train` writes it at the end of every run (train.report); this makes it again, also of a run that goes on, was
    killed, or is damaged. A page of an earlier time is replaced. In a folder with mlxtune.yaml RUN may be left out.

    \b
    mlxtune report run
    mlxtune report run --out page.html
    mlxtune report run --evaluation evals/first --no-answers
    mlxtune report run --with other-run --out both.html
    mlxtune report run --live
    mlxtune report run --json
    """
    from mlxtune.errors import UserError
    from mlxtune.report.composed import as_json as shown
    from mlxtune.report.evaluations import evaluations_of
    from mlxtune.report.run_record import read_run
    from mlxtune.report.sections.comparing import Other
    from mlxtune.report.written import write_page

    if as_json and (out is not None or is_opened or force or no_answers):
        hint = "Leave out --out, --open, --no-answers and --force, or --json."
        raise UserError("--json writes no page", hint)
    if not run.exists() and in_project.is_its_run(run):
        raise UserError(f"no folder {run}", "mlxtune train makes it.")
    _refuse_same(run, compared)
    if port is not None and not is_live:
        raise UserError("--port has no effect without --live", "Add --live, or leave out --port.")
    if is_live:
        if out is not None or as_json or force:
            raise UserError("--live writes nothing", "Leave out --out, --force and --json, or --live.")
        live.serve(run, compared, evaluations, not no_answers, port or 0, is_opened)
        return
    record = read_run(run)
    others = [Other.read(other) for other in compared]
    if as_json:
        click.echo(json_text(shown(record, evaluations_of(run, evaluations), others)))
        return
    for warning in record.warnings:
        common.note(shown_name(warning))
    page = write_page(record, out, force, evaluations, with_answers=not no_answers, others=others)
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
