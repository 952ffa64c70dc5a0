"""What commands take from mlxtune.yaml, where it lies in the folder that they run in: said in one line each time.

A command that is told less than it needs takes the rest from there. Flags are stronger; `-c` takes the file's place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.errors import UserError

if TYPE_CHECKING:
    from mlxtune.config.schema import ExportSection

# Options of `mlxtune eval` with which it does not ask the project's suite: they name another, or rows.
NO_SUITE = ("suite", "forgetting", "safety", "benchmark", "data", "split", "settings")


class RunOption(click.Option):
    """--adapter of a command that takes the project's run where neither a run nor a model is named; and the project's
    suite, where the command asks one and nothing else is to be evaluated.

    It is read before all other options (it is eager), and writes what it takes among what the command line gave. So
    whatever looks at options later, such as `OptionFor`, finds them as if they had been typed.
    """

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> tuple[Any, list[str]]:
        given = dict(opts)
        if not ctx.resilient_parsing:  # of a shell that completes a word
            given |= self._taken(ctx.command, opts)
            if isinstance(opts, dict):
                opts.update(given)
        return super().handle_parse_result(ctx, given, args)

    @staticmethod
    def _taken(command: click.Command, opts: Mapping[str, Any]) -> dict[str, str]:
        names = {option.name for option in command.params}
        wants_run = opts.get("model") is None and opts.get("adapter") is None
        wants_suite = "suite" in names and not any(opts.get(name) for name in NO_SUITE)
        if not wants_run and not wants_suite:
            return {}
        from mlxtune.project.file import found

        project = found()
        taken: dict[str, str] = {}
        if project is not None and wants_run:
            taken["adapter"] = str(project.out)
        if project is not None and wants_suite and project.suite is not None:
            taken["suite"] = str(project.suite)
        if project is not None and taken:
            say(project.file, *(f"--{name} {value}" for name, value in taken.items()))
        return taken


class RunArgument(click.Argument):
    """RUN, or the project's where none is named."""

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> tuple[Any, list[str]]:
        if not isinstance(opts.get(str(self.name)), str) and not ctx.resilient_parsing:
            from mlxtune.project.file import found

            project = found()
            if project is not None:
                say(project.file, f"{self.name.upper() if self.name else 'RUN'} {project.out}")
                opts = {**opts, str(self.name): str(project.out)}
        return super().handle_parse_result(ctx, opts, args)


def for_training(file: str | None, out: Path | None, resume: bool) -> tuple[str | None, Path | None]:
    """(The configuration file of `train`, its --out): as given, else the project's. A run that goes on has its own
    configuration.
    """
    if file is not None:
        _note_idle(file)
        return file, out
    from mlxtune.project.file import found

    project = None if resume and out is not None else found()
    if project is None:
        return file, out
    from mlxtune.train.ranks import Ranks

    taken = [] if resume else ["the settings"]
    if out is None:
        taken.append(f"--out {project.out}")
    if Ranks.here().first and taken:
        say(project.file, *taken)
    return None if resume else str(project.file), out or project.out


def _note_idle(file: str) -> None:
    """Say that a file's section `project` says nothing to a command that the file was named to: -c FILE."""
    from mlxtune.cli import common
    from mlxtune.config.resolve import PROJECT, find_config, read_sections
    from mlxtune.project.file import PROJECT_FILE

    if PROJECT in read_sections(find_config(file))[0]:
        common.note(f"{file}: its section `{PROJECT}` is for commands without -c, in the folder of {PROJECT_FILE}")


def require_model(path: str, file: str | None) -> None:
    """Raise UserError where a project's model is still to be converted. path: as the configuration has it; file: where
    that is from.
    """
    from mlxtune.model import hub
    from mlxtune.project.file import PROJECT_FILE

    is_project = file is not None and Path(file).name == PROJECT_FILE
    if is_project and path and not Path(path).expanduser().exists() and not hub.is_id(path):
        hint = f"Make it first: mlxtune convert MODEL {path} (its comment there names the command)."
        raise UserError(f"no folder {path}, which is the model of {file}", hint)


def is_its_run(folder: Path) -> bool:
    """Whether a run's folder is the one that commands take by themselves here."""
    from mlxtune.project.file import found

    project = found()
    return project is not None and project.out.absolute() == folder.absolute()


def runs_folder() -> Path:
    """Where `runs` looks for them, if it is told nothing: where the project has its run, else in runs."""
    from mlxtune.project.file import found

    project = found()
    if project is None:
        return Path("runs")
    say(project.file, f"FOLDER {project.out.parent}")
    return project.out.parent


def exports(out: Path | None) -> Sequence[ExportSection]:
    """What `export` makes where --to is not given. out: its --out. Raises UserError where the project lists nothing."""
    from mlxtune.project.file import PROJECT_FILE, found

    project = found()
    if project is None or not project.exports:
        listed = f"{project.file} lists nothing in project.export" if project else f"no {PROJECT_FILE} here lists any"
        raise UserError(f"no kind of export given, and {listed}", "Name one: --to peft, hf, gguf or gguf-lora.")
    if out is not None:
        raise UserError("--out has no effect without --to", f"The exports of {project.file} have places of their own.")
    say(project.file, *(f"--to {one.to} --out {one.out}" for one in project.exports))
    return project.exports


def for_rows(file: str | None, model: str | None, data: str | None) -> tuple[str | None, str]:
    """(The configuration by which rows are read, the model whose tokens they become): as given, else the project's.

    file, model, data: -c, --model and --data, None where not given. Raises UserError where no model is known.
    """
    from mlxtune.config import resolve
    from mlxtune.project.file import found

    project = found() if file is None and (model is None or data is None) else None
    if project is not None:
        file = str(project.file)
    own = resolve.load(file).model.path if file is not None else ""
    if project is not None:
        say(project.file, "the settings", *([f"--model {own}"] if model is None and own else []))
    if model is None and not own:
        raise UserError("no model given", "Name one, whose tokens the rows become: --model DIR.")
    if model is None:
        require_model(own, file)
    return file, model or own


def say(file: Path, *taken: str) -> None:
    """One line on standard error. taken: as one would have typed it."""
    from mlxtune.cli import common  # which needs this module

    common.note(f"{', '.join(taken)}, from {file}")
