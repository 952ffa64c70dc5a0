"""The usable examples of one split, which know of what rows they are.

    stores            A: 3 examples, rows 1, 1, 4        B: 2 examples, rows 1, 2
    one Examples      store_of_example [0 0 0 1 1], place_in_store [0 1 2 0 1], row_of [0 0 1 2 3]

N = 5 examples, R = 4 rows. Rows are what a person counts, and what is held out, capped or drawn; examples are what the
model is shown. A choice of rows is another Examples on the same stores, so no token is ever copied.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, overload

import numpy as np

from mlxtune.data.chat.masking import Example
from mlxtune.data.chat.turn_kinds import Expansion, kind_lines
from mlxtune.data.dataset.measured import MeasuredExamples, first_examples
from mlxtune.data.dataset.store import CHAT, COLUMNS, SHORTENED, Store
from mlxtune.data.rows.readers import place
from mlxtune.data.rows.sides import OF_PAIRS, OF_RATINGS, Side
from mlxtune.errors import UserError

NAMED = 5  # rows that a note names
Kind = Literal["supervised", "pairs", "rated"]  # of rows


@dataclass(frozen=True)
class Examples(MeasuredExamples):
    """The usable examples of one split, those of a row one after the other."""

    stores: list[Store]  # one for each file
    store_of_example: np.ndarray  # [N] number of its store
    place_in_store: np.ndarray  # [N] its index there
    source_of_store: np.ndarray  # [stores] number of the source that the file is of
    weights: list[float] = field(default_factory=list)  # of each source, where any is set
    order: str = "shuffled"  # data.order
    left_out: dict[str, str] = field(default_factory=dict)  # what was chosen away, for people: reason -> "3 rows"
    told_elsewhere: frozenset[str] = frozenset()  # files whose dropped rows the notes of another split name
    unused: list[str] = field(default_factory=list)  # notes on files beside the splits that nothing reads

    @staticmethod
    def of(stores: list[Store], sources: list[int]) -> Examples:
        """All examples of some stores. sources: [stores] the source of each."""
        counts = [len(store) for store in stores]
        store_of_example = np.repeat(np.arange(len(stores), dtype=np.int32), counts)
        place_in_store = np.concatenate([np.arange(count) for count in counts])
        return Examples(stores, store_of_example, place_in_store, np.array(sources))

    def only(self, kept: np.ndarray) -> Examples:
        """kept: [N] bool."""
        return replace(self, store_of_example=self.store_of_example[kept], place_in_store=self.place_in_store[kept])

    def only_rows(self, kept: np.ndarray) -> Examples:
        """kept: [R] bool."""
        return self.only(kept[self.row_of])

    def followed_by(self, other: Examples) -> Examples:
        """These examples, and then others; what was left out of these."""
        return Examples(
            self.stores + other.stores,
            np.concatenate([self.store_of_example, other.store_of_example + np.int32(len(self.stores))]),
            np.concatenate([self.place_in_store, other.place_in_store]),
            np.concatenate([self.source_of_store, other.source_of_store]),
            left_out=self.left_out,
        )

    def __len__(self) -> int:
        """How many examples; `rows` says of how many rows."""
        return len(self.place_in_store)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return self.stores[self.store_of_example[index]].example(self.place_in_store[index])

    # What is known of each example or row.

    def column(self, name: str) -> np.ndarray:
        """[N] a property of each example, as `store.COLUMNS` names it."""
        values = np.zeros(len(self), COLUMNS[name])
        for number, store in enumerate(self.stores):
            own = self.store_of_example == number
            values[own] = store.columns[name][self.place_in_store[own]]
        return values

    def of_rows(self, name: str) -> np.ndarray:
        """[R] a property that all examples of a row share."""
        return self.column(name)[self.firsts]

    @cached_property
    def row_of(self) -> np.ndarray:
        """[N] the row of each example, 0 .. R - 1 in their order."""
        other_store = np.diff(self.store_of_example, prepend=-1) != 0
        other_group = np.diff(self.column("group"), prepend=-1) != 0
        return np.cumsum(other_store | other_group) - 1

    @cached_property
    def firsts(self) -> np.ndarray:
        """[R] the first example of each row."""
        return first_examples(self.row_of)

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each example."""
        return self.column("length")

    @property
    def targets(self) -> np.ndarray:
        """[N] supervised tokens of each example."""
        return self.column("targets")

    @cached_property
    def sides(self) -> np.ndarray:
        """[N] uint8, of `Side`: which answer of a preference each example is of."""
        return self.column("side")

    @property
    def sources(self) -> np.ndarray:
        """[N] the source of each example."""
        return self.source_of_store[self.store_of_example]

    # What is known of all of them.

    @property
    def rows(self) -> int:
        """R, what people count in."""
        return len(self.firsts)

    @property
    def also(self) -> str:
        """For people, after a number of rows: " (30 examples)" where these are more."""
        return "" if self.rows == len(self) else f" ({len(self)} examples)"

    @property
    def highest(self) -> int:
        """The largest token id."""
        return max((store.facts.highest for store in self.stores), default=0)

    @property
    def kind(self) -> Kind:
        """What the rows say: answers to learn, which of two answers is preferred, or whether one is good.

        Raises UserError naming two files where rows of different kinds are mixed.
        """
        kinds: dict[Kind, str] = {}  # -> a file with such rows
        for number, store in enumerate(self.stores):
            for side in np.unique(self.sides[self.store_of_example == number]).tolist():
                kinds.setdefault(_kind_of(Side(side)), store.facts.file)
        if len(kinds) > 1:
            one, other = list(kinds)[:2]
            raise UserError(
                f"{kinds[one]} has {_KINDS[one]}, but {kinds[other]} has {_KINDS[other]}",
                "A run learns from rows of one kind: give each kind a run of its own.",
            )
        return next(iter(kinds), "supervised")

    @property
    def chat(self) -> bool:
        """Whether any example is a conversation."""
        return bool((self.column("flags") & CHAT).any())

    def digest(self) -> str:
        """Changes when any token, mask or side, or the choice of rows does."""
        running = hashlib.blake2b(digest_size=8)
        for store in self.stores:
            running.update(store.facts.digest.encode())
        running.update(self.store_of_example.tobytes() + self.place_in_store.tobytes())
        running.update(repr((self.weights, self.order)).encode())
        if self.sides.any():
            running.update(self.sides.tobytes())
        return running.hexdigest()

    # The order of an epoch.

    def epoch(self, draw: np.random.Generator) -> np.ndarray:
        """[R] an epoch's order of rows: shuffled; in a mixture drawn by the weights of its sources, so that a row may
        come several times or not at all; with `order` ascending.
        """
        order = draw.permutation(self.rows)
        if self.weights:
            order = self._drawn(order, draw)
        if self.order != "shuffled":
            keys = self._order_keys()
            order = order[np.argsort(keys[order], kind="stable")]
        return order

    def _drawn(self, shuffled: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """[R] Each place drawn from a source with the probability of its weight, which then gives its next row,
        beginning again when it has none left.

        Rows a b c of source 0 and d of source 1, shuffled c d a b, with equal weights: places drawn 0 1 1 0 give
        c d d a.
        """
        share = np.array(self.weights) / sum(self.weights)
        source_of_place = draw.choice(len(self.weights), self.rows, p=share)
        source_of_row = self.sources[self.firsts][shuffled]
        order = shuffled.copy()
        for number in range(len(self.weights)):
            places = np.flatnonzero(source_of_place == number)
            order[places] = np.resize(shuffled[source_of_row == number], len(places))
        return order

    def _order_keys(self) -> np.ndarray:
        """[R] what data.order goes up by: a row is as long as its longest example."""
        if self.order == "length":
            return np.maximum.reduceat(self.lengths, self.firsts)
        return self.of_rows("key")

    # For people.

    def place(self, index: int) -> str:
        """What to call an example in messages."""
        store, at = self.stores[self.store_of_example[index]], self.place_in_store[index]
        part = store.columns["part"][at]
        name = place(store.facts.file, store.columns["row"][at])
        if part:
            name = f"{name} turn {part}"
        if store.columns["side"][at] in OF_PAIRS:
            name = f"{name} {Side(store.columns['side'][at]).word}"
        return name if len(self.stores) == 1 else f"{store.facts.file} {name}"

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
            once=int(self.of_rows("once").sum()),  # of text rows it is 0
            untrue=int(self.column("untrue").sum()),
            of_pairs=bool((self.sides == Side.CHOSEN).any()),
        )

    def _called(self, store: Store) -> str:
        """What a file is called among the others: its name, or its path where another has that name; "" if alone."""
        files = [other.facts.file for other in self.stores]
        if len(files) == 1:
            return ""
        names = [Path(file).name for file in files]
        name = Path(store.facts.file).name
        return name if names.count(name) == 1 else store.facts.file

    def notes(self, split: str, max_tokens: int) -> list[str]:
        """What a person must know about rows: how their turns are trained, and which were not used as they are."""
        notes = list(self.unused)
        expanded = self.expansion.line()
        if expanded:
            notes.append(f"{split}: {expanded}")
        shortened = self.column("flags") & SHORTENED > 0
        if shortened.any():
            count = len(np.unique(self.row_of[shortened]))
            notes.append(f"{split}: {count} of {self.rows} rows shortened to data.max_tokens {max_tokens} (start kept)")
        for store in self.stores:
            if store.facts.file not in self.told_elsewhere:
                notes += [f"{split}: {note}" for note in _notes_on_file(store, self._called(store))]
        return notes + [f"{split}: {what} left out: {reason}" for reason, what in self.left_out.items()]


