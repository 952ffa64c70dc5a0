"""Options that several commands share, and where they print."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from mlxtune_convert.shown import brief

from mlxtune.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


F = TypeVar("F", bound=Callable[..., Any])


def model_option(required: bool = True) -> Callable[[F], F]:
    return click.option("--model", required=required, metavar="DIR", help="MLX folder, 16-bit HF folder, or hub id.")


def split_option(text: str, **settings: Any) -> Callable[[F], F]:
    return click.option("--split", type=click.Choice(["train", "valid", "test"]), help=text, **settings)


adapter_option = click.option(
    "--adapter", type=click.Path(path_type=Path), metavar="RUN", help="A run's folder (or any MLX adapter folder)."
)
settings_option = click.option(
    "--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one key of the configuration."
)
force_option = click.option("--force", is_flag=True, help="Replace the destination.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document.")


def console(quiet: bool = False) -> Console:
    """Standard error: progress, notes, and what is not the command's result."""
    from mlxtune.cli.console import console as safe

    return safe(stderr=True, quiet=quiet)


def note(text: str) -> None:
    """Say something that a person must know beside the result."""
    console().print(f"note: {brief(text)}", style="yellow", soft_wrap=True)


def stdout() -> Console:
    """Standard output: the command's result."""
    from mlxtune.cli.console import console as safe

    # Results are read by other programs too: no wrapping where nobody looks.
    return safe(soft_wrap=not sys.stdout.isatty())


def refuse_idle(settings: tuple[str, ...], *idle: str, but: tuple[str, ...] = ()) -> None:
    """Raise UserError for a --set that the command does not look at. idle: beginnings of such keys; but: exceptions."""
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if key.startswith(idle) and key not in but:
            hint = f"Only {', '.join(but)} has one." if but else "It matters in training."
            raise UserError(f"--set {key} has no effect here", hint)
