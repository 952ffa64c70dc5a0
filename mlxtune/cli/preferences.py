"""mlxtune eval on pairs and rated answers: what is asked of the models, and how the result is shown."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxtune_convert.shown import shown_name

from mlxtune.cli import common, pages
from mlxtune.cli.comparison_table import table_of
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mlxtune.config.resolve import Config


def no_page() -> UserError:
    """What is said of --html where the rows are no pairs."""
    return UserError(
        "--html has no effect without --suite: the loss needs no answers", "Name the prompts: --suite FILE."
    )


def require_sides(config: Config) -> None:
    """Raise `no_page` where the data is seen not to be pairs or rated answers, before a model is read: by the first
    row of a file. Of a dataset of the hub that is known later.
    """
    from mlxtune.data.dataset import sources
    from mlxtune.data.rows.formats import Record
    from mlxtune.data.rows.sides import Side

    for source in config.data.mixture():
        if sources.is_hub_id(source.path):
            return
        for files in sources.files_by_split(source, preferences=bool(config.preference.loss)).values():
            for row in islice(files[0].read(), 1):
                if isinstance(row, Record) and row.side == Side.NONE:
                    raise no_page()


def write_page(file: Path, title: str, told: Mapping[str, Any]) -> None:
    from mlxtune.report.of_preferences import page_of

    pages.write(file, page_of(title, told))


def draw(out: Console, told: Mapping[str, Any]) -> None:
    """Print a document as `evaluate.preferences.report` makes it."""
    from mlxtune.evaluate.comparison.summary import UNCORRECTED
    from mlxtune.evaluate.preferences import MEANINGS, lines_of

    if told["checks"]:
        out.print(table_of(told["checks"], ("base", "tuned"), of="pairs" if told["kind"] == "pairs" else "rows"))
        for name in told["checks"]:
            out.print(f"{name}: {MEANINGS[name]}", soft_wrap=True, style="dim")
        if "rewards" in told and len(told["checks"]) > 1:
            out.print(f"{UNCORRECTED}.", soft_wrap=True, style="dim")
    out.print(_sides(told))
    for line in lines_of(told):
        out.print(line, soft_wrap=True)
    for note in told["notes"]:
        common.note(note)


def _sides(told: Mapping[str, Any]) -> Table:
    """A line for each side: how likely its answers are, and how far they moved."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("answers")
    names = ["tokens", "base, nats a token"]
    if "rewards" in told:
        names += ["tuned", "drift", "reward", "less likely"]
    for name in names:
        table.add_column(name, justify="right")
    for side, facts in told["sides"].items():
        cells = [f"{facts['tokens']:,}", f"{facts['base']:.4f}"]
        if "tuned" in facts:
            cells += [f"{facts['tuned']:.4f}", f"{facts['drift']:+.4f}", f"{facts['reward']:+.4f}"]
            cells.append(f"{facts['less_likely']:.1%}")
        table.add_row(shown_name(f"{facts['answers']:,} {side}"), *cells)
    return table
