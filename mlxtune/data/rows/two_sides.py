"""The two records of a pair, as one again: for whoever shows, checks or rewrites pairs.

A row with a preferred and a less preferred answer is read as two records, the one behind the other:

    {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}
    CHOSEN [Hi, Hello!]   REJECTED [Hi, What?]
    TwoSides: prompt [Hi], answers [Hello!] and [What?]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.readers import Bad
from mlxtune.data.rows.sides import Side

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class TwoSides:
    """A pair."""

    chosen: Record  # the prompt and the preferred answer
    rejected: Record  # the prompt and the less preferred one

    @property
    def prompt(self) -> Messages:
        """What both sides answer."""
        return prompt_of(self.chosen)

    @property
    def preferred(self) -> Messages:
        """What the chosen side says after the prompt."""
        return answer_of(self.chosen)

    @property
    def less_preferred(self) -> Messages:
        """What the rejected side says after it."""
        return answer_of(self.rejected)


def together(rows: Iterable[Record | Bad]) -> Iterator[Record | Bad | TwoSides]:
    """The rows, each pair as one. rows: as `formats.read` yields them, the rejected side right behind the chosen."""
    waiting: Record | None = None
    for row in rows:
        if waiting is not None:
            assert isinstance(row, Record) and row.side == Side.REJECTED, "a chosen side without its rejected one"
            yield TwoSides(waiting, row)
            waiting = None
        elif isinstance(row, Record) and row.side == Side.CHOSEN:
            waiting = row
        else:
            yield row


def records_of(row: Record | TwoSides) -> list[Record]:
    """A row's records: of a pair both sides, the chosen one first."""
    return [row.chosen, row.rejected] if isinstance(row, TwoSides) else [row]


def prompt_of(record: Record) -> Messages:
    """What one side of a pair, or a rated row, answers."""
    return (record.messages or [])[: record.prompt]


def answer_of(record: Record) -> Messages:
    """What it says to that."""
    return (record.messages or [])[record.prompt :]


def side_of(record: Record | Bad) -> str:
    """chosen, rejected, good or bad; "" for a record that is no side of anything."""
    side = record.side if isinstance(record, Record) else Side.NONE
    return "" if side == Side.NONE else side.word
