"""How many things are asked about before the answers are looked at: few at first, so that a small --count costs little.

8, 8, 16, 32, 64, 64, ... : what is asked beyond need is at most what was needed, or the largest portion. The sizes do
not depend on how many are wanted, so that a larger --count goes on where a smaller one ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

FIRST = 8

Thing = TypeVar("Thing")


def portions(things: Sequence[Thing], most: int) -> Iterator[Sequence[Thing]]:
    """All of them in portions. most: of the largest one."""
    first, size = 0, min(FIRST, most)
    while first < len(things):
        yield things[first : first + size]
        first += size
        size = min(max(FIRST, first), most)


def asked_about(wanted: int, things: Sequence[object], most: int) -> int:
    """How many things are asked about where so many must be, at least: whole portions."""
    asked = 0
    for portion in portions(things, most):
        if asked >= wanted:
            break
        asked += len(portion)
    return asked
