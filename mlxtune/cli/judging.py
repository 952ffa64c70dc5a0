"""mlxtune eval --judge: who judges, and how what it says is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.api import tuned
from mlxtune.cli import common
from mlxtune.cli.options import Need, OptionFor, with_options
from mlxtune.cli.suite_options import SHORT_FOR_SUITES
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from mlxtune.evaluate.judging.judge import Judge
    from mlxtune.evaluate.judging.report import Judging, Rate

RATES = ("pairwise", "likert")  # judging.report.Rate
WITH_SUITE = Need("suite", also=SHORT_FOR_SUITES, why="the loss needs no judge", hint="Name the prompts: --suite FILE.")
WITH_JUDGE = Need("judge", why="nobody judges", hint="Name a judge: --judge MODEL.")
OWN = "the judge is one of the judged models: judges prefer answers like their own"
LONGEST_RUBRIC = 20_000  # characters: more would leave small models no room for the answers


def judge_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds those of `mlxtune eval` that have to do with a judge."""
    rubric_file = click.Path(path_type=Path)
    options = [
        click.option(
            "--judge",
            metavar="JUDGE",
            cls=OptionFor,
            needs=WITH_SUITE,
            help="Compare the answers by a model (a folder, a hub id) or a server of this machine, after an exam.",
        ),
        click.option(
            "--rate",
            type=click.Choice(RATES),
            default=RATES[0],
            show_default=True,
            cls=OptionFor,
            needs=WITH_JUDGE,
            help="Which of two answers is better, or 1 to 5 for each by four criteria.",
        ),
        click.option(
            "--rubric",
            type=rubric_file,
            metavar="FILE",
            cls=OptionFor,
            needs=WITH_JUDGE,
            help="A text: what the judge is told to be good.  [default: the suite's]",
        ),
        click.option(
            "--anyway",
            is_flag=True,
            cls=OptionFor,
            needs=WITH_JUDGE,
            help="Verdicts even of a judge that fails its exam.",
        ),
    ]
    return with_options(command, options)


def judging(
    judge: str | None,
    rate: Rate,
    rubric: Path | None,
    anyway: bool,
    allow_remote: bool,
    of_suite: str,
    judged: Sequence[Mapping[str, Any]],
) -> Judging | None:
    """What is wanted of a judge, by the options; None where there is none. What is wrong with them is said now, before
    anything is answered.

    of_suite: the suite's rubric, "" for none; judged: what of each side decides its answers (`Answering.identity`).
    """
    if judge is None:
        return None
    from mlxtune.data.template.tokenizer import require_folder
    from mlxtune.evaluate.engines.opening import kind_of
    from mlxtune.evaluate.engines.server import is_same_server
    from mlxtune.evaluate.judging.judge import RUBRIC
    from mlxtune.evaluate.judging.report import Judging
    from mlxtune.evaluate.judging.served import ServedJudge
    from mlxtune.model.hub import resolve
    from mlxtune.train.identity import of_answering, of_model

    told = of_suite or RUBRIC
    if rubric is not None:
        told = _read_rubric(rubric)
    kind = kind_of(judge)
    if kind == "replay":
        raise UserError(f"--judge {judge}: recorded answers cannot judge", "Name a model's folder, or a server.")
    if kind == "server":
        server = ServedJudge(judge, allow_remote)
        own = any(is_same_server(server.name, one["server"]) for one in judged if "server" in one)
        return Judging(lambda: server, rate, told, anyway, (OWN,) if own else (), server.name)
    folder = resolve(judge)
    require_folder(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"--judge {judge}: no model is there", "Name a model's folder, a hub id, or a server.")
    content = of_model(folder)
    own = any(one.get("model") == content for one in judged)  # a copy elsewhere is the same model
    return Judging(_opener(judge), rate, told, anyway, (OWN,) if own else (), of_answering(folder))


def refuse_ratings_of_toxicity(rate: str) -> None:
    """Raise UserError for ratings that say nothing of it, before any judge is asked."""
    if rate == "likert":
        raise UserError(
            "--rate likert rates helpfulness and accuracy; of the suite safety a judge says which answer is less toxic",
            "Leave out --rate.",
        )


def of_toxicity(judged: Judging, rubric: Path | None) -> Judging:
    """What is wanted of the judge of the suite `safety`: which answer is less toxic, with an exam on that. rubric: the
    user's file; None: the shipped rubric.
    """
    from dataclasses import replace

    from mlxtune.evaluate.safety import toxicity

    told = toxicity.RUBRIC if rubric is None else judged.rubric
    return replace(judged, rubric=told, exam=toxicity.exam(), notes=(toxicity.NOTE, *judged.notes))


def _opener(model: str) -> Callable[[], Judge]:
    """What reads the model, once the answers are there."""

    def opened() -> Judge:
        from mlxtune.evaluate.judging.local import LocalJudge

        return LocalJudge(tuned.load_model(model, None))

    return opened


def _read_rubric(file: Path) -> str:
    """Raises UserError for what is no text, an empty one, or one that leaves no room."""
    from mlxtune.data.rows.readers import whole_text

    text = whole_text(file, "--rubric").strip()
    if not text:
        raise UserError(f"--rubric {file} is empty", "Write what makes an answer good, in a few sentences.")
    if len(text) > LONGEST_RUBRIC:
        raise UserError(f"--rubric {file} has {len(text):,} characters; {LONGEST_RUBRIC:,} are allowed", "Shorten it.")
    return text


def draw(out: Console, judge: Mapping[str, Any]) -> None:
    """Print the part "judge" of an evaluation's document."""
    common.say(out, f"Judge: {judge['judge']}")
    if judge.get("criteria"):
        from mlxtune.cli import comparison_table

        out.print(comparison_table.table_of(judge["criteria"], ("base", "tuned")))
    if "win_rate" in judge:
        _draw_pairwise(out, judge)
    for note in judge["notes"]:
        common.note(str(note))


def _draw_pairwise(out: Console, judge: Mapping[str, Any]) -> None:
    low, high = judge["interval"]
    counts = f"{judge['wins']} wins, {judge['ties']} ties, {judge['losses']} losses of the tuned answers"
    lines = [
        f"  {counts} in {judge['pairs']} pairs: {judge['verdict']} ({judge['test']}, p {judge['p']:.4f})",
        f"  win rate {judge['win_rate']:.1%} (95% interval {low:.1%} to {high:.1%})",
    ]
    length = judge["length"]
    if length["equal_length"] is not None:
        lines.append(f"  at equal length {length['equal_length']:.1%}")
    if length["close"] is not None:
        lines.append(f"  of the {length['close_pairs']} pairs of like length {length['close']:.1%}")
    if judge["consistency"] is not None:
        first = "none" if judge["first_position"] is None else f"{judge['first_position']:.0%}"
        lines.append(
            f"  the same in both orders {judge['consistency']:.0%}; for what is shown first {first} of the decisions"
        )
    for line in lines:
        common.say(out, line)
