"""The fenced blocks of Markdown in an answer: what stands between ``` (or ~~~) and the same mark on a line of its own.

Read line by line, so that a text of a thousand openings takes no longer than any other.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_OPENING = re.compile(r"(```|~~~)[ \t]*([\w+#.-]*)")


class Block(NamedTuple):
    """One fenced block."""

    language: str  # behind the opening mark; "" for none
    text: str  # what stands inside
    is_closed: bool  # False: the answer ended before


def blocks_in(text: str) -> list[Block]:
    """The blocks in their order; the last one may be open."""
    return _split(text)[0]


def without_blocks(text: str) -> str:
    """What stands outside of them."""
    return _split(text)[1]


def _split(text: str) -> tuple[list[Block], str]:
    blocks: list[Block] = []
    outside: list[str] = []
    inside: list[str] = []
    mark = language = ""
    for line in text.splitlines(keepends=True):
        opening = _OPENING.match(line.strip())
        if mark and line.strip() == mark:
            blocks.append(Block(language, "".join(inside), True))
            mark, inside = "", []
        elif mark:
            inside.append(line)
        elif opening:
            mark, language = opening[1], opening[2]
        else:
            outside.append(line)
    if mark:
        blocks.append(Block(language, "".join(inside), False))
    return blocks, "".join(outside)
