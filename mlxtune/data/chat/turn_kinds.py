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

    rows: int = 0  # conversations that give examples, or pairs of them
    examples: int = 0  # that these give
    turns: int = 0  # that are trained
    tokens: int = 0  # of all examples
    once: int = 0  # tokens of the same conversations, each rendered once
    untrue: int = 0  # turns that data.expand_turns=none would train otherwise than they are asked for
    of_pairs: bool = False  # whether the rows are pairs, each of two conversations

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
        many = ", ".join(
            [
                _counted(self.rows, "pair" if self.of_pairs else "conversation"),
                _counted(self.turns, "turn"),
                _counted(self.examples, "example"),
            ]
        )
        cost = f"{self.tokens:,} tokens, {self.times:.2f} times those of the rows rendered once"
        if not self.untrue:
            return f"{many}: {cost}; data.expand_turns=none would train the same"
        share = f"{self.untrue:,} of the {self.turns:,} turns"
        return f"{many}: {cost}; data.expand_turns=none would train {share} otherwise than they are asked for"


def _counted(count: int, what: str) -> str:
    """1 turn, 2 turns."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


@dataclass
class Kinds:
    """Remarks on turns, by kind (a key of asked.KINDS)."""

    counts: dict[str, int] = field(default_factory=dict)  # kind -> how many turns are of it
    rows: dict[str, list[Any]] = field(default_factory=dict)  # kind -> names of the first rows that hold one

    def add(self, parts: Iterable[Row], name: int | str, limit: int | None = None) -> None:
        """Count the turns of one conversation. name: of its row; limit: tokens beyond which turns are cut, where the
        examples are still whole.
        """
        for row in parts:
            kinds = [kind for kind, _ in row.kinds]
            if limit is not None:
                kinds += ["cut" for _, end in row.ends if end > limit]
            for kind in kinds:
                self.counts[kind] = self.counts.get(kind, 0) + 1
                names = self.rows.setdefault(kind, [])
                if len(names) <= NAMED and name not in names:  # one more than is named, to know that there are more
                    names.append(name)


def kind_lines(counts: Mapping[str, int], rows: Mapping[str, list[Any]]) -> list[str]:
    """One line for each kind, the most frequent first."""
    out = []
    for kind, count in sorted(counts.items(), key=lambda item: -item[1]):
        names = rows.get(kind, [])
        named = ", ".join(map(str, names[:NAMED]))
        if len(names) > NAMED:
            named += ", ..."
        word = "rows" if len(names) > 1 else "row"
        out.append(f"{count:,} x {KINDS[kind]} ({word} {named})")
    return out
