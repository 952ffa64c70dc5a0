"""mlxtune init."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.shown import shown_name
from mlxtune_convert.sizes import size

from mlxtune.api.exporting import FORMS
from mlxtune.cli import asking, common
from mlxtune.cli.options import Command, Need, OptionFor, is_given
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from mlxtune.machine.backend import Machine
    from mlxtune.project.creation import Made, Wish
    from mlxtune.project.models import Local
    from mlxtune.project.picked import Picked
    from mlxtune.project.rows import Given

GOALS = ("format", "style", "chat", "code", "documents")  # as `presets.wanted` explains them
USUAL_GOAL = "chat"
ROOM = 0.35  # of what the device holds at once: a model with more weights than that is not proposed
LARGEST_PROPOSED = 9e9  # parameters of a model that is to be fetched
NAMED = 3  # findings that are told here; `mlxtune data check` lists all


@click.command(cls=Command)
@click.argument("folder", metavar="[DIR]", default=Path(), type=click.Path(path_type=Path))
@click.option("--goal", type=click.Choice(GOALS), help="What the model shall learn.")
@click.option("--data", metavar="PATH", help="Rows in any format: file, folder, hub dataset id. They stay as they are.")
@click.option("--model", metavar="MODEL", help="MLX or 16-bit HF folder, GGUF file, or hub id.")
@click.option(
    "--memory",
    type=click.FloatRange(min=4),
    metavar="GIB",
    help="Memory of the Mac that will train: 16 for one that is sold with 16 GB.  [default: what this machine has]",
)
@click.option(
    "--to",
    "exports",
    multiple=True,
    default=("peft",),
    show_default=True,
    type=click.Choice(FORMS),
    help="What mlxtune export shall make; may be given several times.",
)
@common.settings_option
@click.option("--yes", is_flag=True, help="Ask nothing: what no option says is chosen, and told.")
@click.option("--show-presets", is_flag=True, help="Only print the settings that fit Macs of 8 to 512 GB.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    cls=OptionFor,
    needs=Need("show_presets", why="files are written"),
    help="One JSON document of --show-presets.",
)
def init(
    folder: Path,
    goal: str | None,
    data: str | None,
    model: str | None,
    memory: float | None,
    exports: tuple[str, ...],
    settings: tuple[str, ...],
    yes: bool,
    show_presets: bool,
    as_json: bool,
) -> None:
    """Begin a project: rows, model and settings for this machine, in a folder where commands need no more options.

    DIR (default: the folder you are in) gets mlxtune.yaml, data with rows to train, to validate and to test on, a suite
    of test prompts with checks, and a README with the next commands. Settings are the fastest whose predicted memory
    fits. Nothing is overwritten, and Ctrl-C leaves nothing. On a terminal what no option says is asked.

    Afterwards train, eval, report, export, chat and data check take from mlxtune.yaml what they are not told, where
    they run in that very folder.

    \b
    mlxtune init
    mlxtune init support --goal format --data rows.jsonl --model model --yes
    mlxtune init --show-presets
    """
    if show_presets:
        _refuse_idle()
        _show_presets(as_json)
        return
    from mlxtune.config import resolve
    from mlxtune.machine import backend
    from mlxtune.project import creation
    from mlxtune.project.folder import new_project, require_free

    require_free(folder)
    own = resolve.load(None, settings)
    _refuse_preferences(settings, data)
    backend.prepare()
    is_asked = asking.can_ask() and not yes
    console = common.console()
    machine = backend.here() if memory is None else backend.mac(int(memory * backend.GIB))
    _tell_machine(console, machine, is_here=memory is None)
    goal = goal or (_ask_goal() if is_asked else _told("--goal", USUAL_GOAL))
    given = _given(data, own.data.columns, is_asked)
    console.print(f"{given.source.path}: {given.told()}")
    picked = _picked(model, machine, is_asked)
    kept = tuple(one for one in settings if not one.strip().startswith("data.columns"))
    wish = creation.Wish(goal, given, picked, machine, tuple(dict.fromkeys(exports)), kept)  # type: ignore[arg-type]
    with new_project(folder) as work:
        made = _made(wish, work, is_asked)
        _tell(console, made)
        if is_asked:
            asking.asked(f"Write this to {folder.absolute()}?", [("yes", ""), ("no", "")], "yes", _agreed)
    common.stdout().print(f"{folder / 'mlxtune.yaml'}: {_summary(made)}")
    _tell_next(console, folder, made)


def _refuse_idle() -> None:
    """Raise UserError for an option beside --show-presets, which needs none."""
    for option in click.get_current_context().command.params:
        if option.name not in ("show_presets", "as_json") and is_given(str(option.name)):
            name = option.opts[0] if isinstance(option, click.Option) else "DIR"
            raise UserError(f"{name} has no effect with --show-presets", "It prints the same for everyone.")


def _refuse_preferences(settings: tuple[str, ...], data: str | None) -> None:
    """Raise UserError for a key of preference tuning: a project's rows are those of supervised tuning."""
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if key.partition(".")[0] == "preference":
            rows = data or "ROWS"
            raise UserError(
                f"--set {key}: init makes projects of supervised tuning, which comes first; no preferences are learned",
                "Leave it out. Afterwards, in the project: mlxtune train -c dpo (pairs) or -c kto (rated answers) "
                f"--model MODEL --data {rows} --set lora.start_from=RUN --out OUT (docs/preference.md).",
            )


