"""mlxtune make turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlxtune.cli.make import Wanted, dry_run, making, making_options, say
from mlxtune.errors import UserError


@click.command("turns")
@click.option(
    "--from",
    "source",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Conversations, in rows of any format.",
)
@click.option(
    "--turns", type=click.IntRange(2, 20), default=3, show_default=True, help="How often the user speaks in each."
)
@making_options(count=None, max_tokens=512, temperature=0.7, what="conversations")
def turns(source: Path, turns: int, **given: Any) -> None:
    """Conversations of several turns out of single ones.

    The engine plays the user: what would they say next? Then it answers, behind the very conversation that the answer
    will stand in. A conversation in which a turn is no good is rejected.

    \b
    mlxtune make turns --from train.jsonl --engine MODEL --turns 3 --out made
    """
    from mlxtune.make.given_rows import read_conversations
    from mlxtune.make.turns import expected_requests, first_requests, make_turns

    wanted = Wanted.of(given)
    conversations, digest = read_conversations(source)
    engine = wanted.opened()
    if not engine.chats:
        raise UserError(
            f"--engine {wanted.engine} has no chat template: a base model cannot play a user", "Name a chat model."
        )
    guard = wanted.guard()
    if wanted.dry_run:
        requests = expected_requests(conversations, turns, wanted.count)
        dry_run(wanted, engine, first_requests(conversations, turns), requests)
        return
    with making(wanted, engine, wanted.identity("turns", rows=digest, turns=turns)) as one:
        say(make_turns(one, conversations, turns, guard, wanted.count), one.found, wanted.as_json)
