"""Data paths -> the files of each split, or the splits of a hub dataset, as rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from mlxtune.data import duplicates, records
from mlxtune.data.files import SUFFIXES, Bad, kind_of
from mlxtune.data.records import Record
from mlxtune.data.template import use
from mlxtune.errors import UserError
from mlxtune.sections import DataSection, SourceSection

SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "test": "test"}  # as named by others -> by us


@dataclass(frozen=True)
class Source:
    """One file's rows, or one split of a hub dataset. digest: of its bytes and the names of its columns; "" where they
    are not at hand.
    """

    name: str
    read: Callable[[], Iterator[Record | Bad]]
    digest: Callable[[], str]


def glance(section: DataSection, whole: bool = False) -> None:
    """Raise UserError when a source is missing or its first row has no known format; whole: when any row is bad."""
    if not section.path and not section.sources:
        raise UserError("no data given", "Name a folder or file: --data PATH (or data.path in the configuration).")
    for source in section.mixture():
        for found in chain.from_iterable(find(source, section.hub == "stream").values()):
            if whole:
                bad = [row if isinstance(row, Bad) else None for row in found.read()]
                records.require_good([row for row in bad if row], len(bad))
            else:
                next(found.read(), None)


def with_template(rows: Iterator[Record | Bad], tokenizer: Any, folder: Path, template: str) -> Iterator[Record | Bad]:
    """The same rows; the template is chosen, or its absence said, when the first conversation comes."""
    chosen = False
    for row in rows:
        if not chosen and (template or (isinstance(row, Record) and row.text is None)):
            use(tokenizer, folder, template)
            chosen = True
        yield row


def find(source: SourceSection, stream: bool = False) -> dict[str, list[Source]]:
    """The files of each split of a folder with train, valid and test files, one file ("train"), or a hub dataset.

    stream: read a hub dataset row by row, up to the source's cap.
    """
    path, here = source.path, Path(source.path).expanduser()
    if here.is_dir():
        found = {split: _split_files(here, split) for split in dict.fromkeys(SPLITS.values())}
        if not found["train"]:
            raise UserError(f"{here} has no train file", f"Expected train{'|'.join(SUFFIXES)}.")
        return {split: [_of_file(file, source) for file in files] for split, files in found.items() if files}
    if here.is_file() or kind_of(here) or path.count("/") != 1 or path[0] in "./~":
        if not here.is_file():
            raise UserError(f"no data file or folder {path}")
        return {"train": [_of_file(here, source)]}
    return _from_hub(source, stream)


def _of_file(file: Path, source: SourceSection) -> Source:
    def digest() -> str:
        with file.open("rb") as opened:
            return f"{hashlib.file_digest(opened, 'blake2b').hexdigest()}{source.columns}"

    return Source(str(file), lambda: records.read(file, source.columns), digest)


def _split_files(folder: Path, split: str) -> list[Path]:
    """train.jsonl, or the shards of one split: train-00000-of-00002.parquet and its like."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and kind_of(path))
    names = [name for name, ours in SPLITS.items() if ours == split]
    whole = [path for path in files if path.name.partition(".")[0] in names]
    shards = [path for path in files if path.name.startswith(tuple(f"{name}-" for name in names))]
    if len(whole) > 1 or (whole and shards):
        raise UserError(f"{folder} has both {whole[0].name} and {[*whole[1:], *shards][0].name}", "Keep one of them.")
    return whole or shards


def _from_hub(source: SourceSection, stream: bool) -> dict[str, list[Source]]:
    """A dataset of the hub, through `datasets`, its rows parsed like any other; NAME:SUBSET where it has several."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    datasets.disable_progress_bars()
    repo, _, subset = source.path.partition(":")
    missing = (datasets.exceptions.DatasetNotFoundError, FileNotFoundError, ConnectionError, HfHubHTTPError, ValueError)
    try:
        loaded = datasets.load_dataset(repo, subset or None, streaming=stream)
    except missing as error:
        raise UserError(
            f"{source.path} is neither a local path nor a hub dataset that can be loaded "
            f"({str(error).splitlines()[0]})",
            "Check the name and the network; gated data needs `hf auth login`.",
        ) from error

    def split_of(split: str, rows: Any) -> Source:
        name = f"{source.path}:{split}"

        def read() -> Iterator[Record | Bad]:
            chosen = islice(rows, source.cap) if stream else rows
            return records.parse(name, enumerate(chosen, 1), source.columns)

        return Source(name, read, lambda: "" if stream else f"{name}{rows._fingerprint}{source.columns}")

    out = {SPLITS[split]: [split_of(split, rows)] for split, rows in loaded.items() if split in SPLITS}
    if "train" not in out:
        raise UserError(f"{source.path} has no train split", f"It has: {', '.join(loaded)}.")
    return out


def rows_of(
    section: DataSection, seed: int, split: str | None, good: Callable[[Source], np.ndarray]
) -> Iterator[Record | Bad]:
    """The rows of one split, as they stand in the files; of train files as a whole where none is named. Raises
    UserError naming the splits there are.

    good: the content hashes of a file's rows that give examples. Rows are held out among these, as for training; a row
    that gives none is on the side where its hash puts it.
    """
    (source,) = section.mixture()
    found = find(source, section.hub == "stream")

    def rows(name: str) -> Iterator[Record | Bad]:
        return chain.from_iterable(one.read() for one in found[name])

    wanted = split or "train"
    if wanted in found and (split is None or wanted != "train" or "valid" in found):
        return rows(wanted)
    if wanted == "test":
        raise UserError(f"{source.path} has no test split", f"It has: {', '.join(dict.fromkeys([*found, 'valid']))}.")
    limit = duplicates.threshold(np.concatenate([good(one) for one in found["train"]]), section.valid_fraction, seed)

    def held_out(row: Record) -> bool:
        own = duplicates.seeded([duplicates.content_hash(row)], seed)
        return limit is not None and int(own[0]) <= limit

    return (row for row in rows("train") if isinstance(row, Bad) or held_out(row) == (wanted == "valid"))
