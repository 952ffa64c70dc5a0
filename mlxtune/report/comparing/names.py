"""What runs are called on a page that shows several of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mlxtune_convert.shown import shown_name

from mlxtune.report.secrets import masked


def names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder, all different: its last part, with as many of those before it as tell it from the others.

    first/run, second/run, other -> first/run, second/run, other

    Names that look the same though they are not (one holds an escape, the other its number) are numbered.
    """
    parts = [folder.absolute().parts for folder in folders]
    lengths = [1] * len(parts)
    while True:
        short = [str(Path(*one[-length:])) for one, length in zip(parts, lengths, strict=True)]
        count = Counter(short)
        grown = [
            min(length + 1, len(one)) if count[name] > 1 else length
            for one, length, name in zip(parts, lengths, short, strict=True)
        ]
        if grown == lengths:
            break
        lengths = grown
    found: list[str] = []
    for name in (shown_name(masked(one)) for one in short):
        number, numbered = 2, name
        while numbered in found:
            numbered = f"{name} ({number})"
            number += 1
        found.append(numbered)
    return found