def _show_presets(as_json: bool) -> None:
    from mlxtune_convert.files import json_text

    from mlxtune.machine import backend
    from mlxtune.presets import table

    backend.prepare()
    with common.console().status("searching"):
        cells = table.table()
    if as_json:
        click.echo(json_text(table.document(cells)))
    else:
        table.draw(common.stdout(), cells)


def _tell_machine(console: Console, machine: Machine, is_here: bool) -> None:
    """What will train, in one line; and what could be in its way."""
    from mlxtune.machine import backend, surroundings

    # Macs are sold by powers of 1024, and sizes are told in those of 1000.
    where = backend.chip() if is_here else f"--memory {machine.memory / backend.GIB:g}, in GiB: a Mac"
    console.print(f"{where}: {size(machine.memory)} of memory, {size(machine.working_set)} for models ({machine.kind})")
    if not is_here:
        return
    for line in surroundings.warnings(Path.cwd()):
        common.note(line)
    if held := surroundings.holders():
        common.note(f"other programs hold models in memory now ({surroundings.listed(held)}): unload them to train")


def _told(option: str, value: str) -> str:
    """A value that nobody named, said."""
    common.note(f"{option} {value}: not given, so chosen")
    return value


def _ask_goal() -> str:
    from mlxtune.presets.wanted import GOALS as meanings

    listed = [(str(goal), meaning) for goal, meaning in meanings.items()]

    def read(said: str) -> str:
        if said in GOALS:
            return said
        raise UserError(f"{said} is none of them", f"A number, or one of {', '.join(GOALS)}.")

    return asking.asked("What shall the model learn?", listed, USUAL_GOAL, read)


def _given(data: str | None, columns: dict[str, str], is_asked: bool) -> Given:
    """The rows. Raises UserError where there are none."""
    from mlxtune.config.schema import SourceSection
    from mlxtune.project import rows

    def look(path: str) -> Given:
        with common.console().status(f"reading {path}"):
            return rows.look(SourceSection(path=path, columns=columns))

    if data is not None:
        return look(data)
    here = _data_here()
    if is_asked:
        question = "Where are the rows? A file, a folder, owner/name on the hub; or none, where there are none yet"
        return asking.asked(question, [(path, "") for path in here], here[0] if here else "", _or_make(look))
    if len(here) == 1:
        return look(_told("--data", here[0]))
    what = f"there are several: {', '.join(here[:5])}" if here else "no file of rows is here"
    raise UserError(f"no rows given, and {what}", _make_some() if not here else "Name one: --data PATH.")


def _or_make(look: Any) -> Any:
    """Reads an answer; says how to make rows to one who has none, and ends."""

    def read(said: str) -> Given:
        if said.lower() == "none":
            common.console().print(_make_some())
            raise click.Abort
        found: Given = look(said)
        return found

    return read


def _make_some() -> str:
    return (
        "Make some: mlxtune make instructions (of a few examples that you write), make from-documents, make answers; "
        "then mlxtune init --data MADE/train.jsonl"
    )


def _data_here() -> list[str]:
    """Files of rows in the folder where the command runs, and folders with a train file; by name."""
    from mlxtune.data.rows.readers import kind_of

    found = []
    for path in sorted(Path().iterdir()):
        if path.name.startswith("."):
            continue
        is_folder = path.is_dir() and any(one.name.startswith("train") and kind_of(one) for one in path.iterdir())
        if is_folder or (path.is_file() and kind_of(path) and path.stat().st_size):
            found.append(str(path))
    return found


