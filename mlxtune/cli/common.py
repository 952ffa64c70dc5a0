"""Options that several commands share, and where they print."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from mlxtune_convert.shown import brief, shown_name

from mlxtune.cli.in_project import RunOption
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


F = TypeVar("F", bound=Callable[..., Any])


MODEL = "MLX folder, 16-bit HF folder, or hub id."


def model_option(required: bool = True) -> Callable[[F], F]:
    return click.option("--model", required=required, metavar="DIR", help=MODEL)


def model_of_run_option(text: str = MODEL) -> Callable[[F], F]:
    """--model of a command that has --adapter as well, whose run says which model it was trained on."""
    help_text = f"{text}  [default: the one that RUN was trained on]"
    return click.option("--model", metavar="DIR", callback=_or_that_of_the_run, help=help_text)


def _or_that_of_the_run(context: click.Context, _: click.Parameter, given: str | None) -> str:
    """--model as given, else the folder of what the configuration of the run names. Raises UserError where there is
    none: of a hub id that only the run names the copy in the local cache is taken, and the hub is not asked.
    """
    if given is not None:
        return given
    adapter: Path | None = context.params.get("adapter")  # read first: it is eager
    if adapter is None:
        raise UserError("no model given", "Name one: --model DIR; or the run that says which: --adapter RUN.")
    from mlxtune.train.run_folder import RunFolder

    run = RunFolder(adapter)
    if not adapter.is_dir():
        raise UserError(
            f"no folder {adapter}", "Name the run's folder, or an adapter's: --adapter RUN; mlxtune train makes one."
        )
    if not run.is_run():
        raise UserError(f"{adapter} does not say which model it belongs to", "Name the model: --model DIR.")
    model = run.config(None).model.path
    folder = Path(model).expanduser()
    if model and not folder.exists():
        from mlxtune.model import hub

        if hub.is_id(model):
            folder = hub.resolve(model, local_only=f"To ask the hub for it name it: --model {shlex.quote(model)}.")
    if not folder.is_dir():
        missing = "is no folder here" if model else "is not named"
        raise UserError(
            f"the model {model or 'that was trained'} of {run.config_file} {missing}", "Name it: --model DIR."
        )
    note(f"--model {model}, from {run.config_file}")
    return model if Path(model).expanduser().is_dir() else str(folder)


def split_option(text: str, **settings: Any) -> Callable[[F], F]:
    return click.option("--split", type=click.Choice(["train", "valid", "test"]), help=text, **settings)


def adapter_option(
    required: bool = False, text: str = "A run's folder (or any MLX adapter folder)."
) -> Callable[[F], F]:
    return click.option(
        "--adapter",
        required=required,
        type=click.Path(path_type=Path),
        is_eager=True,
        metavar="RUN",
        help=text,
        cls=RunOption,
    )


settings_option = click.option(
    "--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one key of the configuration."
)
force_option = click.option("--force", is_flag=True, help="Replace the destination.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document.")

QUIET = "mlxtune.quiet"  # in the memory of a command: whether it says nothing but its result and errors


def _hush(context: click.Context, _: click.Parameter, given: bool) -> None:
    context.meta[QUIET] = given


def may_be_quiet(command: click.Command) -> None:
    """Give a command the option --quiet, as its last but --help."""
    text = "No progress and no notes: the result and errors alone."
    command.params.append(
        click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, is_eager=True, callback=_hush, help=text)
    )


def console(quiet: bool = False) -> Console:
    """Standard error: progress, notes, and what is not the command's result. Silent with --quiet, too."""
    from mlxtune.cli.console import console as safe

    context = click.get_current_context(silent=True)
    hushed = context is not None and context.meta.get(QUIET, False)
    return safe(stderr=True, quiet=quiet or hushed)


def say(out: Console, line: str, style: str = "") -> None:
    """Print a sentence: a terminal gets it broken between words, whoever reads it otherwise on one line.

    (With rich's soft_wrap the terminal breaks it where its last column is, inside words. That is right for what is
    copied from there: commands, paths.)
    """
    out.print(shown_name(line), style=style, soft_wrap=not out.is_terminal, markup=False, highlight=False)


def note(text: str) -> None:
    """Say something that a person must know beside the result."""
    say(console(), f"note: {brief(text)}", style="yellow")


def next_commands(*commands: tuple[str | Path, ...]) -> None:
    """What is usually done next, on a terminal; a script that reads the result is told nothing more.

    commands: each its words, after `mlxtune`.
    """
    if not sys.stderr.isatty():
        return
    for number, words in enumerate(commands):
        begin = "next: " if number == 0 else "      "
        line = f"{begin}mlxtune {shlex.join(map(str, words))}"
        console().print(shown_name(line), style="dim", soft_wrap=True, markup=False, highlight=False)


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
