"""mlxtune make refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from mlxtune_convert.files import digest

from mlxtune.cli import common
from mlxtune.cli.make import Wanted, dry_run, making, making_options, say
from mlxtune.cli.options import Command, Need, OptionFor
from mlxtune.errors import UserError

SHARE = 0.05  # refusals of the rows of a set; with more, models begin to refuse what they should answer


@click.command("refusals", cls=Command)
@click.argument("policy", type=click.Path(path_type=Path), metavar="POLICY.yaml")
@click.option(
    "--beside", metavar="DATA", help="The training rows beside which they will stand: a folder, a file, a hub id."
)
@click.option(
    "--share",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    default=SHARE,
    show_default=True,
    cls=OptionFor,
    needs=Need("beside", why="a share of what is not known", hint="Name the rows: --beside DATA."),
    help="Refusals at most, as a share of the rows of DATA.",
)
@making_options(count=None, max_tokens=512, temperature=0.8, what="refusals")
def refusals(policy: Path, beside: str | None, share: float, **given: Any) -> None:
    """Refusals in a persona's voice, each with a harmless neighbour that is answered.

    POLICY.yaml says who refuses what: `persona: TEXT`, `forbidden: [{subject: TEXT, instead: TEXT, examples: [TEXT]}]`,
    and `system: TEXT` where rows have a system prompt. --count is of refusals; each gives two rows. Their number is
    capped at 5% of the rows of --beside DATA, unless --share says otherwise.

    \b
    mlxtune make refusals policy.yaml --engine MODEL --beside data --out made
    mlxtune make refusals policy.yaml --engine MODEL --count 20 --out made
    """
    from mlxtune.make.policy import read_policy
    from mlxtune.make.refusals import expected_requests, first_requests, make_refusals

    wanted = Wanted.of(given)
    said = read_policy(policy)
    count = _count(wanted.count, beside, share)
    engine = wanted.opened()
    if not engine.chats:
        raise UserError(
            f"--engine {wanted.engine} has no chat template: a base model cannot play a persona", "Name a chat model."
        )
    guard = wanted.guard()
    if wanted.dry_run:
        dry_run(wanted, engine, first_requests(said), expected_requests(said, count))
        return
    with making(wanted, engine, wanted.identity("refusals", policy=digest(policy))) as one:
        say(make_refusals(one, said, count, guard), one.found, wanted.as_json)


def _count(count: int | None, beside: str | None, share: float) -> int:
    """How many refusals to make. Raises UserError where nothing says so, or the set is too small for one."""
    if beside is None:
        if count is None:
            raise UserError(
                "how many refusals?", f"Name the set, --beside DATA, for {SHARE:.0%} of its rows; or say --count N."
            )
        common.note(f"not capped: with --beside DATA they are held to {SHARE:.0%} of its rows")
        return count
    rows = _rows_of(beside)
    most = int(rows * share)
    if most == 0:
        raise UserError(
            f"{share:.0%} of the {rows} rows of {beside} is not one refusal", "Raise --share, or leave out --beside."
        )
    if count is not None and count > most:
        common.note(f"--count {count} is capped at {most}: {share:.0%} of the {rows} rows of {beside}; see --share")
    return most if count is None else min(count, most)


def _rows_of(source: str) -> int:
    """How many rows training would read of a source."""
    from mlxtune.config import resolve as configuration
    from mlxtune.data.dataset import sources
    from mlxtune.data.rows.formats import count_rows

    section = configuration.load(None, (), {"data.path": source}).data
    (given,) = section.mixture()
    found = sources.files_by_split(given)
    if "train" not in found:
        raise UserError(f"{source} has no train file", f"It has: {', '.join(found)}.")
    return sum(count_rows(one.read()) for one in found["train"])
