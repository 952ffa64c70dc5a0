"""One source or several -> the examples of each split: tokenized, held out, deduplicated, capped, mixed, counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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

    @staticmethod
    def of(stores: list[Store], source: list[int]) -> Examples:
        """All examples of some stores."""
        which = np.repeat(np.arange(len(stores), dtype=np.int32), [len(own) for own in stores])
        return Examples(stores, which, np.concatenate([np.arange(len(own)) for own in stores]), np.array(source))

    def only(self, kept: np.ndarray) -> Examples:
        """kept: [N] bool."""
        return replace(self, which=self.which[kept], where=self.where[kept])

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
        """An epoch's order of examples.

        Shuffled; in a mixture, each place drawn from a source with the probability of its weight, which then gives its
        next example, beginning again when it has none left; with `order`, ascending.
        """
        order = draw.permutation(len(self))
        if self.weights:
            share = np.array(self.weights) / sum(self.weights)
            drawn = draw.choice(len(self.weights), len(self), p=share)
            shuffled, source = order.copy(), self.sources[order]
            for number in range(len(self.weights)):
                places = np.flatnonzero(drawn == number)
                order[places] = np.resize(shuffled[source == number], len(places))
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
    if section.template:
        use(tokenizer, folder, section.template)
    renderer = Renderer(tokenizer, section)
    stores: dict[str, list[tuple[Store, int]]] = {}
    for number, source in enumerate(mixture):
        for split, files in find(source, section.hub == "stream").items():
            stores.setdefault(split, []).extend((_stored(one, renderer, folder, progress), number) for one in files)
    splits = {split: Examples.of([made for made, _ in own], [at for _, at in own]) for split, own in stores.items()}
    # Duplicates go, and caps apply, before rows are held out: no side keeps what the other one has.
    train, left_out = _thinned(splits["train"], section, mixture, seed)
    undivided = set(range(len(mixture))) - {number for _, number in stores.get("valid", [])}
    if undivided and not whole:
        held = _held_out(train, sorted(undivided), section, seed, thinned=bool(sum(left_out.values())))
        given = [splits["valid"]] if "valid" in splits else []
        splits["valid"] = _joined([*given, train.only(held)])
        train = train.only(~held)
    weights = [source.weight or 1.0 for source in mixture] if any(source.weight for source in mixture) else []
    splits["train"] = replace(train, order=section.order, left_out=left_out)
    for split, found in splits.items():
        told = [made.facts["file"] for made in train.stores] if split != "train" else []
        splits[split] = _checked(split, replace(found, weights=weights, known=frozenset(told)), section)
    return splits


def _stored(source: Source, renderer: Renderer, folder: Path, progress: Progress) -> Store:
    def rows() -> Iterator[Record | Bad]:
        return with_template(source.read(), renderer.tokenizer, folder, renderer.section.template)

    made = store.of(source.name, rows, source.digest(), renderer, progress)
    if not len(made):
        reasons = ", ".join(made.facts["counts"])
        first = next(iter(made.facts["dropped"].values()))[0]
        raise UserError(
            f"{source.name}: none of {made.facts['rows']} rows can be used; {place(source.name, first)}: {reasons}",
            "`mlxtune data show` prints what the model would see.",
        )
    return made


def _thinned(
    train: Examples, section: DataSection, mixture: list[SourceSection], seed: int
) -> tuple[Examples, dict[str, int]]:
    """Training rows without duplicates and beyond the caps, and how many were left out for what."""
    left: dict[str, int] = {}
    if section.dedup != "none":
        # The turns of an expanded row share its hash; they stay or go together.
        hashes, turns = train.column("hash"), train.column("part").astype(np.uint64)
        _, first, group = np.unique(duplicates.seeded(turns, 0) ^ hashes, return_index=True, return_inverse=True)
        kept = first[group] == np.arange(len(train))
        if section.dedup == "near":
            leader = duplicates.near(np.concatenate([own.signature for own in train.stores]))
            kept &= hashes[leader] == hashes
        left["duplicates" if section.dedup == "exact" else "equal or near duplicates"] = int((~kept).sum())
        train = train.only(kept)
    for number, source in enumerate(mixture):
        mine = train.sources == number
        if source.cap is not None and source.cap < mine.sum():
            places = np.flatnonzero(mine)
            hashes = train.column("hash") + train.column("part").astype(np.uint64)
            chosen = places[np.argsort(duplicates.seeded(hashes[places], seed + 1), kind="stable")[: source.cap]]
            left[f"beyond the cap of {source.cap} of {Path(source.path).name}"] = len(places) - len(chosen)
            mine[chosen] = False
            train = train.only(~mine)
    return train, left


def _held_out(train: Examples, sources: list[int], section: DataSection, seed: int, thinned: bool) -> np.ndarray:
    """[N] whether a row of the sources, which have no valid file, is held out. One limit for all of them, so that equal
    rows of two sources are on one side. thinned: rows were left out before.
    """
    own, hashes = np.isin(train.sources, sources), train.column("hash")
    stores = [made for made, source in zip(train.stores, train.source, strict=True) if source in sources]
    known = hashes[own] if thinned else np.concatenate([made.all_hashes for made in stores])
    limit = duplicates.threshold(known, section.valid_fraction, seed)
    if limit is None:
        raise UserError(
            f"{train.stores[0].facts['file']}: fewer than two different rows, too few to hold any out",
            "Add rows, or a valid file beside the train file.",
        )
    return own & (duplicates.seeded(hashes, seed) <= limit)


def _joined(parts: list[Examples]) -> Examples:
    """Some examples, and then others."""
    before = np.cumsum([0, *(len(part.stores) for part in parts)], dtype=np.int32)
    return Examples(
        [made for part in parts for made in part.stores],
        np.concatenate([part.which + start for part, start in zip(parts, before, strict=False)]),
        np.concatenate([part.where for part in parts]),
        np.concatenate([part.source for part in parts]),
    )


def _checked(split: str, examples: Examples, section: DataSection) -> Examples:
    """The examples of one split, those that the template damages treated as data.on_damage says. Raises UserError when
    none is left, or none of a source that has a weight.
    """
    damaged, left_out = examples.column("flags") & DAMAGED > 0, dict(examples.left_out)
    for number, made in enumerate(examples.stores):
        facts, kept = made.facts, int(damaged[examples.which == number].sum())
        count = kept + facts["lost"] * (split == "train")
        if count and section.on_damage == "error":
            listed = "; ".join(f"{where}: {text}" for where, text in facts["damaged"][:LISTED])
            more = f"; and {count - LISTED} more" if count > LISTED else ""
            raise UserError(
                f"{facts['file']}: the chat template damages {count} of {facts['rows']} rows: {listed}{more}",
                "Mend the rows, or set data.on_damage=drop or keep; `mlxtune data show` prints them.",
            )
        if kept and section.on_damage == "drop":
            left_out["damaged by the chat template"] = left_out.get("damaged by the chat template", 0) + count
    if section.on_damage == "drop":
        examples = replace(examples.only(~damaged), left_out=left_out)
    if not len(examples):
        reasons = {reason for made in examples.stores for reason in (*made.facts["counts"], *left_out)}
        raise UserError(
            f"{examples.stores[0].facts['file']}: no {split} row is left ({', '.join(sorted(reasons))})",
            "Mend the rows, or raise data.valid_fraction." if split == "valid" else "Mend the rows.",
        )
    gone = ~np.isin(examples.source, examples.sources)
    if examples.weights and split == "train" and gone.any():
        raise UserError(
            f"{examples.stores[int(gone.argmax())].facts['file']}: no row is left to draw with its weight",
            "Mend its rows, or take the source out of data.sources.",
        )
    return examples
