"""mlxtune make: the options of all makers, and what they say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.files import json_text
from mlxtune_convert.shown import shown, shown_name

from mlxtune.cli import common
from mlxtune.cli.options import MAX_TOKENS, SEED, TEMPERATURE, Group, is_given, with_options
from mlxtune.durations import clock, in_words
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from mlxtune.evaluate.engines.request import Request
    from mlxtune.evaluate.engines.sampling import Sampling
    from mlxtune.make.engine import Opened
    from mlxtune.make.folder import Making
    from mlxtune.make.guard import Guard

SHOWN = 2  # prompts that a dry run prints


@click.group(cls=Group)
def make() -> None:
    """Make rows to train on, with a model on this machine, a server, or recorded answers."""


def making_options(
    count: int | None, max_tokens: int, temperature: float, what: str = "rows", needs_engine: bool = True
) -> Callable[..., Any]:
    """The options that every maker takes. What is given is the defaults; count None: as many as there is to make; what:
    --count counts; needs_engine: it is an error to name none.
    """
    a_folder = click.Path(path_type=Path)
    of_all = "  [default: one for each that is given]" if count is None else ""
    options = [
        click.option(
            "--engine",
            required=needs_engine,
            metavar="E",
            help="Who makes them: a model, http://127.0.0.1:8080/v1#model, or replay:FILE.",
        ),
        click.option(
            "--out",
            required=True,
            type=a_folder,
            metavar="DIR",
            help="Gets train.jsonl, rejected.jsonl, journal.jsonl, card.md.",
        ),
        click.option(
            "--count",
            type=click.IntRange(min=1),
            default=count,
            show_default=count is not None,
            help=f"How many {what} to keep.{of_all}",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help=SEED),
        click.option(
            "--avoid", type=a_folder, metavar="SUITE", help="Keep nothing that is near to a prompt of this suite."
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0.0),
            default=temperature,
            show_default=True,
            help=TEMPERATURE,
        ),
        click.option(
            "--max-tokens",
            type=click.IntRange(min=1),
            default=max_tokens,
            show_default=True,
            help=MAX_TOKENS,
        ),
        click.option("--max-requests", type=click.IntRange(min=1), metavar="N", help="Stop when so many were asked."),
        click.option("--allow-remote", is_flag=True, help="Send the prompts to a server on another machine."),
        click.option("--force", is_flag=True, help="Begin anew where DIR holds another making."),
        click.option("--dry-run", is_flag=True, help="Print two prompts and what to expect; write nothing."),
        common.json_option,
    ]
    return lambda command: with_options(command, options)


@dataclass(frozen=True)
class Wanted:
    """The options that every maker takes, under the names of their parameters: `Wanted.of(given)`."""

    # Who answers, as it is spelled.
    engine: str
    # The folder.
    out: Path
    # How many to keep; None: as many as there is to make.
    count: int | None
    # Of the random choices.
    seed: int
    # A suite that nothing may be near to.
    avoid: Path | None
    # Of the engine.
    temperature: float
    # Of one answer.
    max_tokens: int
    # That may be asked; None for any number.
    max_requests: int | None
    # Prompts may go to another machine.
    allow_remote: bool
    # What is in the folder is thrown away.
    force: bool
    # Nothing is written.
    dry_run: bool
    # The result is one JSON document.
    as_json: bool

    @staticmethod
    def of(given: dict[str, Any]) -> Wanted:
        """given: the keyword arguments of a command; those of all makers are taken out of them."""
        return Wanted(**{name: given.pop(name) for name in Wanted.__dataclass_fields__})

    def sampling(self) -> Sampling:
        from mlxtune.evaluate.engines.sampling import Sampling

        return Sampling(self.max_tokens, self.temperature, seed=self.seed)

    def opened(self, ends: Sequence[str] = (), as_text: bool = False) -> Opened:
        """The engine, which is not read yet. ends, as_text: as `make.engine.opened` takes them. Raises UserError for
        options that do nothing for it.
        """
        from mlxtune.evaluate.engines.opening import kind_of
        from mlxtune.make.engine import opened
        from mlxtune.make.folder import begun_on

        kind = kind_of(self.engine)
        if self.dry_run and self.force:
            raise UserError("--force has no effect with --dry-run: nothing is written", "Leave one of them out.")
        if self.allow_remote and kind != "server":
            raise UserError("--allow-remote has no effect here: no server is asked", "Leave it out.")
        if kind == "replay":
            for name in ("temperature", "max_tokens"):
                if is_given(name):
                    option = f"--{name.replace('_', '-')}"
                    raise UserError(f"{option} has no effect here: the answers are recorded", "Leave it out.")
        day = "" if self.force else begun_on(self.out)
        return opened(self.engine, self.sampling(), self.allow_remote, ends, as_text, day)

    def guard(self) -> Guard:
        from mlxtune.make.guard import Guard

        return Guard.of(self.avoid)

    def identity(self, how: str, **more: Any) -> dict[str, Any]:
        """What decides a making beside its engine, for `Making`. how: the maker's name; more: its own options, and
        digests of what it reads.
        """
        from mlxtune_convert.files import digest

        from mlxtune.evaluate.checks.shipped import suite_file

        avoid = None if self.avoid is None else digest(suite_file(self.avoid))
        return {"how": how, "seed": self.seed, "avoid": avoid, **more}


@contextmanager
def making(wanted: Wanted, engine: Opened, identity: dict[str, Any]) -> Iterator[Making]:
    """A making that shows how far it is, and says on Ctrl-C how to go on; in a dry run one that writes nothing.
    identity: as `Wanted.identity` makes it.
    """
    from mlxtune.cli.suites import kept_on_stop
    from mlxtune.make.folder import Making

    out = None if wanted.dry_run else wanted.out
    with common.console().status("making") as status, kept_on_stop(out):
        shown_so_far = Progress(wanted.count, status.update)
        with Making(out, identity, engine, wanted.max_requests, wanted.force, shown_so_far) as one:
            yield one


class Progress:
    """One line on how far a making is, with its rate and the time left."""

    def __init__(self, count: int | None, say: Callable[[str], None]) -> None:
        self._count, self._say = count, say
        self._began = time.monotonic()
        self._kept_before: int | None = None  # by the time of this process's first answers

    def __call__(self, making: Making) -> None:
        seconds = time.monotonic() - self._began
        self._say(self.line(making.requests, making.requests - making.found, making.kept, seconds))

    def line(self, requests: int, new: int, kept: int, seconds: float) -> str:
        """requests: so far; new: of them, those of this process; kept: so far; seconds: since this process began."""
        if self._kept_before is None:
            self._kept_before = kept
        got = kept - self._kept_before
        of = "" if self._count is None else f" of {self._count}"
        text = f"{kept}{of} kept, {requests} requests, {60 * new / max(seconds, 1e-3):.0f} a minute"
        if self._count is not None and got > 0:
            text += f", {clock(seconds * max(0, self._count - kept) / got)} left"
        return text


def dry_run(wanted: Wanted, engine: Opened, first: Sequence[Request], requests: int) -> None:
    """Print two prompts, and what to expect. first: the first requests; requests: how many in all, about."""
    from mlxtune.make.estimate import estimate

    with common.console().status("measuring"):
        found = estimate(engine, first, requests, wanted.max_tokens)
    if wanted.as_json:
        prompts = [{"id": request.id, "messages": list(request.messages)} for request in first[:SHOWN]]
        click.echo(json_text({"prompts": prompts, **asdict(found)}))
        return
    for request in first[:SHOWN]:
        click.echo(f"--- prompt {shown_name(request.id)}")
        for message in request.messages:
            click.echo(f"{shown_name(message['role'])}:")
            click.echo(shown(str(message.get("content") or "")))
    click.echo("---")
    about = f"about {found.requests:,} requests, {found.tokens:,} tokens of answers"
    if found.seconds is None:
        click.echo(f"{about} at most; nothing was asked, so the time is not known")
    else:
        click.echo(f"{about}, {in_words(found.seconds)} (measured: {found.measured} answers)")
    if wanted.max_requests is not None and wanted.max_requests < requests:
        click.echo(f"--max-requests {wanted.max_requests} is likely to end it before --count is reached")


def say(document: dict[str, Any], found: int, as_json: bool) -> None:
    """Say what came of a making. document: as `Making.finish` returns it; found: answers that were there already."""
    if found:
        common.note(f"{document['out']}: {found} answers were there already, and are used")
    for note in document["notes"]:
        common.note(note)
    if as_json:
        click.echo(json_text(document))
        return
    out = common.stdout()
    common.say(out, yield_line(document))
    if document["stopped"]:
        common.say(out, f"stopped: {document['stopped']}")
    out.print(f"{document['out']}: {document['rows']:,} rows in train.jsonl", soft_wrap=True)


def yield_line(document: dict[str, Any]) -> str:
    """120 requests (2 failed): 31 too short, 12 near duplicate; 100 of 100 instructions kept"""
    failed = f" ({document['failed']:,} failed)" if document["failed"] else ""
    rejected = sorted(document["rejected"].items(), key=lambda one: (-one[1], one[0]))
    left = ", ".join(f"{count:,} {code}" for code, count in rejected) or "none rejected"
    kept = f"{document['kept']:,} of {document['wanted']:,} {document['what']} kept"
    return f"{document['requests']:,} requests{failed}: {left}; {kept}"
