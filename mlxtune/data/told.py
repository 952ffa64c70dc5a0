"""How the turns of some rows are trained, in words: before training and in `mlxtune data check`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mlxtune.data.asked import KINDS
from mlxtune.data.examples import Row

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

    def add(self, parts: Iterable[Row], tokens: int) -> None:
        """Count the examples of one conversation. tokens: of all of them, as far as they are trained on."""
        used = [row for row in parts if row.turns]
        if used:
            self.rows += 1
            self.examples += len(used)
            self.turns += sum(row.turns for row in used)
            self.tokens += tokens
            self.once += sum(row.once for row in used)
            self.untrue += sum(row.untrue for row in used)

    @property
    def times(self) -> float:
        """How many times the tokens of the conversations rendered once are trained on."""
        return self.tokens / self.once if self.once else 1.0

    def line(self) -> str:
        """For people; "" where there are no such conversations."""
        if not self.rows:
            return ""
        many = f"{self.rows:,} conversations, {self.turns:,} turns, {self.examples:,} examples"
        cost = f"{self.tokens:,} tokens, {self.times:.2f} times those of the rows rendered once"
        if not self.untrue:
            return f"{many}: {cost}; data.expand_turns=none would train the same"
        share = f"{self.untrue:,} of the {self.turns:,} turns"
        return f"{many}: {cost}; data.expand_turns=none would train {share} otherwise than they are asked for"


@dataclass
class Kinds:
    """What is to be told of turns, by kind: how many there are, and the first rows that hold one."""

    counts: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)

    def add(self, parts: Iterable[Row]) -> None:
        for row in parts:
            for kind, _ in row.kinds:
                self.counts[kind] = self.counts.get(kind, 0) + 1
                known = self.rows.setdefault(kind, [])
                if len(known) <= NAMED and row.record.row not in known:
                    known.append(row.record.row)


def kind_lines(counts: Mapping[str, int], rows: Mapping[str, list[int]]) -> list[str]:
    """One line for each kind, the most frequent first."""
    out = []
    for kind, count in sorted(counts.items(), key=lambda item: -item[1]):
        first = rows.get(kind, [])
        named = ", ".join(map(str, first[:NAMED])) + ", ..." * (len(first) > NAMED)
        out.append(f"{count:,} x {KINDS[kind]} (row{'s' * (len(first) > 1)} {named})")
    return out
