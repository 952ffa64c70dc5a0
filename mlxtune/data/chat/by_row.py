"""What was made of each row of preferences: the whole of both answers of a pair, or nothing.

An answer is never cut, for then a torn one would be compared with a whole one; and a pair never loses a side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from mlxtune.data.chat.renderer import Row, by_record
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.sides import Side


def by_row(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """All that was made of one row, row by row. rows: as `Renderer.stream` yields them.

    Of a pair that are the examples of the chosen answer and then of the rejected one. Where one of them cannot be used
    whole, all are dropped with the reason; so is a rated answer that would be cut.
    """
    chosen: list[Row] = []  # what was made of the side that the next record belongs to
    for parts in by_record(rows):
        side = side_of(parts[0])
        assert bool(chosen) == (side is Side.REJECTED), "the records of a pair follow each other"
        if side is Side.CHOSEN:
            chosen = parts
        elif side is Side.REJECTED:
            yield _settled([*chosen, *parts], _why_not_a_pair(chosen, parts))
            chosen = []
        elif side is not Side.NONE:
            yield _settled(parts, _why_not_whole(parts))
        else:
            yield parts


def side_of(row: Row) -> Side:
    """Which answer an example is of."""
    return row.record.side if isinstance(row.record, Record) else Side.NONE


def _settled(parts: list[Row], reason: str) -> list[Row]:
    """What becomes of the examples of a row: dropped, where there is a reason. None of them is cut then: what may be
    missing of those that stay is not trained, and stands behind all that is.
    """
    out = []
    for part in parts:
        if not reason:
            out.append(replace(part, shortened=False))
            continue
        kinds = tuple((kind, message) for kind, message in part.kinds if kind != "cut")
        out.append(replace(part, example=None, dropped=reason, kinds=kinds))
    return out


def _why_not_a_pair(chosen: list[Row], rejected: list[Row]) -> str:
    """Why two answers are no pair; "" where they are one."""
    reasons = [_why_not_whole(chosen), _why_not_whole(rejected)]
    if reasons[0] == reasons[1]:
        return reasons[0] or _why_not_different(chosen, rejected)
    told = []
    for side, reason in zip(("chosen", "rejected"), reasons, strict=True):
        if reason:
            told.append(f"{side}: {reason}")
    return "; ".join(told)


def _why_not_whole(parts: list[Row]) -> str:
    """Why an answer cannot be trained as a whole; "" where it can."""
    for part in parts:
        if part.dropped:
            return part.dropped
        assert part.example is not None
        limit = len(part.example.ids)  # where it is cut
        ends = [end for _, end in part.ends]
        if part.shortened and (not ends or max(ends) > limit):
            return f"the answer ends after data.max_tokens {limit}, and no answer of a preference is cut"
    return ""


def _why_not_different(chosen: list[Row], rejected: list[Row]) -> str:
    """Why nothing tells two answers apart; "" where something does."""
    if len(chosen) == len(rejected) and all(map(_are_equal, chosen, rejected)):
        return "the chat template prints the same for chosen and rejected"
    return ""


def _are_equal(one: Row, other: Row) -> bool:
    """Whether two examples train the same tokens behind the same ones."""
    if one.example is None or other.example is None:
        return False
    return np.array_equal(one.example.ids, other.example.ids) and np.array_equal(one.example.mask, other.example.mask)
