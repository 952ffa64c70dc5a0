"""One making: what it asks, what it keeps, and the folder where both go.

A folder holds

    making.json       what decides the making (its identity), and which requests were answered together: the mark that
                      the folder is ours
    journal.jsonl     an answer a line, as it came from the engine; `replay:DIR/journal.jsonl` is an engine again
    train.jsonl       what was kept: {"messages": [...], "made": {"how", "engine", "parents", "scores"}}
    rejected.jsonl    what was not: whatever it was, "reason" (a code of `reasons.REASONS`) and "detail"
    card.md           what made it, the licences, and what to look at before it is published
    pairs.jsonl       of `make answers --pairs`: {"prompt", "chosen", "rejected"}, messages in each, and "made"
    judge.jsonl       what a judge replied, as it came

All but the first two follow from them: a maker is a function from answers to rows that asks for more answers. So one
that was killed is simply run again. It asks the same things in the same order, is given what the journal has, and goes
on behind that:

    killed      ask a, b -> answers on the disk     ask c, d -> killed
    again       ask a, b -> from the journal        ask c, d -> the engine
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from mlxtune_convert.files import contents, explained, json_text, new_file, read_json

import mlxtune
from mlxtune.errors import UserError
from mlxtune.evaluate.engines.journal import Files, Journal, locked
from mlxtune.evaluate.engines.request import Answer, Engine, Request
from mlxtune.evaluate.engines.room import give_back
from mlxtune.make.card import card
from mlxtune.make.engine import Opened
from mlxtune.make.guard import Guard
from mlxtune.make.reasons import REASONS

MARK, JOURNAL, TRAIN, REJECTED, CARD = "making.json", "journal.jsonl", "train.jsonl", "rejected.jsonl", "card.md"
PAIRS, VERDICTS = "pairs.jsonl", "judge.jsonl"
FILES = Files(MARK, JOURNAL, "", "making", "Choose another --out, or add --force to begin anew.")
OURS = (MARK, JOURNAL, TRAIN, REJECTED, CARD, PAIRS, VERDICTS, FILES.new)
UNASKED = "not asked: --max-requests"  # why there is no answer beyond that number
SAID = 5  # reasons why there are no answers that are said
PATIENCE = 2  # batches in a row that an engine may refuse; with one more it is gone


@dataclass(frozen=True)
class Row:
    """One row to train on."""

    # A conversation in OpenAI's form.
    messages: list[dict[str, Any]]
    # Where it comes from, as `Making.made` says it.
    made: dict[str, Any]
    # In OpenAI's form; None for none.
    tools: list[dict[str, Any]] | None = None

    def as_json(self) -> dict[str, Any]:
        tools = {} if self.tools is None else {"tools": self.tools}
        return {"messages": self.messages, **tools, "made": self.made}


@dataclass(frozen=True)
class Rejected:
    """Something that was made and is not kept."""

    # What it is: a row, an instruction, an answer that could not be read.
    row: dict[str, Any]
    # A code of `reasons.REASONS`.
    reason: str
    # What of this one: how many words it has, what it is too near to.
    detail: str = ""

    def __post_init__(self) -> None:
        if self.reason not in REASONS:
            raise KeyError(f"{self.reason} is no code of reasons.REASONS")

    def as_json(self) -> dict[str, Any]:
        return {**self.row, "reason": self.reason, "detail": self.detail}


@dataclass(frozen=True)
class Failed:
    """A request without an answer."""

    # Of the request.
    id: str
    # Of the request.
    sample: int
    # What the engine said of it, or that it was not asked.
    why: str


class Spent(Exception):
    """`--max-requests` were asked. Its text says so."""


@dataclass(frozen=True)
class Yield:
    """What came of a making, in the maker's own unit."""

    # What is counted, in the plural: "instructions".
    what: str
    # How many were wanted.
    wanted: int


def nothing(making: Making) -> None:
    """Tells nobody."""


