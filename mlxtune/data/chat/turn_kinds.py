"""How the turns of some rows are trained, in words: before training and in `mlxtune data check`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxtune.data.chat.asked import KINDS
from mlxtune.data.chat.renderer import Row

NAMED = 5  # rows that are named of a kind of turn


@dataclass
class Expansion:
    """What became of conversations whose turns stand behind the prompts that ask for them."""

    rows: int = 0  # conversations that give examples
    examples: int = 0
    turns: int = 0  # that are trained
    tokens: int = 0  # of all examples
    once: int = 0  # tokens of the same conversations, each rendered once
    untrue: int = 0  # turns that data.expand_turns=none would train otherwise than they are asked for

    def add(self, parts: Iterable[Row], limit: int) -> None:
        """Count the examples of one conversation, as they are when cut at `limit` tokens."""
        used = [row for row in parts if row.turns and row.example and row.example.mask[1:limit].any()]
        if not used:
            return
        self.rows += 1
        self.examples += len(used)
        for row in used:
            assert row.example is not None
            self.turns += sum(1 for start in row.starts if start < limit)
            self.tokens += min(len(row.example.ids), limit)
            self.untrue += row.untrue
        self.once += min(used[0].once, limit)

    @property
    def times(self) -> float:
        """How many times the tokens of the conversations rendered once are trained on."""
        return self.tokens / self.once if self.once else 1.0

    def line(self) -> str:
        """For people; "" where there are no such conversations."""
        if not self.rows:
            return ""
        counted = ((self.rows, "conversation"), (self.turns, "turn"), (self.examples, "example"))
        many = ", ".join(f"{count:,} {what}{'s' * (count != 1)}" for count, what in counted)
        cost = f"{self.tokens:,} tokens, {self.times:.2f} times those of the rows rendered once"
        if not self.untrue:
            return f"{many}: {cost}; data.expand_turns=none would train the same"
        share = f"{self.untrue:,} of the {self.turns:,} turns"
        return f"{many}: {cost}; data.expand_turns=none would train {share} otherwise than they are asked for"


@dataclass
class Kinds:
    """What is to be told of turns, by kind: how many there are, and the first rows that hold one."""

    counts: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, parts: Iterable[Row], name: int | str, limit: int | None = None) -> None:
        """Count the turns of one conversation. name: of its row; limit: tokens beyond which turns are cut, where the
        examples are still whole.
        """
        for row in parts:
            cut = [("cut", index) for index, end in row.ends if limit is not None and end > limit]
            for kind, _ in [*row.kinds, *cut]:
                self.counts[kind] = self.counts.get(kind, 0) + 1
                known = self.rows.setdefault(kind, [])
                if len(known) <= NAMED and name not in known:
                    known.append(name)


def kind_lines(counts: Mapping[str, int], rows: Mapping[str, list[Any]]) -> list[str]:
    """One line for each kind, the most frequent first."""
    out = []
    for kind, count in sorted(counts.items(), key=lambda item: -item[1]):
        first = rows.get(kind, [])
        named = ", ".join(map(str, first[:NAMED])) + ", ..." * (len(first) > NAMED)
        out.append(f"{count:,} x {KINDS[kind]} (row{'s' * (len(first) > 1)} {named})")
    return out
