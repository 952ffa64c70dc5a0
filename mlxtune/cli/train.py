"""mlxtune train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.files import json_text
from mlxtune_convert.shown import brief

from mlxtune.cli import common, in_project
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from mlxtune.compute.counted import Epoch
    from mlxtune.config.resolve import Config
    from mlxtune.data.dataset.examples import Examples
    from mlxtune.train.checkpoint import State
    from mlxtune.train.reach import LocalOnly


# A flag for a key that nearly everyone sets: (flag, key, what a number it takes is, what it means).
EVERYDAY = (
    ("--epochs", "train.epochs", float, "How often every row is used."),
    ("--steps", "train.steps", int, "Optimizer steps, instead of --epochs."),
    ("--lr", "train.lr", float, "Peak learning rate."),
    ("--rank", "lora.rank", int, "Rank of the adapter."),
    ("--batch-rows", "train.batch_rows", int, "Rows computed together."),
    ("--max-tokens", "data.max_tokens", int, "Tokens of an example; longer ones are cut."),
)


def everyday_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for flag, key, kind, text in reversed(EVERYDAY):
        command = click.option(flag, key.replace(".", "__"), type=kind, metavar="N", help=f"{text} [{key}]")(command)
    return command


def _everyday_flags(given: Mapping[str, Any], settings: tuple[str, ...]) -> dict[str, Any]:
    """Key -> value of the everyday flags. Raises UserError for one that --set sets as well."""
    flags = {key: given[key.replace(".", "__")] for _, key, _, _ in EVERYDAY}
    set_too = {setting.partition("=")[0].strip() for setting in settings}
    for flag, key, _, _ in EVERYDAY:
        if flags[key] is not None and key in set_too:
            raise UserError(f"{flag} and --set {key} set the same key", "Leave out one of them.")
    return flags


@click.command()
@click.option(
    "-c",
    "--config",
    "file",
    metavar="FILE",
    help="YAML file, or a shipped recipe: quick, qlora, lora; of preferences dpo, orpo, kto.",
)
@common.model_option(required=False)
@click.option("--data", metavar="PATH", help="Folder with train.jsonl, one data file, or hub dataset id.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="The run's folder.  [default: that of mlxtune.yaml, or runs/<date>-<model>]",
)
@everyday_options
@common.settings_option
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --out, with its configuration.")
@click.option(
    "--resume-anyway",
    is_flag=True,
    help="The same, with keys changed that only say how long, how often, or who is told.",
)
@click.option("--force", is_flag=True, help="Replace the run that --out holds, once the new one begins.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; train nothing.")
@common.json_option
def train(
    file: str | None,
    model: str | None,
    data: str | None,
    out: Path | None,
    settings: tuple[str, ...],
    resume: bool,
    resume_anyway: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **everyday: Any,
) -> None:
    """Tune an adapter on a model (LoRA; QLoRA on a quantized one).

    It learns rows as they are or, with preference.loss, pairs of a chosen and a rejected answer, or rated answers.
    Flags beat the file, the file beats the defaults; in a folder with mlxtune.yaml that is the file, where -c names no
    other. RUN/adapters.safetensors ends up as the adapter with the lowest validation loss, and RUN/report.html shows
    what happened. Ctrl-C finishes the step, saves, and can be resumed, as can a run whose GPU failed. On several
    machines: mlx.launch. What FILE, or the run that goes on, turns on beyond this machine is told first; the hub is not
    asked for what that run alone names.

    \b
    mlxtune train -c quick --model model --data data
    mlxtune train -c qlora --model model --data data --lr 1e-4 --epochs 2 --out run
    mlxtune train -c dpo --model model --data pairs --set lora.start_from=run --out tuned
    mlxtune train --resume --out run
    mlxtune train --resume-anyway --out run --set train.epochs=3
    """
    from mlxtune.config import resolve as configuration

    resume = resume or resume_anyway
    file, out = in_project.for_training(file, out, resume)
    if resume and force:
        raise UserError("--force begins a run anew, and --resume goes on with one", "Leave out one of them.")
    if force and out is None:
        raise UserError("--force has no effect without --out: a run has a new folder then", "Leave out --force.")
    if resume and out is None:
        raise UserError("--resume needs the run to go on with", "mlxtune train --resume --out RUN")
    if resume and dry_run:
        raise UserError(
            "--dry-run plans a run from its first step; --resume goes on with one", "Leave out one of them."
        )
    if dry_run and as_json:
        raise UserError(
            "--dry-run prints a plan for people; --json tells of a run that has ended", "Leave out one of them."
        )
    flags: dict[str, Any] = {"model.path": model, "data.path": data, **_everyday_flags(everyday, settings)}
    config = _resumed(out, file, settings, flags) if resume and out else configuration.load(file, settings, flags)
    if data is not None and file is not None and configuration.load(file, settings).data.sources:
        common.note(f"--data {data} takes the place of data.sources in {file}")
    if not config.model.path:
        raise UserError("no model given", "Name one: --model DIR (or model.path in the configuration).")
    if model is None:
        in_project.require_model(config.model.path, file)
    local = _note_reach(config, file, out if resume else None, settings, flags)
    if not resume:
        _note_scale(config, file, settings, flags)
    if dry_run:
        _print_plan(config, out, force)
        return
    # Only now: these load MLX and transformers, and a typing error above is said at once.
    from mlxtune.cli.display import Display
    from mlxtune.cli.run_page import with_page
    from mlxtune.train.ranks import Ranks
    from mlxtune.train.run import tune
    from mlxtune.train.run_folder import default_folder

    folder = out or default_folder(config.model.path)
    first = Ranks.here().first
    display = Display(common.console(quiet=not first))
    with with_page(display, folder, config.train.report if first else "off") as listener:
        state = tune(config, folder, listener, resume, resume_anyway, local, force)
    if not first:
        return
    if as_json:
        click.echo(json_text({"run": str(folder), **_told(state)}))
        return
    best = ""
    if state.best_loss is not None:
        best = f", best validation loss {state.best_loss:.4f} at step {state.best_step}"
        if state.best_check is not None:
            by = f"{config.train.keep_by} {state.best_check:.3f}"
            best = f", best {by} at step {state.best_step}, where the validation loss is {state.best_loss:.4f}"
    saved = f", {display.saved}" if display.saved else ""
    common.stdout().print(f"{folder}: {state.step} steps{best}{saved}")
    # A folder is found by the run; a model of the hub is asked for where it is named.
    model = config.model.path
    words = () if Path(model).expanduser().is_dir() else ("--model", model)
    if words or not in_project.is_its_run(folder):
        words = (*words, "--adapter", str(folder))
    common.next_commands(*((command, *words) for command in ("eval", "chat")))


def _told(state: State) -> dict[str, Any]:
    """For programs, where a run stands."""
    return {name: getattr(state, name) for name in ("step", "skipped", "best_step", "best_loss", "best_check")}


def _resumed(out: Path, file: str | None, settings: tuple[str, ...], flags: Mapping[str, Any]) -> Config:
    """The configuration of the run in `out`, on the first of several processes."""
    from mlxtune.config import resolve as configuration
    from mlxtune.train.ranks import Ranks
    from mlxtune.train.run_folder import RunFolder

    if not Ranks.here().first:  # it gets the configuration of the first, which may be the only one that has the run
        return configuration.load(None, (), {"model.path": "told by the first"})
    return RunFolder(out).config(file, settings, flags)


def _note_scale(config: Config, file: str | None, settings: tuple[str, ...], flags: Mapping[str, Any]) -> None:
    """Say that the command line changes the rank and not lora.alpha, and so the scale of the update as well."""
    from mlxtune.config import resolve as configuration
    from mlxtune.train.ranks import Ranks

    named = {setting.partition("=")[0].strip() for setting in settings}
    is_rank_set = flags.get("lora.rank") is not None or "lora.rank" in named
    own = config.lora
    if not is_rank_set or "lora.alpha" in named or own.start_from or own.variant == "rslora":
        return
    others = tuple(setting for setting in settings if setting.partition("=")[0].strip() != "lora.rank")
    try:
        usual = configuration.load(file, others, {**flags, "lora.rank": None}).lora
    except UserError:  # a file that is wrong without the flag has no scale to compare with
        return
    if own.rank != usual.rank and Ranks.here().first:
        same = usual.alpha * own.rank / usual.rank
        common.note(
            f"lora.rank {own.rank}, and lora.alpha stays {own.alpha:g}: updates are scaled by "
            f"{own.alpha / own.rank:.3g}, not by {usual.alpha / usual.rank:.3g} (--set lora.alpha={same:g} keeps that)"
        )


def _note_reach(
    config: Config, file: str | None, run: Path | None, settings: tuple[str, ...], flags: Mapping[str, Any]
) -> LocalOnly:
    """Say what a configuration file, or the run that goes on, turns on beyond this machine; return for what the hub is
    not asked.

    file: named by the command line; run: the folder of the run that goes on.
    """
    from mlxtune.train import reach
    from mlxtune.train.ranks import Ranks
    from mlxtune.train.run_folder import RunFolder

    local = reach.NOTHING
    if run is None and file is None:
        return local
    first = Ranks.here().first
    named = reach.keys_named(settings, flags)
    if run is not None and file is None:
        file = str(RunFolder(run).config_file)
        local = reach.resumed(config if first else None, file, named)
    if first:
        for line in reach.notes(config, str(file), named, local):
            common.note(line)
    return local


def _print_plan(config: Config, folder: Path | None, force: bool) -> None:
    """What would be done, without reading a weight. force: the run in `folder` would be replaced."""
    from rich.text import Text

    from mlxtune.config.paths import paths_read
    from mlxtune.train import loggers, preparation
    from mlxtune.train.evaluation import suite_of
    from mlxtune.train.preference.words import objective_in_words, of_thumbs, rows_in_words, without_gradients
    from mlxtune.train.run_data import read_data
    from mlxtune.train.run_folder import RunFolder

    if folder is not None:
        run = RunFolder(folder)
        if run.is_marked() and not run.may_begin() and not force:
            common.note(f"{folder} already exists: a run needs another --out, or --force, which replaces it")
        else:
            run.require_free(force, paths_read(config))
    loggers.require(config.train.loggers)
    suite_of(config)
    data, config = read_data(config)
    planned = preparation.plan(config, data)
    train, valid = data.train, data.valid
    out = common.stdout()
    max_tokens = config.data.max_tokens
    notes = train.notes("train", max_tokens) + valid.notes("valid", max_tokens)
    for note in notes + of_thumbs(config.preference, train):
        out.print(f"note: {brief(note)}")
    if config.preference.loss:
        out.print(f"objective: {objective_in_words(config.preference)}")
        out.print(f"rows: {', '.join(rows_in_words(train, valid))}")
    else:
        out.print(f"rows: {train.rows} to train on{train.also}, {valid.rows} held out{valid.also}")
    tokens = int(train.lengths.sum())
    targets = int(train.column("targets").sum())
    out.print(f"tokens per epoch: {tokens:,}, {targets:,} of them trained on ({targets / tokens:.0%})")
    out.print(f"tokens computed per epoch: {_computed(planned.computed, _once(train))}")
    for line in without_gradients(config.preference, planned.computed, planned.plan.passes):
        out.print(line)
    out.print(f"optimizer steps: {planned.plan.steps}")
    if planned.memory:
        for line in planned.memory.lines():
            out.print(line)
    for note in planned.notes:
        out.print(f"note: {brief(note)}")
    out.print()
    out.print(Text(planned.config.to_yaml().rstrip()))


def _once(train: Examples) -> int:
    """Tokens of all conversations, each rendered once; 0 where not all rows are, or an epoch does not take each."""
    expansion = train.expansion
    is_all = expansion.tokens == int(train.lengths.sum())
    return expansion.once if is_all and not train.weights else 0


def _computed(epoch: Epoch, once: int) -> str:
    """What an epoch computes, for people: "284,900, 0.07 of the rows' tokens, 0.59 of each conversation once".

    once: tokens of all conversations, each rendered once; 0: that is not known.
    """
    about = "" if epoch.exact else "about "
    text = f"{about}{epoch.computed:,}, {epoch.computed / epoch.tokens:.2f} of the rows' tokens"
    if once:
        text += f", {epoch.computed / once:.2f} of those of each conversation rendered once"
    if epoch.divided:
        text += f"; {epoch.divided} rows are too long for one micro-batch, and what they begin with counts again"
    return text
