"""mlxtune make from-template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.shown import shown

from mlxtune.cli import common
from mlxtune.cli.make import SHOWN, Wanted, dry_run, making, making_options, say
from mlxtune.cli.options import Command, is_given
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from mlxtune.make.engine import Opened
    from mlxtune.make.from_template.description import Description
    from mlxtune.make.from_template.maker import Draft

HOW = "from-template"
OF_THE_ENGINE = ("temperature", "max_tokens", "max_requests", "allow_remote")  # options that do nothing without one


@click.command(HOW, cls=Command)
@click.argument("file", type=click.Path(path_type=Path), metavar="T.yaml")
@making_options(count=100, max_tokens=512, temperature=0.7, needs_engine=False)
def from_template(file: Path, **given: Any) -> None:
    """Fill the slots of templates, each combination at most once.

    T.yaml has a list `templates`, each with `user`, and `system`, `assistant` and `share` where they are wanted; and
    `slots`: a list of values each, a file of them, or {engine: what to name, count: 200}. {name} in a text stands for a
    slot's value, {name.column} for a column of one that is a row. Without `assistant` the engine answers.

    \b
    mlxtune make from-template capitals.yaml --count 100 --out made
    mlxtune make from-template explain.yaml --engine model --count 500 --out made
    """
    from mlxtune_convert.files import digest

    from mlxtune.make.from_template import description as reading
    from mlxtune.make.from_template.maker import FromTemplate, expected, wanted_of_each

    spelled = given.pop("engine")
    wanted = Wanted.of({**given, "engine": spelled or ""})
    described = reading.read(file)
    _require_use(described, spelled)
    for note in described.notes:
        common.note(note)
    engine = wanted.opened() if spelled else _nobody()
    guard = wanted.guard()
    assert wanted.count is not None
    wanted_of_each(described.templates, expected(described), wanted.count)
    if wanted.dry_run:
        _dry_run(described, wanted, engine)
        return
    # How many rows are wanted decides what each template gives: another number is another making.
    identity = wanted.identity(HOW, templates=digest(file), values=_digest(described), count=wanted.count)
    with making(wanted, engine, identity) as one:
        maker = FromTemplate(one, described, guard, wanted.count, wanted.seed)
        document = one.finish(*maker.run())
        document["notes"] += maker.notes()
        say(document, one.found, wanted.as_json)


def _digest(described: Description) -> str:
    """Of the values, which may come from files."""
    import hashlib
    import json

    return hashlib.sha256(json.dumps(described.given, sort_keys=True).encode()).hexdigest()


def _require_use(described: Description, spelled: str | None) -> None:
    """Raise UserError for an engine that is missing, and for one, or options of one, that would do nothing."""
    if described.needs_engine:
        if spelled is None:
            raise UserError(
                "nobody answers: a template has no `assistant`, or a slot is to be named by an engine",
                "Name who does, --engine MODEL; or write `assistant` and lists.",
            )
        return
    if spelled is not None:
        raise UserError("--engine has no effect here: every template has its answer", "Leave it out.")
    for name in OF_THE_ENGINE:
        if is_given(name):
            raise UserError(f"--{name.replace('_', '-')} has no effect without --engine", "Leave it out.")


def _nobody() -> Opened:
    """In place of an engine where none is asked."""
    from mlxtune.make.engine import Opened

    def nobody() -> Any:
        raise RuntimeError("every template has its answer, and yet an engine is asked")

    return Opened("", "replay", "templates alone", {"engine": None}, "no engine was asked", True, nobody)


def _dry_run(described: Description, wanted: Wanted, engine: Opened) -> None:
    """Two prompts, or rows where no engine is asked, and what to expect."""
    from mlxtune.evaluate.engines.request import Request
    from mlxtune.make.from_template import naming
    from mlxtune.make.from_template.maker import wanted_of_each

    assert wanted.count is not None
    if named := described.named:
        lists = sum(-(-slot.count // naming.AT_ONCE) for slot in named.values())
        first = [naming.request(name, slot, [], 0) for name, slot in named.items()]
        answered = wanted.count if any(template.needs_engine for template in described.templates) else 0
        dry_run(wanted, engine, first, lists + answered)
        return
    counts = wanted_of_each(described.templates, described.given, wanted.count)
    shown_drafts = _first_drafts(described, wanted.seed)
    asked = [
        (draft, count)
        for draft, count, template in zip(shown_drafts, counts, described.templates, strict=True)
        if template.needs_engine
    ]
    if asked:
        requests = [Request(draft.id, draft.messages) for draft, _ in asked]
        dry_run(wanted, engine, requests, sum(count for _, count in asked))
        return
    for draft in shown_drafts[:SHOWN]:
        click.echo(f"--- row {draft.id}")
        for message in draft.messages:
            click.echo(f"{message['role']}:")
            click.echo(shown(message["content"]))
    click.echo(f"{wanted.count:,} rows; no engine is asked")


def _first_drafts(described: Description, seed: int) -> list[Draft]:
    """One of each template."""
    from mlxtune.make.from_template.maker import drafts

    found = []
    for number, template in enumerate(described.templates):
        found.append(next(drafts(template, number, described.given, seed)))
    return found
