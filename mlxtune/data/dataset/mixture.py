"""One source or several -> the examples of each split: tokenized, chosen, held out and counted.

All of it chooses among rows and counts rows: the examples of one row stay together, however many they are. For two
sources, chat.jsonl (12 rows, of which 3 are equal to others, data.cap=5) and the folder texts (20 rows in train.jsonl,
4 in valid.jsonl), in this order:

    tokenized     train has 12 + 20 rows, valid 4      rows that give no example are not among them
    damaged       out of every split (data.on_damage=drop)
    duplicates    out of train                         9 + 20
    caps          out of train                         5 + 20
    held out      of the 5 rows of chat.jsonl, which has no valid file: one goes from train (4 + 20) to valid (4 + 1)

So no side has what the other one has, and what is held out can be used. Nothing is mixed on disk: the weights of the
sources decide in which order an epoch takes the rows of train (`Examples.epoch`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxtune.config.schema import DataSection, SourceSection
from mlxtune.data.chat.renderer import Renderer
from mlxtune.data.dataset import duplicates, holdout, row_cache
from mlxtune.data.dataset.examples import Examples
from mlxtune.data.dataset.sources import Source, files_by_split, unused_note
from mlxtune.data.dataset.store import DAMAGED, Store
from mlxtune.data.dataset.store_writing import Progress, untold
from mlxtune.data.rows.readers import place
from mlxtune.errors import UserError

LISTED = 8  # damaged rows that an error message names


def read(
    section: DataSection,
    tokenizer: Any,
    seed: int,
    progress: Progress = untold,
    whole: bool = False,
    local_only: str = "",
    preferences: bool = False,
) -> dict[str, Examples]:
    """The examples of "train", "valid" and, where there is one, "test".

    tokenizer: with the chat template that is used; whole: a single file counts whole, as "train", and nothing is held
    out; local_only and preferences: as `sources.files_by_split`. Raises UserError for whatever is wrong with the data.
    """
    mixture = section.mixture()
    if section.hub == "stream" and any(source.cap is None for source in mixture):
        raise UserError("data.hub=stream needs data.cap: how many rows to read", "Or set data.hub=download.")
    tokenized = _tokenized(section, Renderer(tokenizer, section), progress, local_only, preferences)
    splits = {split: Examples.of(own.stores, own.sources) for split, own in tokenized.splits.items()}
    if section.on_damage == "drop":
        splits = {split: _undamaged(examples) for split, examples in splits.items()}
    train = _without_duplicates(splits["train"], section)
    train = _within_caps(train, mixture, seed)
    if section.on_damage == "error":  # of whole files, before rows are held out: as many as `mlxtune data check` counts
        for examples in (train, *(splits[split] for split in splits if split != "train")):
            for number in range(len(examples.stores)):
                _refuse_damage(examples, number)
    left_out = train.left_out
    undivided = tokenized.undivided(len(mixture))
    if undivided and not whole:
        is_held_out = holdout.held_out(train, undivided, section, seed)
        held_out = replace(train.only_rows(is_held_out), left_out={})
        splits["valid"] = splits["valid"].followed_by(held_out) if "valid" in splits else held_out
        train = train.only_rows(~is_held_out)
    splits["train"] = replace(train, order=section.order, left_out=left_out, unused=tokenized.unused)
    weights = _weights(mixture)
    for split, examples in splits.items():
        files = [store.facts.file for store in train.stores] if split != "train" else []
        examples = replace(examples, weights=weights, told_elsewhere=frozenset(files))
        _check(split, examples)
        splits[split] = examples
    return splits


@dataclass
class _Split:
    """The tokenized files of one split."""

    stores: list[Store] = field(default_factory=list)  # one for each file
    sources: list[int] = field(default_factory=list)  # the number of the source that each of them is of


@dataclass
class _Tokenized:
    """All tokenized files of a mixture."""

    splits: dict[str, _Split] = field(default_factory=dict)  # by name; there is always "train"
    unused: list[str] = field(default_factory=list)  # notes on files beside the splits that nothing reads

    def undivided(self, sources: int) -> list[int]:
        """The sources, of so many, that have no validation rows of their own."""
        divided = self.splits["valid"].sources if "valid" in self.splits else []
        return [number for number in range(sources) if number not in divided]


def _tokenized(
    section: DataSection, renderer: Renderer, progress: Progress, local_only: str, preferences: bool
) -> _Tokenized:
    found = _Tokenized()
    for number, source in enumerate(section.mixture()):
        by_split = files_by_split(source, section.hub == "stream", local_only, preferences)
        note = unused_note(source, by_split)
        if note:
            found.unused.append(note)
        for split, files in by_split.items():
            own = found.splits.setdefault(split, _Split())
            for file in files:
                own.stores.append(_store_of(file, renderer, progress))
                own.sources.append(number)
    return found


def _store_of(file: Source, renderer: Renderer, progress: Progress) -> Store:
    """The examples of one file. Raises UserError when there are none."""
    store = row_cache.store_of(file, renderer, progress)
    if len(store):
        return store
    facts = store.facts
    reasons = ", ".join(facts.counts)
    first = next(iter(facts.dropped.values()))[0]
    raise UserError(
        f"{file.name}: none of {facts.rows} rows can be used; {place(file.name, first)}: {reasons}",
        "`mlxtune data show` prints what the model would see.",
    )


def _weights(mixture: list[SourceSection]) -> list[float]:
    """The weight of each source, 1 where it has none; none at all where no source has one."""
    if not any(source.weight for source in mixture):
        return []
    return [source.weight or 1.0 for source in mixture]


def _undamaged(examples: Examples) -> Examples:
    """Without the rows that the template damages, whole: which turns share an example is no reason to keep one."""
    damaged = examples.of_rows("flags") & DAMAGED > 0
    return _without(examples, damaged, "damaged by the chat template")


def _without_duplicates(train: Examples, section: DataSection) -> Examples:
    """Of equal rows the first stays; with data.dedup=near of nearly equal ones too."""
    if section.dedup == "none":
        return train
    hashes = train.of_rows("hash")
    is_first = np.zeros(train.rows, bool)
    is_first[np.unique(hashes, return_index=True)[1]] = True
    if section.dedup == "exact":
        return _without(train, ~is_first, "duplicates")
    signatures = [store.signature[_groups_left(train, number)] for number, store in enumerate(train.stores)]
    leader = duplicates.near(np.concatenate(signatures))
    return _without(train, ~(is_first & (hashes[leader] == hashes)), "equal or near duplicates")


def _groups_left(examples: Examples, number: int) -> np.ndarray:
    """[rows] the rows of one store that are among the examples, as the store numbers them."""
    return np.unique(examples.column("group")[examples.store_of_example == number])


def _within_caps(train: Examples, mixture: list[SourceSection], seed: int) -> Examples:
    """No more rows of a source than its cap: those that the seed chooses, by their content."""
    for number, source in enumerate(mixture):
        rows = np.flatnonzero(train.sources[train.firsts] == number)
        if source.cap is None or len(rows) <= source.cap:
            continue
        by_chance = np.argsort(holdout.seeded(train.of_rows("hash")[rows], seed + 1), kind="stable")
        beyond = np.zeros(train.rows, bool)
        beyond[rows[by_chance[source.cap :]]] = True
        train = _without(train, beyond, f"beyond the cap of {source.cap} of {Path(source.path).name}")
    return train


def _without(examples: Examples, gone: np.ndarray, reason: str) -> Examples:
    """The other rows, and why these are not among them. gone: [R] bool."""
    if not gone.any():
        return examples
    left_out = {**examples.left_out, reason: f"{int(gone.sum())} rows"}
    return replace(examples.only_rows(~gone), left_out=left_out)


def _check(split: str, examples: Examples) -> None:
    """Raise UserError when no row is left, or none of a source that has a weight."""
    if not len(examples):
        reasons = {reason for store in examples.stores for reason in (*store.facts.counts, *examples.left_out)}
        raise UserError(
            f"{examples.stores[0].facts.file}: no {split} row is left ({', '.join(sorted(reasons))})",
            "Mend the rows, or raise data.valid_fraction." if split == "valid" else "Mend the rows.",
        )
    without_rows = ~np.isin(examples.source_of_store, examples.sources)
    if examples.weights and split == "train" and without_rows.any():
        raise UserError(
            f"{examples.stores[int(without_rows.argmax())].facts.file}: no row is left to draw with its weight",
            "Mend its rows, or take the source out of data.sources.",
        )


def _refuse_damage(examples: Examples, number: int) -> None:
    """Raise UserError when the template damages rows of one store, those of which no example is left counted once."""
    facts = examples.stores[number].facts
    damaged = examples.column("flags") & DAMAGED > 0
    count = facts.lost + len(np.unique(examples.row_of[damaged & (examples.store_of_example == number)]))
    if not count:
        return
    listed = "; ".join(f"{where}: {text}" for where, text in facts.damaged[:LISTED])
    more = f"; and {count - LISTED} more" if count > LISTED else ""
    raise UserError(
        f"{facts.file}: the chat template damages {count} of {facts.rows} rows: {listed}{more}",
        "Mend the rows, or set data.on_damage=drop or keep; `mlxtune data show` prints them.",
    )
