"""The stretches of targets in an example."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass
class Run:
    """Neighbouring targets of one example: ids[start:end]."""

    row: Any
    start: int
    end: int

    @cached_property
    def ids(self) -> list[int]:
        return [int(token) for token in self.row.example.ids]


def runs_of(row: Any) -> list[Run]:
    mask = [0, *(int(flag) for flag in row.example.mask), 0]
    edges = [at for at in range(1, len(mask)) if mask[at] != mask[at - 1]]
    return [Run(row, start - 1, end - 1) for start, end in zip(edges[::2], edges[1::2], strict=True)]