def _picked(model: str | None, machine: Machine, is_asked: bool) -> Picked:
    """The model. On a terminal those that are here are listed first, then those that could be fetched."""
    from mlxtune.project.models import local_models
    from mlxtune.project.picked import pick

    if model is not None:
        return pick(model)
    local = local_models()
    default = _proposed(local, machine)
    if not is_asked:
        return pick(_told("--model", default))
    return asking.asked("Which model? A number, a folder, a GGUF file, or owner/name", _listed(local), default, pick)


def _listed(local: list[Local]) -> list[tuple[str, str]]:
    """(What to type, what is said of it) of each model."""
    from mlxtune.presets import models

    found = []
    for one in local:
        name = "" if one.called == one.named else f"{one.called}, "
        found.append((one.named, f"{name}{one.kind}, {size(one.bytes)}, in {one.of}"))
    here = {one.named for one in local}
    for known in models.KNOWN:
        name = known.four_bit or known.hub
        if name not in here:
            terms = ", its terms are accepted on the hub first" if known.gated else ""
            found.append((name, f"{known.size}, {size(known.download)} to fetch, {known.licence}{terms}"))
    return found


def _proposed(local: list[Local], machine: Machine) -> str:
    """The largest model here whose weights leave room to train; else the largest known one."""
    from mlxtune.presets import models

    room = ROOM * machine.working_set
    fit = [one for one in local if one.bytes <= room and not one.is_gguf]
    if fit:
        return fit[-1].named
    smallest = models.KNOWN[0]
    known = [one for one in models.KNOWN if one.weights(4) <= room and one.parameters <= LARGEST_PROPOSED]
    best = next((one for one in reversed(known) if not one.gated), smallest)
    return best.four_bit or best.hub


def _made(wish: Wish, work: Path, is_asked: bool) -> Made:
    """Write the project into its temporary folder; ask for another model where this one does not fit or open."""
    from mlxtune.project import creation
    from mlxtune.project.picked import pick

    def write(wish: Wish) -> Made:
        for left in work.iterdir():  # of a model that did not fit
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        with common.console().status("looking at the rows, and for settings that fit"):
            return creation.write(wish, work)

    if not is_asked:
        return write(wish)
    try:
        return write(wish)
    except creation.Unfit as error:
        common.note(error.message)
    return asking.asked("Another model, then?", [], "", lambda said: write(replace(wish, model=pick(said))))


def _tell(console: Console, made: Made) -> None:
    """What was found out on the way."""
    # That rows are few is among the notes on the settings, which are for so few.
    worst = [one for one in made.findings if one["severity"] in ("error", "warning") and one["code"] != "few"]
    for finding in worst[:NAMED]:
        common.note(f"{finding['split']}: {finding['count']:,} {finding['what']}; {finding['fix']}")
    if len(worst) > NAMED:
        common.note(f"{len(worst) - NAMED} more findings: mlxtune data check lists all")
    for text in (*made.notes, *made.chosen.notes):
        common.note(text)
    settings = ", ".join(f"{key}={value}" for key, value in made.chosen.settings.items())
    console.print(f"settings: {settings}")


def _agreed(said: str) -> None:
    """Raises click.Abort for a no."""
    if said.lower() in ("n", "no"):
        raise click.Abort
    if said.lower() not in ("y", "yes"):
        raise UserError(f"{said} is neither yes nor no", "yes or no.")


def _summary(made: Made) -> str:
    counts = ", ".join(f"{count:,} {split}" for split, count in made.chosen.rows.items())
    suite = f", a suite of {made.chosen.prompts} prompts" if made.chosen.prompts else ""
    return f"{counts} rows{suite}, README.md"


def _tell_next(console: Console, folder: Path, made: Made) -> None:
    """The next commands, on a terminal."""
    from mlxtune.project.texts import commands

    if not sys.stderr.isatty():
        return
    found = [command for command, _ in commands(made.chosen)]
    if folder != Path():
        found.insert(0, f"cd {shlex.quote(str(folder))}")
    for number, command in enumerate(found):
        begin = "next: " if number == 0 else "      "
        console.print(shown_name(f"{begin}{command}"), style="dim", soft_wrap=True, markup=False, highlight=False)
