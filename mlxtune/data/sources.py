"""Data paths -> the files of each split, or the splits of a hub dataset, as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from mlxtune.data import duplicates, records, store
from mlxtune.data.files import SUFFIXES, Bad, kind_of
from mlxtune.data.records import Record
from mlxtune.data.template import use
from mlxtune.errors import UserError
from mlxtune.sections import DataSection

SPLITS = ("train", "valid", "test")
LISTED = 8  # damaged rows that an error message names
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Source:
    """One file's rows, or one split of a hub dataset. digest: of its bytes; "" where they are not at hand."""

    name: str
    read: Callable[[], Iterator[Record | Bad]]
    digest: Callable[[], str] = lambda: ""


def glance(section: DataSection, whole: bool = False) -> None:
    """Raise UserError when a source is missing or its first row has no known format; whole: when any row is bad."""
    if not section.path and not section.sources:
        raise UserError("no data given", "Name a folder or file: --data PATH (or data.path in the configuration).")
    for source in section.mixture():
        own = section.model_copy(update={"columns": {**section.columns, **source.columns}})
        for found in chain.from_iterable(find(source.path, own, source.cap).values()):
            rows = found.read()
            first = next(rows, None)
            if whole:
                good_or_bad = [isinstance(row, Bad) and row for row in chain([first], rows)]
                records.require_good([row for row in good_or_bad if row], len(good_or_bad))


def with_template(rows: Iterator[Record | Bad], tokenizer: Any, folder: Path, template: str) -> Iterator[Record | Bad]:
    """The same rows; the template is chosen, or its absence said, when the first conversation comes."""
    chosen = False
    for row in rows:
        if not chosen and (template or (isinstance(row, Record) and row.text is None)):
            use(tokenizer, folder, template)
            chosen = True
        yield row


def find(path: str, section: DataSection, cap: int | None = None) -> dict[str, list[Source]]:
    """The files of each split of a folder with train, valid and test files, one file ("train"), or a hub dataset."""
    here = Path(path).expanduser()
    if here.is_dir():
        found = {split: _split_files(here, split) for split in SPLITS}
        if not found["train"]:
            raise UserError(f"{here} has no train file", f"Expected train{'|'.join(SUFFIXES)}.")
        return {split: _of_files(files, section) for split, files in found.items() if files}
    if here.is_file() or kind_of(here) or path.count("/") != 1 or path[0] in "./~":
        if not here.is_file():
            raise UserError(f"no data file or folder {path}")
        return {"train": _of_files([here], section)}
    return _from_hub(path, section, cap)


def _of_files(files: list[Path], section: DataSection) -> list[Source]:
    return [
        Source(str(file), partial(records.read, file, section.columns), partial(store.file_digest, file))
        for file in files
    ]


def _split_files(folder: Path, split: str) -> list[Path]:
    """train.jsonl, or the shards of one split: train-00000-of-00002.parquet and its like."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and kind_of(path))
    names = [split, "validation"] if split == "valid" else [split]
    whole = [path for path in files if path.name.partition(".")[0] in names]
    shards = [path for path in files if path.name.startswith(tuple(f"{name}-" for name in names))]
    if len(whole) > 1 or (whole and shards):
        raise UserError(f"{folder} has both {whole[0].name} and {[*whole[1:], *shards][0].name}", "Keep one of them.")
    return whole or shards


def _from_hub(name: str, section: DataSection, cap: int | None) -> dict[str, list[Source]]:
    """A dataset of the hub, through `datasets`, its rows parsed like any other; NAME:SUBSET where it has several."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    datasets.disable_progress_bars()
    repo, _, subset = name.partition(":")
    try:
        loaded = datasets.load_dataset(repo, subset or None, streaming=section.hub == "stream")
    except (
        datasets.exceptions.DatasetNotFoundError,
        FileNotFoundError,
        ConnectionError,
        HfHubHTTPError,
        ValueError,
    ) as error:
        raise UserError(
            f"{name} is neither a local path nor a hub dataset that can be loaded ({str(error).splitlines()[0]})",
            "Check the name and the network; gated data needs `hf auth login`.",
        ) from error
    named = {"validation": "valid"}
    out = {
        named.get(split, split): [_of_hub(f"{name}:{split}", rows, section, cap)]
        for split, rows in loaded.items()
        if named.get(split, split) in SPLITS
    }
    if "train" not in out:
        raise UserError(f"{name} has no train split", f"It has: {', '.join(loaded)}.")
    return out


def _of_hub(name: str, rows: Any, section: DataSection, cap: int | None) -> Source:
    def read_rows() -> Iterator[Record | Bad]:
        chosen = islice(rows, cap) if section.hub == "stream" else rows
        return records.parse(name, enumerate(chosen, 1), section.columns)

    return Source(name, read_rows, lambda: "" if section.hub == "stream" else f"{name}{rows._fingerprint}")


def rows_of(path: str, section: DataSection, seed: int, split: str | None, default: str) -> Iterator[Record | Bad]:
    """The rows of one split, as they stand in the files. Where none is named, a single file counts whole and a folder's
    `default` is taken. Raises UserError naming the splits there are.
    """
    found = find(path, section)

    def rows(name: str) -> Iterator[Record | Bad]:
        return chain.from_iterable(source.read() for source in found[name])

    wanted = split or default
    if (split is None and Path(path).expanduser().is_file()) or (wanted == "train" and "valid" in found):
        return rows("train")
    if wanted in found and wanted != "train":
        return rows(wanted)
    if wanted == "test":
        raise UserError(f"{path} has no test split", f"It has: {', '.join(dict.fromkeys([*found, 'valid']))}.")
    # Held out by the hash of each row, as for training.
    hashes = [duplicates.content_hash(row) for row in rows("train") if isinstance(row, Record)]
    limit = duplicates.threshold(np.array(hashes, np.uint64), section.valid_fraction, seed)
    held = iter((duplicates.seeded(hashes, seed) <= (-1 if limit is None else limit)).tolist())
    return (row for row in rows("train") if isinstance(row, Bad) or next(held) == (wanted == "valid"))
