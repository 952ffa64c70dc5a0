"""Data paths -> the files of each split, or the splits of a hub dataset, as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from mlxtune_convert.files import digest

from mlxtune.config.schema import DataSection, SourceSection
from mlxtune.data.dataset import duplicates
from mlxtune.data.rows import arrow, formats
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.readers import SUFFIXES, Bad, Rows, kind_of
from mlxtune.data.template.choice import use
from mlxtune.errors import UserError

SPLITS = {  # as named by others -> by us
    "train": "train",
    **dict.fromkeys(("valid", "validation", "val", "dev", "eval"), "valid"),
    "test": "test",
}
ABOUT = ("dataset_info", "dataset_infos", "dataset_dict", "state")  # .json files that `datasets` writes beside its data
BATCH = 1024  # rows that are taken out of a hub dataset at once


@dataclass(frozen=True)
class Source:
    """One file's rows, or one split of a hub dataset. digest: of its bytes and the names of its columns; "" where they
    are not at hand. beside: of a folder's or dataset's train rows, the data files or splits there that nothing uses.
    """

    name: str
    read: Callable[[], Iterator[Record | Bad]]
    digest: Callable[[], str]
    beside: tuple[str, ...] = ()


def glance(section: DataSection, whole: bool = False, local_only: str = "") -> None:
    """Raise UserError when a source is missing or its first row has no known format; whole: when any row is bad.
    local_only: as `find`.
    """
    if not section.path and not section.sources:
        raise UserError("no data given", "Name a folder or file: --data PATH (or data.path in the configuration).")
    for source in section.mixture():
        for found in chain.from_iterable(find(source, section.hub == "stream", local_only).values()):
            if whole:
                bad = [row if isinstance(row, Bad) else None for row in found.read()]
                formats.require_good([row for row in bad if row], len(bad))
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


def is_hub_id(path: str) -> bool:
    """Whether a source is a dataset of the hub: nothing here has that name, and it looks like OWNER/NAME."""
    here = Path(path).expanduser()
    return path.count("/") == 1 and path[0] not in "./~" and not kind_of(here) and not here.exists()


def find(source: SourceSection, stream: bool = False, local_only: str = "") -> dict[str, list[Source]]:
    """The files of each split of a folder with train, valid and test files, one file ("train"), or a hub dataset.

    stream: read a hub dataset row by row, up to the source's cap; local_only: not "": the hub is not asked, and this is
    the hint where its local cache has no copy.
    """
    here = Path(source.path).expanduser()
    if is_hub_id(source.path):
        return _from_hub(source, stream, local_only)
    if here.is_dir():
        return _of_folder(here, source)
    if not here.is_file():
        raise UserError(f"no data file or folder {source.path}")
    return {"train": [_of_file(here, source)]}


def _of_file(file: Path, source: SourceSection) -> Source:
    def identity() -> str:
        return f"{digest(file, 'blake2b')}{source.columns}"

    return Source(str(file), lambda: formats.read(file, source.columns), identity)


def _of_folder(folder: Path, source: SourceSection) -> dict[str, list[Source]]:
    files = _data_files(folder)
    found = {split: _split_files(folder, files, split) for split in dict.fromkeys(SPLITS.values())}
    if not found["train"]:
        inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and _named(_data_files(path), "train")]
        there = f" Its folder {inner[0].name} holds one: name {inner[0]}." if inner else ""
        raise UserError(f"{folder} has no train file", f"Expected train{'|'.join(SUFFIXES)}.{there}")
    used = {path for own in found.values() for path in own}
    beside = tuple(path.name for path in files if path not in used)
    out = {split: [_of_file(file, source) for file in own] for split, own in found.items() if own}
    out["train"][0] = replace(out["train"][0], beside=beside)
    return out


def unused(found: dict[str, list[Source]]) -> tuple[str, ...]:
    """The data files, or splits of a hub dataset, that stand beside what `find` found and that nothing reads."""
    return found["train"][0].beside


def unused_note(source: SourceSection, found: dict[str, list[Source]]) -> str:
    """What to tell a person of them; "" when there are none."""
    names = unused(found)
    read = f"read are {', '.join(SPLITS)}"
    return f"{source.path}: not used: {', '.join(names)} ({read})" if names else ""


def _data_files(folder: Path) -> list[Path]:
    files = (path for path in folder.iterdir() if path.is_file() and kind_of(path) and path.name[0] != ".")
    return sorted(path for path in files if path.name.partition(".")[0] not in ABOUT)


def _named(files: list[Path], name: str) -> list[Path]:
    """train.jsonl, or the shards of one split: train-00000-of-00002.parquet and its like."""
    return [path for path in files if path.name.partition(".")[0] == name or path.name.startswith(f"{name}-")]


def _split_files(folder: Path, files: list[Path], split: str) -> list[Path]:
    """One whole file, or the shards of one name. Raises UserError when there are several candidates."""
    candidates = [_named(files, name) for name, ours in SPLITS.items() if ours == split]
    found = [own for own in candidates if own]
    whole = [path for own in found for path in own if path.name.partition(".")[0] in SPLITS]
    if len(found) > 1 or (whole and len(found[0]) > 1):
        first = whole[0] if whole else found[0][0]
        other = next(path for own in found for path in own if path != first and (whole or path not in found[0]))
        raise UserError(f"{folder} has both {first.name} and {other.name}", "Keep one of them.")
    return found[0] if found else []


def _from_hub(source: SourceSection, stream: bool, local_only: str) -> dict[str, list[Source]]:
    """A dataset of the hub, through `datasets`, its rows parsed like any other; NAME:SUBSET where it has several."""
    loaded = _cached(source, stream, local_only) if local_only else _loaded(source, stream)

    def split_of(split: str, rows: Any) -> Source:
        name = f"{source.path}:{split}"

        def read() -> Iterator[Record | Bad]:
            found = _hub_rows(name, rows, min(BATCH, source.cap or BATCH))
            return formats.parse(name, islice(found, source.cap) if stream else found, source.columns)

        return Source(name, read, lambda: "" if stream else f"{name}{rows._fingerprint}{source.columns}")

    named: dict[str, list[str]] = {}  # split as we name it -> as the dataset does
    for split in loaded:
        named.setdefault(SPLITS.get(split, ""), []).append(split)
    beside = tuple(named.pop("", []))
    for own in named.values():
        if len(own) > 1:
            raise UserError(
                f"{source.path} has both {own[0]} and {own[1]}: two splits for one use",
                "Save the splits to use as files train and valid in a folder, and name that folder.",
            )
    if "train" not in named:
        raise UserError(f"{source.path} has no train split", f"It has: {', '.join(loaded)}.")
    out = {ours: [split_of(own[0], loaded[own[0]])] for ours, own in named.items()}
    out["train"][0] = replace(out["train"][0], beside=beside)
    return out


def _loaded(source: SourceSection, stream: bool) -> Any:
    """Split -> rows of a hub dataset, fetched."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    datasets.disable_progress_bars()
    repo, _, subset = source.path.partition(":")
    missing = (datasets.exceptions.DatasetNotFoundError, FileNotFoundError, ConnectionError, HfHubHTTPError, ValueError)
    try:
        return datasets.load_dataset(repo, subset or None, streaming=stream)
    except missing as error:
        raise UserError(
            f"{source.path} is neither a local path nor a hub dataset that can be loaded "
            f"({str(error).splitlines()[0]})",
            "Check the name and the network; gated data needs `hf auth login`.",
        ) from error


def _cached(source: SourceSection, stream: bool, hint: str) -> Any:
    """The same from the local cache of `datasets` alone. Raises UserError with the hint where it has no copy."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    datasets.logging.set_verbosity_error()  # it would tell where it found the copy
    repo, _, subset = source.path.partition(":")
    name = repo.partition("/")[2]
    if stream:
        raise UserError(f"{source.path} is a dataset that only the run names, streamed from the hub (data.hub)", hint)
    try:
        # What load_dataset makes of the name when it is offline.
        found = Cache(repo_id=repo, dataset_name=name, config_name=subset or None, version="auto", hash="auto")
        return found.as_dataset()
    except (ValueError, OSError, KeyError, TypeError) as error:  # it has none, several, or a torn one
        raise UserError(
            f"{source.path}, a dataset of the hub that only the run names, is not in the local cache", hint
        ) from error


def _hub_rows(name: str, rows: Any, at_once: int) -> Rows:
    """The rows of one split, read as those of a Parquet file are."""
    number = 0
    for table in rows.with_format("arrow").iter(at_once):
        yield from arrow.rows(name, table, number)
        number += len(table)


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
