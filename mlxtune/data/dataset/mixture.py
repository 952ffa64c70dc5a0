"""One source or several -> the examples of each split: tokenized, held out, deduplicated, capped, mixed, counted.

All of it chooses among rows and counts rows: the examples of one row stay together, however many they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxtune.config.schema import DataSection, SourceSection
from mlxtune.data.chat.renderer import Renderer
from mlxtune.data.dataset import duplicates, row_cache
from mlxtune.data.dataset.examples import Examples
from mlxtune.data.dataset.row_cache import DAMAGED, Store
from mlxtune.data.dataset.sources import Source, find, unused_note, with_template
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.readers import Bad, place
from mlxtune.data.template.choice import use
from mlxtune.errors import UserError

LISTED = 8  # damaged rows that an error message names
Progress = Callable[[str, int], None]


def read(
    section: DataSection,
    tokenizer: Any,
    folder: Path,
    seed: int,
    progress: Progress = lambda source, rows: None,
    whole: bool = False,
    local_only: str = "",
) -> dict[str, Examples]:
    """The examples of "train", "valid" and, where there is one, "test".

    folder: where the tokenizer is from, for messages; whole: a single file counts whole, as "train", and nothing is
    held out; local_only: as `sources.find`. Raises UserError for anything that is wrong with the data.
    """
    mixture = section.mixture()
    if section.hub == "stream" and any(source.cap is None for source in mixture):
        raise UserError("data.hub=stream needs data.cap: how many rows to read", "Or set data.hub=download.")
    if section.template:
        use(tokenizer, folder, section.template)
    renderer = Renderer(tokenizer, section)
    stores: dict[str, list[tuple[Store, int]]] = {}
    unused: list[str] = []
    for number, source in enumerate(mixture):
        by_split = find(source, section.hub == "stream", local_only)
        unused += [note] if (note := unused_note(source, by_split)) else []
        for split, files in by_split.items():
            stores.setdefault(split, []).extend((_stored(one, renderer, folder, progress), number) for one in files)
    splits = {split: Examples.of([made for made, _ in own], [at for _, at in own]) for split, own in stores.items()}
    if section.on_damage == "drop":
        splits = {split: _undamaged(found) for split, found in splits.items()}
    # Damaged rows and duplicates go, and caps apply, before rows are held out: no side keeps what the other one has,
    # and what is held out can be used.
    train = _thinned(splits["train"], section, mixture, seed)
    left_out = train.left_out
    undivided = set(range(len(mixture))) - {number for _, number in stores.get("valid", [])}
    if undivided and not whole:
        held = _held_out(train, sorted(undivided), section, seed)
        given = [splits["valid"]] if "valid" in splits else []
        splits["valid"] = _joined([*given, replace(train.only_rows(held), left_out={})])
        train = train.only_rows(~held)
    weights = [source.weight or 1.0 for source in mixture] if any(source.weight for source in mixture) else []
    splits["train"] = replace(train, order=section.order, left_out=left_out, unused=unused)
    for split, found in splits.items():
        told = [made.facts["file"] for made in train.stores] if split != "train" else []
        splits[split] = _checked(split, replace(found, weights=weights, known=frozenset(told)), section)
    return splits


def _store_of(source: Source, renderer: Renderer, folder: Path, progress: Progress) -> Store:
    def rows() -> Iterator[Record | Bad]:
        return with_template(source.read(), renderer.tokenizer, folder, renderer.section.template)

    return row_cache.of(source.name, rows, source.digest(), renderer, progress)


def _stored(source: Source, renderer: Renderer, folder: Path, progress: Progress) -> Store:
    """The examples of one file. Raises UserError when there are none."""
    made = _store_of(source, renderer, folder, progress)
    if not len(made):
        reasons = ", ".join(made.facts["counts"])
        first = next(iter(made.facts["dropped"].values()))[0]
        raise UserError(
            f"{source.name}: none of {made.facts['rows']} rows can be used; {place(source.name, first)}: {reasons}",
            "`mlxtune data show` prints what the model would see.",
        )
    return made


def _undamaged(examples: Examples) -> Examples:
    """Without the rows that the template damages, whole: which turns share an example is no reason to keep one."""
    damaged = examples.column("flags")[examples.firsts] & DAMAGED > 0
    if not damaged.any():
        return examples
    left_out = {**examples.left_out, "damaged by the chat template": f"{int(damaged.sum())} rows"}
    return replace(examples.only_rows(~damaged), left_out=left_out)


def _thinned(train: Examples, section: DataSection, mixture: list[SourceSection], seed: int) -> Examples:
    """Training rows without duplicates and beyond the caps."""
    left = dict(train.left_out)
    if section.dedup != "none":
        hashes = train.column("hash")[train.firsts]
        kept = np.zeros(train.rows, bool)
        kept[np.unique(hashes, return_index=True)[1]] = True
        if section.dedup == "near":
            parts = [made.signature[_groups(train, number)] for number, made in enumerate(train.stores)]
            leader = duplicates.near(np.concatenate(parts))
            kept &= hashes[leader] == hashes
        if not kept.all():
            reason = "duplicates" if section.dedup == "exact" else "equal or near duplicates"
            left[reason] = f"{int((~kept).sum())} rows"
        train = train.only_rows(kept)
    for number, source in enumerate(mixture):
        places = np.flatnonzero(train.sources[train.firsts] == number)  # of its rows
        if source.cap is not None and source.cap < len(places):
            hashes = train.column("hash")[train.firsts[places]]
            beyond = places[np.argsort(duplicates.seeded(hashes, seed + 1), kind="stable")[source.cap :]]
            left[f"beyond the cap of {source.cap} of {Path(source.path).name}"] = f"{len(beyond)} rows"
            kept = np.ones(train.rows, bool)
            kept[beyond] = False
            train = train.only_rows(kept)
    return replace(train, left_out=left)


def _groups(examples: Examples, number: int) -> np.ndarray:
    """The rows of one store that are left, as the store numbers them."""
    return np.unique(examples.column("group")[examples.which == number])


def _held_out(train: Examples, sources: list[int], section: DataSection, seed: int) -> np.ndarray:
    """[R] whether a row of the sources, which have no valid file, is held out. One limit for all of them, so that equal
    rows of two sources are on one side.
    """
    own, hashes = np.isin(train.sources[train.firsts], sources), train.column("hash")[train.firsts]
    limit = duplicates.threshold(hashes[own], section.valid_fraction, seed)
    if limit is None:
        stores = [made for made, source in zip(train.stores, train.source, strict=True) if source in sources]
        reasons = dict.fromkeys(reason for made in stores for reason in made.facts["counts"])
        lost = "; ".join([f"dropped: {reason}" for reason in reasons] + [f"left out: {why}" for why in train.left_out])
        raise UserError(
            f"{stores[0].facts['file']}: fewer than two different rows, too few to hold any out"
            + (f" ({lost})" if lost else ""),
            f"{'Mend these rows, add' if lost else 'Add'} rows, or a valid file beside the train file.",
        )
    return own & (duplicates.seeded(hashes, seed) <= limit)


def hashes_of(source: Source, renderer: Renderer, folder: Path, progress: Progress) -> np.ndarray:
    """The content hashes of a file's rows among which training holds some out: those that give examples. They are
    tokenized and kept as for training, for no less tells which they are; of a file that training refuses, all that can
    be read.
    """
    known = [None if isinstance(row, Bad) else duplicates.content_hash(row) for row in source.read()]
    if None not in known and len(made := _store_of(source, renderer, folder, progress)):
        return made.columns["hash"]
    return np.array([value for value in known if value is not None], np.uint64)


def _joined(parts: list[Examples]) -> Examples:
    """Some examples, and then others; what was left out of the first of them."""
    before = np.cumsum([0, *(len(part.stores) for part in parts)], dtype=np.int32)
    return Examples(
        [made for part in parts for made in part.stores],
        np.concatenate([part.which + start for part, start in zip(parts, before, strict=False)]),
        np.concatenate([part.where for part in parts]),
        np.concatenate([part.source for part in parts]),
        left_out=parts[0].left_out,
    )


def _checked(split: str, examples: Examples, section: DataSection) -> Examples:
    """The examples of one split as they are. Raises UserError when the template damages some and data.on_damage is
    error, when none is left, or none of a source that has a weight.
    """
    damaged = examples.column("flags") & DAMAGED > 0
    for number, made in enumerate(examples.stores):
        facts = made.facts
        count = len(np.unique(examples.row_of[damaged & (examples.which == number)]))
        count += 0 if facts["file"] in examples.known else facts["lost"]
        if count and section.on_damage == "error":
            listed = "; ".join(f"{where}: {text}" for where, text in facts["damaged"][:LISTED])
            more = f"; and {count - LISTED} more" if count > LISTED else ""
            raise UserError(
                f"{facts['file']}: the chat template damages {count} of {facts['rows']} rows: {listed}{more}",
                "Mend the rows, or set data.on_damage=drop or keep; `mlxtune data show` prints them.",
            )
    if not len(examples):
        reasons = {reason for made in examples.stores for reason in (*made.facts["counts"], *examples.left_out)}
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