@dataclass
class Making:
    """One making in a folder. Raises UserError for a folder that holds something else."""

    # The folder; None: nothing is written, and what is asked is forgotten (a dry run).
    out: Path | None
    # What decides it beside the engine: "how" is the maker's name; JSON. Not how much is wanted, which may grow.
    identity: dict[str, Any]
    # Who answers.
    engine: Opened
    # Requests that may be asked, those of earlier processes included; None for any number.
    most_requests: int | None = None
    # Whether a making that is there is thrown away first.
    force: bool = False
    # Called after each batch of answers.
    told: Callable[[Making], None] = nothing
    # What was kept so far.
    rows: list[Row] = field(default_factory=list)
    # What was not.
    rejected: list[Rejected] = field(default_factory=list)
    # Requests so far, those without an answer included.
    requests: int = 0
    # Those that were not asked: `most_requests` were.
    unasked: int = 0
    # Those without an answer, by what was said of them.
    failures: Counter[str] = field(default_factory=Counter)
    # How many of what --count counts are kept so far, where the maker counts others than rows.
    counted: int | None = None
    # What no row may hold; the maker's.
    guard: Guard = field(default_factory=Guard)
    # Tokens of all answers, where the engine counts them.
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.force and self.out is not None:
            _clear(self.out)
        whole = {**self.identity, "engine": self.engine.identity, "mlxtune": mlxtune.__version__}
        self._journal = Journal(self.out, whole, FILES)
        self._asks = 0
        self._opened: Engine | None = None

    @property
    def found(self) -> int:
        """Answers that an earlier process had left, as far as they were asked for again."""
        return self._journal.found

    @property
    def kept(self) -> int:
        """How many of what --count counts are kept so far."""
        return len(self.rows) if self.counted is None else self.counted

    @property
    def notes(self) -> list[str]:
        """What a person must know of how the engine answered."""
        return list(dict.fromkeys(note for notes in self._journal.notes.values() for note in notes))

    def __enter__(self) -> Making:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def spent(self) -> str:
        """Why requests were not asked, for people; "" where all were."""
        return f"--max-requests {self.most_requests} is spent" if self.unasked else ""

    def close(self) -> None:
        """Let other processes have the folder."""
        self._journal.close()

    def made(self, parents: Sequence[str] = (), id: str = "", **scores: float) -> dict[str, Any]:
        """Where a row comes from. parents: the ids of what it was made from; id: its own, where others may be made of
        it; scores: what was measured of it.
        """
        named = {"id": id} if id else {}
        return {
            **named,
            "how": self.identity["how"],
            "engine": self.engine.name,
            "parents": list(parents),
            "scores": {name: round(score, 4) for name, score in scores.items()},
        }

    def ask(self, requests: Sequence[Request]) -> list[Answer | Failed]:
        """Every request's answer, in their order, or why there is none: the batch that it was in failed, or it is
        beyond `most_requests`. A maker that cannot do without it asks again, under another id or sample.

        Raises Spent where none may be asked any more, and UserError where the engine refuses batch after batch.
        """
        self._asks += 1
        done: list[Answer | str] = []
        part = 0
        while len(done) < len(requests):
            part += 1
            side = str(self._asks) if part == 1 else f"{self._asks}.{part}"
            rest = requests[len(done) :]
            count = self._may_ask(side, len(rest))
            if count == 0:
                break
            done += self._answered(side, rest[:count])
        self.unasked += len(requests) - len(done)
        if requests and not done:
            raise Spent(self.spent)
        found: list[Answer | Failed] = []
        for request, one in zip(requests, done, strict=False):
            found.append(one if isinstance(one, Answer) else Failed(request.id, request.sample, one))
        for request in requests[len(done) :]:
            found.append(Failed(request.id, request.sample, UNASKED))
        return found

    def _may_ask(self, side: str, wanted: int) -> int:
        """How many of the requests to ask as one: as many as an earlier process did, which may have been allowed
        fewer, or as many as are left.
        """
        if side in self._journal.plans:
            return sum(len(batch) for batch in self._journal.plans[side])
        if self.most_requests is None:
            return wanted
        return max(0, min(wanted, self.most_requests - self.requests))

    def _answered(self, side: str, requests: Sequence[Request]) -> list[Answer | str]:
        """From the journal or the engine, and counted."""
        before = self.requests

        def told(_: str, done: int, of: int) -> None:
            self.requests = before + done
            self.told(self)

        answers = self._journal.some_answers(side, requests, self._read_engine, told, PATIENCE)
        self.requests = before + len(requests)
        for one in answers:
            if isinstance(one, Answer):
                self.tokens += one.tokens
            else:
                self.failures[one] += 1
        return answers

    def _read_engine(self) -> Engine:
        if self._opened is None:
            self._opened = self.engine()
        return self._opened

    def let_go(self) -> None:
        """Forget the engine: another model needs its memory. It is read again where more is asked."""
        self._opened = None
        give_back()

    def keep(self, *rows: Row) -> bool:
        """Keep rows that belong together, and say so; or reject all of them, where one holds what is guarded: a text
        that was no part of what the maker looked at may stand in it.
        """
        for row in rows:
            why = self.guard.why_any(row.messages)
            if why is not None:
                for one in rows:
                    self.reject(Rejected(one.as_json(), "guarded", why))
                return False
        self.rows += rows
        return True

    def reject(self, rejected: Rejected) -> None:
        self.rejected.append(rejected)

    def finish(self, yields: Yield, stopped: str = "") -> dict[str, Any]:
        """Write train.jsonl, rejected.jsonl and card.md, each whole. stopped: why there is less than was wanted.
        Returns what came of it, as --json prints it.
        """
        assert self.out is not None
        for name, written in ((REJECTED, self.rejected), (TRAIN, self.rows)):
            with new_file(self.out / name, force=True) as file:
                for one in written:
                    file.write(json_text(one.as_json()) + "\n")
        document = self._document(yields, stopped)
        with new_file(self.out / CARD, force=True) as file:
            file.write(card(document, self.engine.licence))
        return document

    def _document(self, yields: Yield, stopped: str) -> dict[str, Any]:
        notes = [*self.notes]
        for why, count in self.failures.most_common(SAID):
            notes.append(f"{count} requests have no answer: {why}")
        said = sum(count for _, count in self.failures.most_common(SAID))
        if said < self.failures.total():
            notes.append(f"{self.failures.total() - said} requests more have no answer, each for a reason of its own")
        return {
            "out": str(self.out),
            **self.identity,
            "engine": self.engine.name,
            "requests": self.requests,
            "failed": sum(self.failures.values()),
            "tokens": self.tokens,
            "what": yields.what,
            "kept": self.kept,
            "wanted": yields.wanted,
            "rows": len(self.rows),
            "rejected": dict(Counter(rejected.reason for rejected in self.rejected)),
            "stopped": stopped,
            "notes": notes,
        }


def begun_on(out: Path) -> str:
    """The day (ISO) that the engine of a making in a folder was given; "" where there is no such making."""
    try:
        day = read_json(out / MARK, "a making")["identity"]["engine"]["day"]
        return date.fromisoformat(day).isoformat()
    except (UserError, KeyError, TypeError, ValueError):
        return ""


def _clear(out: Path) -> None:
    """Take a making out of its folder. Raises UserError for a folder that holds something else, and for one that
    another process is making in.
    """
    if not out.is_dir() or not contents(out):
        return
    others = sorted(path.name for path in contents(out) if not _is_ours(path.name))
    if others or not (out / MARK).is_file():
        held = others[0] if others else "no making"
        raise UserError(
            f"{out} holds {held}: --force replaces what `mlxtune make` wrote alone", "Choose another --out."
        )
    with locked(out / JOURNAL, FILES), explained(out):
        for path in contents(out):
            os.unlink(path)


def _is_ours(name: str) -> bool:
    """Whether a making writes a file of this name: a kill may leave .train.jsonl.partial-1234 beside it."""
    return name in OURS or any(name.startswith(f".{ours}.partial-") for ours in OURS)
