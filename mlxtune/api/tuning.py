"""`mlxtune.tune`: a run, from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlxtune.api.arguments import TUNING, in_python
from mlxtune.config import resolve
from mlxtune.config.resolve import Config
from mlxtune.errors import UserError
from mlxtune.train import run, runs
from mlxtune.train.events import nobody
from mlxtune.train.run_folder import RunFolder, default_folder


@dataclass(frozen=True)
class Run:
    """A run that has ended, or one that was opened: what the other functions take."""

    folder: Path  # RUN: the adapter, the configuration, the events and the page
    config: Config  # resolved: every key with its value
    step: int  # optimizer steps that were taken
    best_loss: float | None  # the lowest validation loss after a step, nats a token (of preferences a row); None: none

    @property
    def model(self) -> str:
        """The folder, or hub id, of the model that it was trained on."""
        return self.config.model.path

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """The run in a folder. Raises UserError where there is none."""
        opened = RunFolder(Path(folder))
        if not opened.is_run():
            raise UserError(f"{folder} is no run", "Name the folder that tune or `mlxtune train` wrote.")
        (found,) = runs.find(opened.path)
        return cls(opened.path, opened.config(), found.step, found.best_loss)


def tune(
    config: Config | str | Path | Mapping[str, Mapping[str, object]],
    settings: Mapping[str, object] | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    resume_anyway: bool = False,
    force: bool = False,
    listener: Callable[[dict[str, object]], None] = nobody,
) -> Run:
    """Train an adapter, as `mlxtune train` does, and return the run.

    config: a file, the name of a shipped recipe ("quick", "qlora"), sections as a mapping ({"model": {"path": ...}}),
    or a Config. settings: dotted keys, which beat it ({"train.steps": 100}). out: the run's folder; None: a new one
    below runs/. resume: go on from the newest checkpoint in `out`; resume_anyway: though keys that may change did.
    force: replace the run that `out` holds, once the new one begins. listener: called with each event, a dictionary,
    as RUN/events.jsonl keeps them; it may print, plot, or raise KeyboardInterrupt to stop.

    Raises UserError for anything wrong with configuration, data or model, and Interrupted after a signal, once what is
    worth keeping was saved.

    >>> run = mlxtune.tune("quick", {"model.path": "model", "data.path": "data", "train.steps": 2}, out="run")
    >>> run.step, run.folder.name
    (2, 'run')
    """
    with in_python(TUNING):
        return _tuned(_resolved(config, settings or {}), out, listener, resume or resume_anyway, resume_anyway, force)


def _tuned(
    resolved: Config,
    out: str | Path | None,
    listener: Callable[[dict[str, object]], None],
    resume: bool,
    anyway: bool,
    force: bool,
) -> Run:
    """The run of a configuration that is complete. The arguments are those of `tune`."""
    if not resolved.model.path:
        raise UserError("no model given", "Name one: model.path in the configuration or the settings.")
    if resume and out is None:
        raise UserError("resume needs the run to go on with", "Name it: out=RUN.")
    if resume and force:
        raise UserError("force begins a run anew, and resume goes on with one", "Leave out one of them.")
    if force and out is None:
        raise UserError("force has no effect without out: a run has a new folder then", "Leave out force.")
    folder = Path(out) if out is not None else default_folder(resolved.model.path)
    state = run.tune(resolved, folder, listener, resume, anyway, force=force)
    written = RunFolder(folder)
    # Of several processes the first alone has the folder.
    return Run(folder, written.config() if written.is_run() else resolved, state.step, state.best_loss)


def _resolved(
    config: Config | str | Path | Mapping[str, Mapping[str, object]], settings: Mapping[str, object]
) -> Config:
    """One configuration of all that was given."""
    if not isinstance(config, Config | str | Path | Mapping):
        raise UserError(
            f"config: expected a file, a recipe, sections or a Config, got {config!r}", 'As in tune("quick", ...).'
        )
    if not isinstance(settings, Mapping):
        raise UserError(f"settings: expected dotted keys with values, got {settings!r}", 'As in {"train.steps": 100}.')
    if isinstance(config, str | Path):
        return resolve.load(config, (), settings)
    tree = config.model_dump(exclude_unset=True) if isinstance(config, Config) else config
    flags: dict[str, object] = {}
    for section, keys in tree.items():
        if not isinstance(keys, Mapping):
            raise UserError(
                f"{section}: expected a section with its keys, got {keys!r}", 'As in {"train": {"steps": 100}}.'
            )
        flags |= {f"{section}.{name}": value for name, value in keys.items()}
    return resolve.load(None, (), {**flags, **settings})
