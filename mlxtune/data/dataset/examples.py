"""The usable examples of one split, which know of what rows they are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np

from mlxtune.data.chat.masking import Example
from mlxtune.data.chat.turn_kinds import Expansion, kind_lines
from mlxtune.data.dataset import row_cache
from mlxtune.data.dataset.batches import firsts
from mlxtune.data.dataset.row_cache import CHAT, SHORTENED, Store
from mlxtune.data.rows.readers import place


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """The usable examples of one split, those of a row one after the other."""

    stores: list[Store]
    which: np.ndarray  # [N] the store of each example
    where: np.ndarray  # [N] its place in that store
    source: np.ndarray  # [stores] the source of each store
    weights: list[float] = field(default_factory=list)  # of each source, where any is set
    order: str = "shuffled"  # as data.order
    left_out: dict[str, str] = field(default_factory=dict)  # what was ("3 rows"), by reason
    known: frozenset[str] = frozenset()  # files whose dropped rows another split tells of
    unused: list[str] = field(default_factory=list)  # notes on files beside the splits that nothing reads

    @staticmethod
    def of(stores: list[Store], source: list[int]) -> Examples:
        """All examples of some stores."""
        which = np.repeat(np.arange(len(stores), dtype=np.int32), [len(own) for own in stores])
        return Examples(stores, which, np.concatenate([np.arange(len(own)) for own in stores]), np.array(source))

    def only(self, kept: np.ndarray) -> Examples:
        """kept: [N] bool."""
        return replace(self, which=self.which[kept], where=self.where[kept])

    def only_rows(self, kept: np.ndarray) -> Examples:
        """kept: [R] bool."""
        return self.only(kept[self.row_of])

    def __len__(self) -> int:
        """How many examples; `rows` says of how many rows."""
        return len(self.where)

    @cached_property
    def row_of(self) -> np.ndarray:
        """[N] the row of each example, 0 .. R - 1 in their order."""
        group = self.column("group")
        return np.cumsum((np.diff(self.which, prepend=-1) != 0) | (np.diff(group, prepend=-1) != 0)) - 1

    @cached_property
    def firsts(self) -> np.ndarray:
        """[R] the first example of each row."""
        return firsts(self.row_of)

    @property
    def rows(self) -> int:
        """R, what people count in."""
        return len(self.firsts)

    @property
    def also(self) -> str:
        """For people, after a number of rows: " (30 examples)" where these are more."""
        return "" if self.rows == len(self) else f" ({len(self)} examples)"

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[at] for at in range(*place.indices(len(self)))]
        return self.stores[self.which[place]].example(self.where[place])

    def column(self, name: str) -> np.ndarray:
        """[N] a property of each example, as the store names it."""
        out = np.zeros(len(self), row_cache.COLUMNS[name])
        for number, own in enumerate(self.stores):
            out[self.which == number] = own.columns[name][self.where[self.which == number]]
        return out

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each example."""
        return self.column("length")

    @property
    def sources(self) -> np.ndarray:
        """[N] the source of each example."""
        return self.source[self.which]

    @property
    def highest(self) -> int:
        """The largest token id."""
        return max((own.facts["highest"] for own in self.stores), default=0)

    @property
    def chat(self) -> bool:
        """Whether any example is a conversation."""
        return bool((self.column("flags") & CHAT).any())

    def epoch(self, draw: np.random.Generator) -> np.ndarray:
        """An epoch's order of rows, [R].

        Shuffled; in a mixture, each place drawn from a source with the probability of its weight, which then gives its
        next row, beginning again when it has none left; with `order`, ascending, a row as long as its longest example.
        """
        order = draw.permutation(self.rows)
        if self.weights:
            share = np.array(self.weights) / sum(self.weights)
            drawn = draw.choice(len(self.weights), self.rows, p=share)
            shuffled, source = order.copy(), self.sources[self.firsts][order]
            for number in range(len(self.weights)):
                places = np.flatnonzero(drawn == number)
                order[places] = np.resize(shuffled[source == number], len(places))
        if self.order != "shuffled":
            longest = self.order == "length"
            keys = np.maximum.reduceat(self.lengths, self.firsts) if longest else self.column("key")[self.firsts]
            order = order[np.argsort(keys[order], kind="stable")]
        return order

    def place(self, at: int) -> str:
        """What to call an example in messages."""
        own, index = self.stores[self.which[at]], self.where[at]
        part = own.columns["part"][index]
        where = place(own.facts["file"], own.columns["row"][index]) + (f" turn {part}" if part else "")
        return where if len(self.stores) == 1 else f"{own.facts['file']} {where}"

    def digest(self) -> str:
        """Changes when any token, mask or the choice of rows does."""
        running = hashlib.blake2b(digest_size=8)
        for own in self.stores:
            running.update(own.facts["digest"].encode())
        running.update(self.which.tobytes() + self.where.tobytes() + repr((self.weights, self.order)).encode())
        return running.hexdigest()

    @property
    def expansion(self) -> Expansion:
        """What became of the conversations among the rows."""
        turns = self.column("turns")
        of_turns = turns > 0
        return Expansion(
            rows=len(np.unique(self.row_of[of_turns])),
            examples=int(of_turns.sum()),
            turns=int(turns.sum()),
            tokens=int(self.lengths[of_turns].sum()),
            once=int(self.column("once")[self.firsts].sum()),  # of text rows it is 0
            untrue=int(self.column("untrue").sum()),
        )

    def notes(self, split: str, max_tokens: int) -> list[str]:
        """What a person must know about rows: how their turns are trained, and which were not used as they are."""
        line = self.expansion.line()
        out = [*self.unused, *([f"{split}: {line}"] if line else [])]
        shortened = self.column("flags") & SHORTENED > 0
        if shortened.any():
            count = f"{len(np.unique(self.row_of[shortened]))} of {self.rows} rows"
            out.append(f"{split}: {count} shortened to data.max_tokens {max_tokens} (start kept)")
        for own in self.stores:
            facts = own.facts
            if facts["file"] in self.known:
                continue
            for reason, count in sorted(facts["counts"].items(), key=lambda item: -item[1]):
                first, *others = facts["dropped"].get(reason) or [0]
                listed = ", ".join([place(facts["file"], first), *map(str, others[:4])]) + ", ..." * (count > 5)
                out.append(f"{split}: {count} of {facts['rows']} rows dropped: {reason} ({listed})")
            name = Path(facts["file"]).name
            out += [f"{split}: in {name}, {line}" for line in kind_lines(facts["kinds"], facts["kind_rows"])]
            for reason, (turns, rows) in facts["turns"].items():
                out.append(f"{split}: {turns} turns of {rows} of {facts['rows']} rows dropped: {reason}")
        return out + [f"{split}: {what} left out: {reason}" for reason, what in self.left_out.items()]
