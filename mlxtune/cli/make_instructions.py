"""mlxtune make instructions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from mlxtune.cli import make

LIKELY = 0.5  # share of the tasks that are kept, for an estimate
AT_ONCE = 8  # prompts of a round


class Words(click.ParamType):
    """4..150: a smallest and a largest number of words."""

    name = "words"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,6})\.\.(\d{1,6})", value)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is no range of words, as in 4..150", param, ctx)
        return int(match[1]), int(match[2])


@click.command()
@click.option(
    "--seeds",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Tasks with their answers: Self-Instruct's seed tasks, or any rows for training.",
)
@make.making_options(count=200, max_tokens=1024, temperature=0.7, what="instructions")
@click.option(
    "--words",
    type=Words(),
    default="4..150",
    show_default=True,
    metavar="A..B",
    help="How many words an instruction has.",
)
@click.option("--no-blacklist", is_flag=True, help="Keep those that ask for pictures, files and the like.")
@click.option(
    "--at-once",
    type=click.IntRange(min=1),
    default=AT_ONCE,
    show_default=True,
    metavar="N",
    help="Prompts of a round; what is kept is shown in the rounds after it.",
)
@click.option(
    "--completion",
    is_flag=True,
    help="Let the model go on with a list, as a base model does, though it has a chat template.",
)
def instructions(
    seeds: Path, words: tuple[int, int], no_blacklist: bool, at_once: int, completion: bool, **given: Any
) -> None:
    """Make tasks with examples out of a few that you wrote (Self-Instruct).

    Each round shows an engine eight tasks and asks for more. Kept is what is not too short or long, asks for nothing
    that a text cannot give, and is not near (ROUGE-L above 0.7) to a seed, to what was kept, or to the suite of
    --avoid; then up to five examples of it are asked for. It stops when the engine repeats itself. The same command
    goes on where it was stopped, and with a larger --count where it ended.

    \b
    mlxtune make instructions --seeds seeds.jsonl --engine model --count 20 --out made
    mlxtune make instructions --seeds seeds.jsonl --engine http://127.0.0.1:8080/v1#model --avoid suite.jsonl --out made
    """
    from mlxtune_convert.files import digest

    from mlxtune.make.filters import Limits
    from mlxtune.make.instructions import SelfInstruct
    from mlxtune.make.prompts import ENDS, NEW
    from mlxtune.make.seeds import languages, read_seeds

    wanted = make.Wanted.of(given)
    assert wanted.count is not None
    tasks = read_seeds(seeds)
    guard = wanted.guard()
    engine = wanted.opened(ENDS, completion)
    limits = Limits(*words, not no_blacklist, languages(tasks))
    own = {"words": list(words), "blacklist": not no_blacklist, "at_once": at_once, "completion": not engine.chats}
    identity = wanted.identity("instructions", seeds=digest(seeds), **own)
    with make.making(wanted, engine, identity) as making:
        maker = SelfInstruct(making, tasks, limits, guard, at_once, wanted.seed)
        if wanted.dry_run:
            rounds = -(-wanted.count // max(1, round(LIKELY * NEW * at_once)))
            make.dry_run(wanted, engine, maker.asked_first(), rounds * at_once + 2 * wanted.count)
            return
        document = maker.run(wanted.count)
    make.say(document, making.found, wanted.as_json)
