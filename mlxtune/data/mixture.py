"""One source or several -> the examples of each split: tokenized, held out, deduplicated, capped, mixed, counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from mlxtune.data import duplicates, store
from mlxtune.data.chat import Example
from mlxtune.data.examples import Renderer
from mlxtune.data.files import Bad, place
from mlxtune.data.records import Record
from mlxtune.data.sources import Source, find, with_template
from mlxtune.data.store import CHAT, DAMAGED, SHORTENED, Store
from mlxtune.data.template import use
from mlxtune.errors import UserError
from mlxtune.sections import DataSection, SourceSection

LISTED = 8  # damaged rows that an error message names
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """The usable examples of one split. which, where: [N] the store and the place in it of each; source: of each store;
    weights: of each source, where any is set; order: as data.order; left_out: rows by reason; known: files whose
    dropped rows another split tells of.
    """

    stores: list[Store]
    which: np.ndarray
    where: np.ndarray
    source: np.ndarray
    weights: list[float] = field(default_factory=list)
    order: str = "shuffled"
    left_out: dict[str, int] = field(default_factory=dict)
    known: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.where)

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
        out = np.zeros(len(self), store.COLUMNS[name])
        for number, own in enumerate(self.stores):
            out[self.which == number] = own.columns[name][self.where[self.which == number]]
        return out

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each example."""
        return self.column("length")

    @property
    def highest(self) -> int:
        """The largest token id."""
        return max((own.facts["highest"] for own in self.stores), default=0)

    @property
    def chat(self) -> bool:
        """Whether any example is a conversation."""
        return bool((self.column("flags") & CHAT).any())

    def epoch(self, draw: np.random.Generator) -> np.ndarray:
        """An epoch's order of examples.

        Shuffled; in a mixture, each place drawn from a source with the probability of its weight, which then gives its
        next example, beginning again when it has none left; with `order`, ascending.
        """
        order = draw.permutation(len(self))
        if self.weights:
            share = np.array(self.weights) / sum(self.weights)
            drawn = draw.choice(len(self.weights), len(self), p=share)
            source = self.source[self.which[order]]
            own = [order[source == number] for number in range(len(self.weights))]
            order = np.empty(len(self), np.int64)
            for number, rows in enumerate(own):
                places = np.flatnonzero(drawn == number)
                order[places] = np.resize(rows, len(places))
        if self.order != "shuffled":
            keys = self.lengths if self.order == "length" else self.column("key")
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

    def notes(self, split: str, max_tokens: int) -> list[str]:
        """What a person must know about rows that were not used as they are."""
        out = []
        shortened = int((self.column("flags") & SHORTENED > 0).sum())
        if shortened:
            cut = f"shortened to data.max_tokens {max_tokens} (start kept)"
            out.append(f"{split}: {shortened} of {len(self)} rows {cut}")
        for own in self.stores:
            facts = own.facts
            if facts["file"] in self.known:
                continue
            for reason, count in sorted(facts["counts"].items(), key=lambda item: -item[1]):
                first, *others = facts["dropped"].get(reason) or [0]
                listed = ", ".join([place(facts["file"], first), *map(str, others[:4])]) + ", ..." * (count > 5)
                out.append(f"{split}: {count} of {facts['rows']} rows dropped: {reason} ({listed})")
        out += [f"{split}: {count} rows left out: {reason}" for reason, count in self.left_out.items() if count]
        return out


@dataclass(frozen=True)
class _Part:
    """Some examples of one store, which is of the mixture's `source`-th source."""

    made: Store
    rows: np.ndarray
    source: int

    def column(self, name: str) -> np.ndarray:
        return self.made.columns[name][self.rows]

    def only(self, kept: np.ndarray) -> _Part:
        return _Part(self.made, self.rows[kept], self.source)


def read(
    section: DataSection,
    tokenizer: Any,
    folder: Path,
    seed: int,
    progress: Progress = lambda source, rows: None,
    whole: bool = False,
) -> dict[str, Examples]:
    """The examples of "train", "valid" and, where there is one, "test".

    folder: where the tokenizer is from, for messages; whole: a single file counts whole, as "train", and nothing is
    held out. Raises UserError for anything that is wrong with the data.
    """
    mixture = section.mixture()
    if section.hub == "stream" and any(source.cap is None for source in mixture):
        raise UserError("data.hub=stream needs data.cap: how many rows to read", "Or set data.hub=download.")
    found: dict[str, list[_Part]] = {}
    whole_sources = set()
    for number, source in enumerate(mixture):
        own = section.model_copy(update={"columns": {**section.columns, **source.columns}})
        for split, files in find(source.path, own, source.cap).items():
            for one in files:
                made = _stored(one, own, tokenizer, folder, progress)
                found.setdefault(split, []).append(_Part(made, np.arange(len(made)), number))
            if split == "valid":
                whole_sources.add(number)
    # Duplicates go, and caps apply, before rows are held out: no side keeps what the other one has.
    found["train"], left_out = _thinned(found["train"], section, mixture, seed)
    if not whole and len(whole_sources) < len(mixture):
        thinned = bool(sum(left_out.values()))
        found["train"], held = _held_out(found["train"], whole_sources, section, seed, thinned)
        found["valid"] = [*found.get("valid", []), *held]
    trained = frozenset(part.made.facts["file"] for part in found["train"])
    weights = [source.weight or 1.0 for source in mixture] if any(source.weight for source in mixture) else []
    return {
        split: _joined(split, own, section, weights, left_out if split == "train" else {}, trained)
        for split, own in found.items()
    }


