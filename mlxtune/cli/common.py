"""Options that several commands share, and where they print."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click
from mlxtune_convert.shown import brief

if TYPE_CHECKING:
    from rich.console import Console

    from mlxtune.config.resolve import Config
    from mlxtune.data.dataset.examples import Examples
    from mlxtune.model.load import Loaded

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


class Surviving:
    """A stream on which writing never fails. Where its terminal was closed, or whoever read it has ended (`2>&1 | tee`
    dies of the same Ctrl-C), nothing is written any more: a run must not be lost for words.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._lost()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._lost()

    def _lost(self) -> None:
        """What the stream still holds, and whatever else is written there, goes nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def console(quiet: bool = False) -> Console:
    """Standard error: progress, notes, and what is not the command's result."""
    from mlxtune.cli.console import console as safe

    return safe(stderr=True, quiet=quiet)


def note(text: str) -> None:
    """Say something that a person must know beside the result."""
    console().print(f"note: {brief(text)}", style="yellow", soft_wrap=True)


def stdout() -> Console:
    from mlxtune.cli.console import console as safe

    # Results are read by other programs too: no wrapping where nobody looks.
    return safe(soft_wrap=not sys.stdout.isatty())


def run_settings(adapter: Path | None, data: str | None, settings: tuple[str, ...] = ()) -> Config:
    """The configuration a run was made with (defaults without one), its data replaced by --data."""
    from mlxtune.config import resolve
    from mlxtune.train.run_folder import RunFolder

    flags = {"data.path": data}
    if adapter is not None and RunFolder(adapter).is_run():
        return RunFolder(adapter).config(None, settings, flags)
    return resolve.load(None, settings, flags)


def held_out(
    tokenizer: Any,
    folder: Path,
    adapter: Path | None,
    data: str | None,
    settings: tuple[str, ...] = (),
    split: str | None = None,
) -> tuple[Examples, Config]:
    """(The rows to compare on: --data's, else the run's own; the configuration they are read with). The hub is not
    asked for rows that the run's folder alone names.

    tokenizer, folder, split: as `evaluate.held_out` takes them.
    """
    from mlxtune.data.dataset.sources import is_hub_id
    from mlxtune.evaluate import held_out
    from mlxtune.train import reach
    from mlxtune.train.run_folder import RunFolder

    config = run_settings(adapter, data, settings)
    own = data is None
    local_only = ""
    if adapter is not None and RunFolder(adapter).is_run():
        named = reach.keys_named(settings, {"data.path": data})
        for line in reach.cache_notes(config, str(RunFolder(adapter).config_file), named):
            note(line)
        if named.isdisjoint(reach.DATA_KEYS):
            local_only = reach.compared(config.data)
        # Who names the run's own dataset, to have it fetched, means the rows that the run held out of it.
        if is_hub_id(config.data.path) and data == run_settings(adapter, None).data.path:
            own = True
    return held_out.held_out(tokenizer, folder, config, split, own, local_only), config


def load_model(model: str, adapter: Path | None) -> Loaded:
    """The model, with the adapter on it and the chat template that it was tuned with."""
    from mlxtune_convert.adapters import AdapterConfig

    from mlxtune.adapter import adapter_files
    from mlxtune.data.template.tokenizer_changes import Changes
    from mlxtune.model import load

    if adapter is not None:
        AdapterConfig.read(adapter)  # a wrong folder is said before the model is read
    loaded = load.load(model)
    if adapter is not None:
        Changes.read(adapter).apply(loaded.tokenizer, loaded.path)
        adapter_files.load_adapter(loaded.model, adapter, loaded.config)
    return loaded


def refuse_idle(settings: tuple[str, ...], *idle: str, but: tuple[str, ...] = ()) -> None:
    """Raise UserError for a --set that the command does not look at. idle: beginnings of such keys; but: exceptions."""
    from mlxtune.errors import UserError

    for setting in settings:
        key = setting.partition("=")[0].strip()
        if key.startswith(idle) and key not in but:
            hint = f"Only {', '.join(but)} has one." if but else "It matters in training."
            raise UserError(f"--set {key} has no effect here", hint)
