"""mlxtune demo."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import common

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@click.option(
    "--model",
    metavar="PATH",
    help="Another model: GGUF file, folder or hub id.  [default: SmolLM2-135M-Instruct from PyPI]",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Where everything goes."
)
@click.option("--steps", type=click.IntRange(min=1), default=None, help="Optimizer steps to train.  [default: 48]")
@common.force_option
def demo(model: str | None, out: Path, steps: int | None, force: bool) -> None:
    """The whole story in a few minutes: convert, measure, tune, compare, fuse, export.

    A small model learns to answer as a shop's support desk, always in one JSON shape.

    \b
    mlxtune demo
    """
    from mlxtune.cli import comparison_table, observed
    from mlxtune.cli.display import Display
    from mlxtune.cli.run_page import refresh_page, with_page
    from mlxtune.demo import story
    from mlxtune.train.run_folder import PAGE_FILE

    def draw(out: Console, result: Mapping[str, Any]) -> None:
        comparison_table.draw(out, result)
        observed.draw_briefly(out, result["observations"])

    console = common.console()
    run = out / "run"
    story.tell(model, out, steps, force, console, with_page(Display(console), run, "end"), draw)
    refresh_page(run)  # once more: there are exports now
    console.print(f"  {run / PAGE_FILE}  # the page of the run: open it in a browser", soft_wrap=True)
