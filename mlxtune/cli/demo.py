"""mlxtune demo."""

from __future__ import annotations

from pathlib import Path

import click

from mlxtune.cli import common


@click.command()
@click.option(
    "--model",
    metavar="PATH",
    help="Another model: GGUF file, folder or hub id.  [default: SmolLM2-135M-Instruct from PyPI]",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Where everything goes."
)
@click.option("--steps", type=click.IntRange(min=1), default=None, help="Optimizer steps.  [default: 48]")
@common.force_option
def demo(model: str | None, out: Path, steps: int | None, force: bool) -> None:
    """The whole story in a few minutes: convert, measure, tune, compare, fuse, export.

    A small model learns to answer as a shop's support desk, always in one JSON shape.

    \b
    mlxtune demo
    """
    from mlxtune.cli.comparison_table import draw
    from mlxtune.cli.display import Display
    from mlxtune.demo import story

    console = common.console()
    story.tell(model, out, steps, force, console, Display(console), draw)