_KINDS: dict[Kind, str] = {  # in words
    "supervised": "rows of answers to learn",
    "pairs": "pairs of answers, one of them preferred",
    "rated": "answers rated good or bad",
}


def _kind_of(side: Side) -> Kind:
    """The kind of the rows that have examples of this side."""
    if side in OF_PAIRS:
        return "pairs"
    return "rated" if side in OF_RATINGS else "supervised"


def _notes_on_file(store: Store, called: str) -> list[str]:
    """What a person must know of a file's rows, whichever of them are chosen. called: the file among others; "": it is
    the only one.
    """
    facts = store.facts
    notes = []
    where = f"in {called}, " if called else ""
    for reason, count in sorted(facts.counts.items(), key=lambda item: -item[1]):
        first, *others = facts.dropped.get(reason) or [0]
        named = ", ".join([place(facts.file, first), *map(str, others[: NAMED - 1])])
        if count > NAMED:
            named += ", ..."
        notes.append(f"{where}{count} of {facts.rows} rows dropped: {reason} ({named})")
    name = called or Path(facts.file).name
    notes += [f"in {name}, {line}" for line in kind_lines(facts.kinds, facts.kind_rows)]
    for reason, (turns, rows) in facts.turns.items():
        notes.append(f"{where}{turns} turns of {rows} of {facts.rows} rows dropped: {reason}")
    return notes
