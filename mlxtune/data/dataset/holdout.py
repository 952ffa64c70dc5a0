"""Which rows are held out of training, to validate on: decided by the content of a row and the seed alone.

The content of each row is a 64-bit number, which the seed turns into another one. Rows whose number is at most a limit
are held out; the limit is chosen so that a share `data.valid_fraction` of the different rows is. For four different
rows, one of them twice, and a share of a half:

    content   q1    q2    q3    q4    q1 again
    number    70    20    90    40    70            so the limit is 40: q2 and q4 are held out

Equal rows so are on one side, in whatever order or file they stand and whatever tokenizer reads them; of rows that say
which answer is preferred, all with the same prompt. A split that the data names is never divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from mlxtune.config.schema import DataSection
from mlxtune.data.chat.renderer import Renderer
from mlxtune.data.dataset import duplicates, row_cache
from mlxtune.data.dataset.examples import Examples
from mlxtune.data.dataset.sources import Source, files_by_split
from mlxtune.data.dataset.store_writing import Progress
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.readers import Bad
from mlxtune.errors import UserError, did_you_mean
from mlxtune.splitmix import GOLDEN, scrambled


def seeded(hashes: np.ndarray | list[int], seed: int) -> np.ndarray:
    """[N] uint64: a permutation of all 64-bit numbers that the seed chooses, so equal rows stay equal. hashes: [N]."""
    return scrambled(np.asarray(hashes, np.uint64) ^ np.uint64((seed + 1) * GOLDEN & 0xFFFFFFFFFFFFFFFF))


def limit(hashes: np.ndarray, fraction: float, seed: int) -> int | None:
    """The seeded number up to which rows are held out: a share `fraction` of the different rows, at least one and not
    all. None when there are fewer than two different rows. hashes: [N], of their content.
    """
    different = np.unique(seeded(hashes, seed))
    count = max(1, round(len(different) * fraction))
    count = min(count, len(different) - 1)
    if count < 1:
        return None
    return int(different[count - 1])


def held_out(train: Examples, sources: list[int], section: DataSection, seed: int) -> np.ndarray:
    """[R] whether a row of the sources, which have no valid file, is held out. One limit for all of them, so that equal
    rows of two sources are on one side. Raises UserError where they have fewer than two different rows.
    """
    of_sources = np.isin(train.sources[train.firsts], sources)
    hashes = train.of_rows("asked")
    highest = limit(hashes[of_sources], section.valid_fraction, seed)
    if highest is None:
        raise _too_few(train, sources)
    return of_sources & (seeded(hashes, seed) <= highest)


def _too_few(train: Examples, sources: list[int]) -> UserError:
    stores = [store for store, source in zip(train.stores, train.source_of_store, strict=True) if source in sources]
    reasons = dict.fromkeys(f"dropped: {reason}" for store in stores for reason in store.facts.counts)
    lost = "; ".join([*reasons, *(f"left out: {why}" for why in train.left_out)])
    rows = "prompts" if train.have_sides else "rows"  # all answers to one prompt are held out together
    what = f"{stores[0].facts.file}: fewer than two different {rows}, too few to hold any out"
    or_else = "rows, or a valid file beside the train file."
    if lost:
        return UserError(f"{what} ({lost})", f"Mend these rows, add {or_else}")
    return UserError(what, f"Add {or_else}")


def is_whole_file(path: str, split: str | None) -> bool:
    """Whether data that a user names to compare on is taken whole: one file, of which no split is asked for."""
    return split is None and Path(path).expanduser().is_file()


def rows_of_split(
    section: DataSection,
    seed: int,
    split: str | None,
    renderer: Renderer,
    progress: Progress,
    preferences: bool = False,
) -> Iterator[Record | Bad]:
    """The rows of one split of one source, as they stand in the files; of train files as a whole where none is named.

    Rows are held out among those that give examples, as for training; a row that gives none is on the side where its
    content puts it. preferences: as `formats.read`. Raises UserError naming the splits there are.
    """
    (source,) = section.mixture()
    found = files_by_split(source, section.hub == "stream", preferences=preferences)
    if split is None:
        return _all_rows(found["train"])
    if split in found and (split != "train" or "valid" in found):
        return _all_rows(found[split])
    if split not in ("train", "valid"):
        there_are = dict.fromkeys([*found, "valid"])
        raise UserError(f"{source.path} has no split {split!r}", did_you_mean(split, there_are, "It has"))
    hashes = np.concatenate([_usable_hashes(file, renderer, progress) for file in found["train"]])
    highest = limit(hashes, section.valid_fraction, seed)
    return _one_side(_all_rows(found["train"]), highest, seed, held_out=split == "valid")


def _all_rows(files: list[Source]) -> Iterator[Record | Bad]:
    return chain.from_iterable(file.read() for file in files)


def _one_side(rows: Iterator[Record | Bad], highest: int | None, seed: int, held_out: bool) -> Iterator[Record | Bad]:
    """The rows that are held out, or the others; rows that cannot be read are on both sides."""
    for row in rows:
        if isinstance(row, Bad):
            yield row
            continue
        number = int(seeded([duplicates.asked_hash(row)], seed)[0])
        if (highest is not None and number <= highest) == held_out:
            yield row


def _usable_hashes(source: Source, renderer: Renderer, progress: Progress) -> np.ndarray:
    """[N] the contents of a file's rows among which training holds some out: those that give examples.

    They are tokenized and kept as for training, for no less tells which they are; of a file that training refuses, all
    that can be read.
    """
    readable: list[int] = []
    refused = False
    for row in source.read():
        if isinstance(row, Bad):
            refused = True
        else:
            readable.append(duplicates.asked_hash(row))
    if not refused:
        store = row_cache.store_of(source, renderer, progress)
        if len(store):
            hashes: np.ndarray = store.columns["asked"]
            return hashes
    return np.array(readable, np.uint64)
