"""mlxtune make answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.files import digest

from mlxtune.cli import common, judging
from mlxtune.cli.make import Wanted, dry_run, making, making_options, say
from mlxtune.cli.options import Command, Need, OptionFor, is_given, with_options
from mlxtune.cli.suites import kept_on_stop
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from mlxtune.evaluate.judging.report import Judging
    from mlxtune.make.answers import WantedAnswers
    from mlxtune.make.engine import Opened
    from mlxtune.make.folder import Making
    from mlxtune.make.given_rows import Prompts

SEVERAL = Need("best_of", why="each prompt has one answer", hint="Add, say, --best-of 4.")
ENGINES_OWN = (  # options that do nothing for a person
    *("temperature", "max_tokens", "max_requests", "allow_remote", "dry_run", "best_of", "pairs", "judge", "anyway"),
    *("critique", "words", "seed"),
)


@dataclass(frozen=True)
class Own:
    """The options of this maker alone."""

    # The file of prompts.
    prompts: Path
    # Before prompts that have no system prompt; None for none.
    system: str | None
    # Answers to each prompt; None: one.
    best_of: int | None
    # Who chooses, as it is spelled.
    judge: str | None
    # The judge judges though it fails its exam.
    anyway: bool
    # Pairs are written.
    pairs: bool
    # The file of principles.
    critique: Path | None
    # A person writes the answers.
    by_hand: bool
    # Words of an answer, least and most.
    words: tuple[int, int]
    # Programs of answers are run.
    run_code: bool
    # Without a sandbox.
    unsafe_code: bool


def _own_options(command: Any) -> Any:
    a_file = click.Path(path_type=Path)
    options = [
        click.option(
            "--prompts",
            required=True,
            type=a_file,
            metavar="FILE",
            help="Rows of any format: their last answer is taken for a reference.",
        ),
        click.option("--system", metavar="TEXT", help="The system prompt of rows that have none."),
        click.option(
            "--best-of",
            type=click.IntRange(2, 16),
            metavar="K",
            help="K answers to each prompt, of which the best is kept.",
        ),
        click.option(
            "--judge",
            metavar="J",
            cls=OptionFor,
            needs=SEVERAL,
            help="A model, or a server, that chooses after an exam where checks do not.",
        ),
        click.option(
            "--anyway",
            is_flag=True,
            cls=OptionFor,
            needs=Need("judge", why="nobody judges", hint="Name a judge: --judge MODEL."),
            help="Take the judge's word though it fails its exam.",
        ),
        click.option(
            "--pairs",
            is_flag=True,
            cls=OptionFor,
            needs=SEVERAL,
            help="Write pairs.jsonl too: the best, and one that is shown to be worse.",
        ),
        click.option(
            "--critique",
            type=a_file,
            metavar="FILE",
            help="Principles, one a line: the engine criticises its answers by them, and revises.",
        ),
        click.option("--by-hand", is_flag=True, help="Write the answers yourself, in $EDITOR; no engine is needed."),
        click.option(
            "--words",
            nargs=2,
            type=click.IntRange(min=1),
            default=(1, 1500),
            show_default=True,
            metavar="LEAST MOST",
            help="How many words an answer may have.",
        ),
        click.option(
            "--run-code", is_flag=True, help="Run the programs of answers, for the check `code`, in a sandbox."
        ),
        click.option(
            "--unsafe-code",
            is_flag=True,
            cls=OptionFor,
            needs=Need("run_code", why="no program is run"),
            help="Run them without a sandbox, where there is none.",
        ),
    ]
    return with_options(command, options)


@click.command("answers", cls=Command)
@_own_options
@making_options(count=None, max_tokens=1024, temperature=0.7, what="answers", needs_engine=False)
def answers(**given: Any) -> None:
    """Answers to given prompts, by a stronger model (distillation) or by hand.

    Answers are dropped that refuse, are cut, broken, copied, or in another language, hold placeholders or marks of a
    template, or fail a check of their row. With --best-of the best of K is kept: the one whose program passes its
    tests (`code`), else what most answers come to (`number`, `choice`, `json`), else the judge's choice.

    \b
    mlxtune make answers --prompts questions.jsonl --engine http://127.0.0.1:1234/v1 --out made
    mlxtune make answers --prompts questions.jsonl --engine MODEL --best-of 4 --judge JUDGE --pairs --out made
    mlxtune make answers --prompts questions.jsonl --engine MODEL --critique principles.txt --out made
    mlxtune make answers --prompts questions.jsonl --by-hand --out made
    """
    from mlxtune.evaluate.checks.sandbox.sandbox import Programs
    from mlxtune.make.answers import answer_requests, expected_requests, make_answers
    from mlxtune.make.given_rows import read_prompts_to_answer

    engine_spelled = given.pop("engine")
    wanted = Wanted.of({**given, "engine": engine_spelled or ""})
    own = Own(**{name: given[name] for name in Own.__dataclass_fields__})
    _require_one_who_answers(engine_spelled, own)
    with Programs(own.run_code, own.unsafe_code) as programs:
        prompts = read_prompts_to_answer(own.prompts, programs, own.system or "")
        engine = _a_person() if own.by_hand else _engine(wanted, own.judge)
        _require_a_choice(own, prompts, wanted, engine)
        judge = _judge(own, wanted, engine)
        asked = _asked(own, wanted, prompts, judge)
        if wanted.dry_run:
            first = answer_requests(prompts.rows, asked.samples)
            dry_run(wanted, engine, first, expected_requests(asked))
            return
        for note in prompts.notes:
            common.note(note)
        if judge is not None:
            asked = replace(asked, judge=_admitted(judge, prompts))
        a_making = _by_hand if own.by_hand else making
        with a_making(wanted, engine, _identity(own, wanted, prompts, judge)) as one:
            say(make_answers(one, asked), one.found, wanted.as_json)


def _require_one_who_answers(engine: str | None, own: Own) -> None:
    """Raise UserError unless it is an engine or a person, and for options that do nothing for a person."""
    if not own.by_hand:
        if engine is None:
            raise UserError(
                "nobody answers", "Name who does, --engine MODEL; or write the answers yourself: --by-hand."
            )
        return
    if engine is not None:
        raise UserError("--engine has no effect with --by-hand: a person answers", "Leave out one of the two.")
    for name in ENGINES_OWN:
        if is_given(name):
            raise UserError(
                f"--{name.replace('_', '-')} has no effect with --by-hand: a person answers", "Leave it out."
            )


def _require_a_choice(own: Own, prompts: Prompts, wanted: Wanted, engine: Opened) -> None:
    """Raise UserError where several answers are wanted that are all the same, or of which nothing tells the best."""
    from mlxtune.make.best_of import can_decide

    if own.words[0] > own.words[1]:
        raise UserError(f"--words {own.words[0]} {own.words[1]}: the least is more than the most", "Turn them round.")
    if own.best_of is None:
        return
    if wanted.temperature == 0 and engine.kind != "replay":
        raise UserError(
            f"--best-of {own.best_of} at --temperature 0: all answers to a prompt are the same",
            "Say --temperature 0.7.",
        )
    without = [row.id for row in prompts.rows if not can_decide(row)]
    if own.judge is None and without:
        raise UserError(
            f"{own.prompts}: prompt {without[0]} has no check that could choose, and nobody judges",
            "Add --judge MODEL, or checks to the rows: number, choice, json or code.",
        )


def _judge(own: Own, wanted: Wanted, engine: Opened) -> Judging | None:
    """Who judges, not examined yet."""
    from mlxtune.evaluate.engines.opening import kind_of
    from mlxtune.model.hub import resolve
    from mlxtune.train.identity import of_model

    if own.judge is None:
        return None
    answering = dict(engine.identity)
    if kind_of(wanted.engine) == "model":
        answering["model"] = of_model(resolve(wanted.engine))  # as the judge is compared
    return judging.judging(own.judge, "pairwise", None, own.anyway, wanted.allow_remote, "", [answering])


def _admitted(judge: Judging, prompts: Prompts) -> Judging:
    """The judge after its exam, with a word on that."""
    from mlxtune.make.judged import admitted

    with common.console().status("examining the judge"):
        found = admitted(judge, prompts.rows)
    for note in found.notes:
        common.note(note)
    return found


def _asked(own: Own, wanted: Wanted, prompts: Prompts, judge: Judging | None) -> WantedAnswers:
    """What is wanted of the answers."""
    from mlxtune.make.answers import WantedAnswers
    from mlxtune.make.critique import read_principles

    return WantedAnswers(
        prompts.rows,
        wanted.count,
        samples=own.best_of or 1,
        judge=judge,
        pairs=own.pairs,
        principles=read_principles(own.critique) if own.critique else (),
        least_words=own.words[0],
        most_words=own.words[1],
        by_hand=own.by_hand,
        guard=wanted.guard(),
    )


def _identity(own: Own, wanted: Wanted, prompts: Prompts, judge: Judging | None) -> dict[str, Any]:
    """What decides the making beside its engine; what was left at its default is not said."""
    found: dict[str, Any] = {"prompts": prompts.digest, "words": list(own.words)}
    if own.system:
        found["system"] = own.system
    if own.best_of is not None:
        found |= {"best of": own.best_of, "judge": None if judge is None else judge.identity, "pairs": own.pairs}
    if own.critique is not None:
        found["critique"] = digest(own.critique)
    if own.by_hand:
        found["by hand"] = True
    return wanted.identity("answers", **found)


def _engine(wanted: Wanted, judge: str | None) -> Opened:
    """Who answers. --allow-remote may be for the judge alone."""
    from mlxtune.evaluate.engines.opening import kind_of

    if judge is not None and kind_of(judge) == "server" and kind_of(wanted.engine) != "server":
        wanted = replace(wanted, allow_remote=False)
    return wanted.opened()


def _a_person() -> Opened:
    """Whoever sits at this terminal, as an engine."""
    from mlxtune.make.by_hand import NAME, Person
    from mlxtune.make.engine import Opened

    def edit(text: str) -> str | None:
        return click.edit(text, extension=".md")

    return Opened("", "replay", NAME, {"person": True}, "", True, lambda: Person(edit))


@contextmanager
def _by_hand(wanted: Wanted, engine: Opened, identity: dict[str, Any]) -> Iterator[Making]:
    """As `make.making`, without a line that would be drawn over the editor."""
    from mlxtune.make.folder import Making

    with kept_on_stop(wanted.out), Making(wanted.out, identity, engine, force=wanted.force) as one:
        yield one
