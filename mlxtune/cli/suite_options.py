"""The options of `mlxtune eval` that ask a suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from mlxtune.cli.options import (
    MAX_TOKENS,
    SEED,
    TEMPERATURE,
    TOP_P,
    Need,
    OptionFor,
    is_changed,
    with_options,
)
from mlxtune.errors import UserError

SHORT_FOR_SUITES = ("forgetting", "safety")  # options that ask a suite of their own
WITH_SUITE = Need(
    "suite",
    also=(*SHORT_FOR_SUITES, "benchmark"),
    why="the loss needs no answers",
    hint="Name the prompts: --suite FILE.",
)
WITH_CHANCE = Need("temperature", hint="Add, say, --temperature 0.7.")
OWN_ANSWERS = "-"  # --forgetting without a file
A_FOLDER = click.Path(path_type=Path)


def refuse_idle(answering: Sequence[str], judge: str | None) -> None:
    """Raise UserError for options of this command that were given and do nothing: how answers are made, where all are
    recorded; that prompts may leave this machine, where no server is asked.

    answering, judge: who, as the command line spells them.
    """
    from mlxtune.evaluate.engines.opening import kind_of

    kinds = {kind_of(one) for one in answering}
    if "server" not in kinds and (judge is None or kind_of(judge) != "server") and is_changed("allow_remote"):
        raise UserError("--allow-remote has no effect here: no server is asked", "Leave it out.")
    if kinds != {"replay"}:
        return
    for name in ("max_tokens", "temperature", "top_p", "seed"):
        # --samples, which says how many are taken, needs a temperature beside it.
        if is_changed(name) and not (name == "temperature" and is_changed("samples")):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} has no effect here: all answers are recorded, none is made", "Leave it out.")


def suite_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds them all, in the order in which --help lists them."""
    above_0 = click.FloatRange(0.0, 1.0, min_open=True)
    options = [
        click.option(
            "--suite",
            type=A_FOLDER,
            metavar="FILE",
            help="Prompts with checks, or basics or safety: answers instead of a loss.",
        ),
        click.option(
            "--forgetting",
            is_flag=False,
            flag_value=OWN_ANSWERS,
            metavar="[FILE]",
            help="What tuning unlearned: the suite basics, the drift from the base on its own answers to 64 prompts, "
            "and the rise of the loss on them, or on the texts of FILE.",
        ),
        click.option(
            "--safety",
            is_flag=True,
            help="The suite safety: what is refused and what is answered; with --judge whose answers are less toxic.",
        ),
        click.option(
            "--against",
            metavar="OTHER",
            cls=OptionFor,
            needs=WITH_SUITE,
            help="What takes the place of the base: any of what --model takes. The same model again is an A/A test.",
        ),
        click.option(
            "--against-adapter",
            type=A_FOLDER,
            metavar="RUN",
            cls=OptionFor,
            needs=Need("against", hint="Name the model that it belongs to: --against DIR."),
            help="The adapter of --against.",
        ),
        click.option(
            "--max-tokens",
            type=click.IntRange(min=1),
            default=512,
            show_default=True,
            cls=OptionFor,
            needs=WITH_SUITE,
            help=MAX_TOKENS,
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0.0),
            default=0.0,
            show_default=True,
            cls=OptionFor,
            needs=WITH_SUITE,
            help=TEMPERATURE,
        ),
        click.option(
            "--top-p",
            type=above_0,
            default=1.0,
            show_default=True,
            cls=OptionFor,
            needs=WITH_CHANCE,
            help=TOP_P,
        ),
        click.option(
            "--samples",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            cls=OptionFor,
            needs=WITH_CHANCE,
            help="Answers to each prompt, which are averaged.",
        ),
        click.option(
            "--turns",
            type=click.Choice(["one", "replay"]),
            default="one",
            show_default=True,
            cls=OptionFor,
            needs=Need("suite", also=SHORT_FOR_SUITES, why=WITH_SUITE.why, hint=WITH_SUITE.hint),
            help="replay: every turn of a conversation is answered behind the model's own answers, as MT-Bench does.",
        ),
        click.option(
            "--seed",
            type=int,
            default=0,
            show_default=True,
            cls=OptionFor,
            needs=Need("temperature", hint="Add, say, --temperature 0.7.", also=("limit",)),
            help=SEED,
        ),
        click.option(
            "--out",
            type=A_FOLDER,
            metavar="FOLDER",
            cls=OptionFor,
            needs=WITH_SUITE,
            help="Keep answers and scores here as they come; the same command goes on with what a kill left.",
        ),
        click.option(
            "--html",
            type=A_FOLDER,
            metavar="FILE",
            cls=OptionFor,
            needs=Need("suite", also=(*WITH_SUITE.also, "data", "adapter"), why=WITH_SUITE.why, hint=WITH_SUITE.hint),
            help="Write a page of it, which needs no network: the answers side by side, checks, observations; or how "
            "pairs are ranked.",
        ),
        click.option(
            "--no-answers",
            is_flag=True,
            cls=OptionFor,
            needs=Need("html", why="no page is written", hint="Name the page: --html FILE."),
            help="Leave what the models said out of the page.",
        ),
        click.option(
            "--min-better",
            multiple=True,
            metavar="CHECK=X",
            cls=OptionFor,
            needs=WITH_SUITE,
            help="Exit status 3 unless CHECK is shown to be better, by X (0 to 1) or more.",
        ),
        click.option(
            "--max-worse",
            multiple=True,
            metavar="CHECK=X",
            cls=OptionFor,
            needs=WITH_SUITE,
            help="Exit status 3 where CHECK is worse by more than X.",
        ),
        click.option(
            "--allow-remote",
            is_flag=True,
            cls=OptionFor,
            needs=WITH_SUITE,
            help="Send the prompts to a server on another machine.",
        ),
        click.option(
            "--run-code",
            is_flag=True,
            cls=OptionFor,
            needs=WITH_SUITE,
            help="Run the programs of answers, for the check `code`, in a sandbox.",
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
