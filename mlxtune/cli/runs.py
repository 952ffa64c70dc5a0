"""mlxtune runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from mlxtune_convert.shown import shown_name
from mlxtune_convert.sizes import size

from mlxtune.cli import common, in_project

if TYPE_CHECKING:
    from mlxtune.train.runs import RunSummary

NARROW = 70  # columns; a table of runs has no room in fewer


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False, metavar="[FOLDER]")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def runs(folder: Path | None, as_json: bool) -> None:
    """List the runs in a folder: state, steps, best validation loss, size.

    FOLDER is runs, or where mlxtune.yaml has its run, if none is named. Where some are on preferences, also each one's
    objective, for losses of different objectives are different things, and the best accuracy on held-out rows.

    \b
    mlxtune runs
    mlxtune runs experiments --json
    """
    from rich.table import Table

    from mlxtune.errors import UserError
    from mlxtune.train import runs as listing

    folder = folder or in_project.runs_folder()
    if not folder.is_dir():
        raise UserError(f"no folder {folder}", "Name the folder that holds the runs: mlxtune runs FOLDER")
    summaries = listing.find(folder)
    if as_json:
        click.echo(json.dumps([{**asdict(run), "path": str(run.path)} for run in summaries]))
        return
    if not summaries:
        raise UserError(f"no runs in {folder}", "Name the folder that holds them: mlxtune runs FOLDER")
    out = common.stdout()
    if out.is_terminal and out.width < NARROW:
        for run in summaries:
            out.print(shown_name(run.path.name), style="bold")
            steps = f"{run.step}/{run.steps or '?'} steps"
            best = f"best loss {_best(run)}"
            if run.best_accuracy is not None:
                best += f" ({run.objective or 'preferences'}), best accuracy {run.best_accuracy:.1%}"
            out.print(f"  {run.model}, {run.state}, {steps}, {best}, {size(run.bytes)}")
        return
    with_objective = any(run.objective not in ("", listing.SUPERVISED) for run in summaries)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("run", "model", "state", *(["objective"] if with_objective else [])):
        table.add_column(name)
    for number in ("steps", "best loss", *(["best accuracy"] if with_objective else []), "size"):
        table.add_column(number, justify="right")
    for run in summaries:
        cells = [shown_name(run.path.name), shown_name(run.model), shown_name(run.state)]
        if with_objective:
            cells.append(run.objective or "-")
        cells += [f"{run.step}/{run.steps or '?'}", _best(run)]
        if with_objective:
            cells.append("-" if run.best_accuracy is None else f"{run.best_accuracy:.1%}")
        table.add_row(*cells, size(run.bytes))
    out.print(table)


def _best(run: RunSummary) -> str:
    return "-" if run.best_loss is None else f"{run.best_loss:.4f}"