def _held_out(
    parts: list[_Part], whole_sources: set[int], section: DataSection, seed: int, thinned: bool
) -> tuple[list[_Part], list[_Part]]:
    """(training rows, held-out rows) of the sources without a valid file. One limit for all of them, so that equal rows
    of two sources are on one side. thinned: rows were left out before.
    """
    own = [part for part in parts if part.source not in whole_sources]
    hashes = [part.column("hash") if thinned else part.made.all_hashes for part in own]
    limit = duplicates.threshold(np.concatenate(hashes), section.valid_fraction, seed)
    if limit is None:
        raise UserError(
            f"{parts[0].made.facts['file']}: fewer than two different rows, too few to hold any out",
            "Add rows, or a valid file beside the train file.",
        )
    train, valid = [], []
    for part in parts:
        held = duplicates.seeded(part.column("hash"), seed) <= limit
        held &= part.source not in whole_sources
        train.append(part.only(~held))
        valid.append(part.only(held))
    return train, valid


def _stored(source: Source, section: DataSection, tokenizer: Any, folder: Path, progress: Progress) -> Store:
    def rows() -> Iterator[Record | Bad]:
        return with_template(source.read(), tokenizer, folder, section.template)

    if section.template:
        use(tokenizer, folder, section.template)
    made = store.of(source.name, rows, source.digest(), Renderer(tokenizer, section), progress)
    if not len(made):
        reasons = ", ".join(made.facts["counts"])
        first = next(iter(made.facts["dropped"].values()))[0]
        raise UserError(
            f"{source.name}: none of {made.facts['rows']} rows can be used; {place(source.name, first)}: {reasons}",
            "`mlxtune data show` prints what the model would see.",
        )
    return made


def _thinned(
    parts: list[_Part], section: DataSection, mixture: list[SourceSection], seed: int
) -> tuple[list[_Part], dict[str, int]]:
    """Training rows without duplicates and beyond the caps, and how many were left out for what."""
    left: dict[str, int] = {}
    if section.dedup != "none":
        hashes = np.concatenate([part.column("hash") for part in parts])
        # The turns of an expanded row share its hash; they stay or go together.
        turns = np.concatenate([part.column("part") for part in parts]).astype(np.uint64)
        _, first, group = np.unique(duplicates.seeded(turns, 0) ^ hashes, return_index=True, return_inverse=True)
        kept = first[group] == np.arange(len(hashes))
        if section.dedup == "near":
            signatures = np.concatenate([np.asarray(part.made.signature[part.rows]) for part in parts])
            leader = duplicates.near(signatures)
            kept &= hashes[leader] == hashes
        left["duplicates" if section.dedup == "exact" else "equal or near duplicates"] = int((~kept).sum())
        parts = _split(parts, kept)
    for number, source in enumerate(mixture):
        own = [part.source == number for part in parts]
        mine = np.concatenate([np.full(len(part.rows), is_own) for part, is_own in zip(parts, own, strict=True)])
        if source.cap is not None and source.cap < mine.sum():
            hashes = np.concatenate([part.column("hash") + part.column("part").astype(np.uint64) for part in parts])
            places = np.flatnonzero(mine)
            chosen = places[np.argsort(duplicates.seeded(hashes[places], seed + 1), kind="stable")[: source.cap]]
            left[f"beyond the cap of {source.cap} of {Path(source.path).name}"] = len(places) - len(chosen)
            mine[chosen] = False
            parts = _split(parts, ~mine)
    return parts, left


def _split(parts: list[_Part], kept: np.ndarray) -> list[_Part]:
    """kept: [sum of all parts' rows] bool."""
    ends = np.cumsum([len(part.rows) for part in parts])
    return [part.only(own) for part, own in zip(parts, np.split(kept, ends[:-1]), strict=True)]


def _joined(
    split: str,
    parts: list[_Part],
    section: DataSection,
    weights: list[float],
    left_out: dict[str, int],
    trained: frozenset[str],
) -> Examples:
    """The examples of all sources; rows that the template damages are treated as data.on_damage says."""
    for number, part in enumerate(parts):
        facts = part.made.facts
        damaged = part.column("flags") & DAMAGED > 0
        count = int(damaged.sum()) + facts["lost"] * (split == "train")
        if count and section.on_damage == "error":
            listed = "; ".join(f"{where}: {text}" for where, text in facts["damaged"][:LISTED])
            more = f"; and {count - LISTED} more" if count > LISTED else ""
            raise UserError(
                f"{facts['file']}: the chat template damages {count} of {facts['rows']} rows: {listed}{more}",
                "Mend the rows, or set data.on_damage=drop or keep; `mlxtune data show` prints them.",
            )
        if damaged.any() and section.on_damage == "drop":
            parts[number] = part.only(~damaged)
            left_out["damaged by the chat template"] = left_out.get("damaged by the chat template", 0) + count
    which = np.concatenate([np.full(len(part.rows), number, np.int32) for number, part in enumerate(parts)])
    if not len(which):
        reasons = {reason for part in parts for reason in (*part.made.facts["counts"], *left_out)}
        raise UserError(
            f"{parts[0].made.facts['file']}: no {split} row is left ({', '.join(sorted(reasons))})",
            "Mend the rows, or raise data.valid_fraction." if split == "valid" else "Mend the rows.",
        )
    empty = [part for part in parts if weights and not any(len(p.rows) for p in parts if p.source == part.source)]
    if empty and split == "train":
        raise UserError(
            f"{empty[0].made.facts['file']}: no row is left to draw with its weight",
            "Mend its rows, or take the source out of data.sources.",
        )
    return Examples(
        [part.made for part in parts],
        which,
        np.concatenate([part.rows for part in parts]),
        np.array([part.source for part in parts]),
        weights,
        section.order if split == "train" else "shuffled",
        left_out,
        frozenset() if split == "train" else trained,
    )
