"""Data paths -> the files of each split, or the splits of a hub dataset, as rows.

A folder with these files, for example:

    train-00000-of-00002.parquet, train-00001-of-00002.parquet    two shards: split "train"
    validation.jsonl                                              split "valid", as dev and val would be
    notes.jsonl                                                   beside them: nothing uses it, which is said
    dataset_info.json                                             about the data, not data
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mlxtune_convert.files import digest

from mlxtune.config.schema import DataSection, SourceSection
from mlxtune.data.dataset import hub_dataset
from mlxtune.data.rows import formats
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.readers import SUFFIXES, Bad, kind_of
from mlxtune.errors import UserError

SPLITS = {  # as named by others -> by us
    "train": "train",
    **dict.fromkeys(("valid", "validation", "val", "dev", "eval"), "valid"),
    "test": "test",
}
OF_PREFERENCES = "_prefs"  # behind the names of splits in datasets that have others to learn answers from
ABOUT = ("dataset_info", "dataset_infos", "dataset_dict", "state")  # .json files that `datasets` writes beside its data
BATCH = 1024  # rows that are taken out of a hub dataset at once


@dataclass(frozen=True)
class Source:
    """One file's rows, or one split of a hub dataset."""

    name: str  # path of the file, or OWNER/NAME:SPLIT
    read: Callable[[], Iterator[Record | Bad]]  # its rows, from the first one each time
    digest: Callable[[], str]  # of its bytes and how they are read; "" where they are not at hand
    beside: tuple[str, ...] = ()  # of the first train source: data files or splits beside it that nothing uses


def require_readable(
    section: DataSection, all_rows: bool = False, local_only: str = "", preferences: bool = False
) -> None:
    """Raise UserError when a source is missing or its first row has no known format; all_rows: when any row is bad.
    local_only and preferences: as `files_by_split`.
    """
    if not section.path and not section.sources:
        raise UserError("no data given", "Name a folder or file: --data PATH (or data.path in the configuration).")
    for source in section.mixture():
        for files in files_by_split(source, section.hub == "stream", local_only, preferences).values():
            for file in files:
                if all_rows:
                    _require_good(file)
                else:
                    next(file.read(), None)


def _require_good(file: Source) -> None:
    """Raise UserError when any of its rows is bad."""
    bad, count = [], 0
    for row in file.read():
        count += not formats.is_first_of_pair(row)
        if isinstance(row, Bad):
            bad.append(row)
    formats.require_good(bad, count)


def is_hub_id(path: str) -> bool:
    """Whether a source is a dataset of the hub: nothing here has that name, and it looks like OWNER/NAME."""
    here = Path(path).expanduser()
    return path.count("/") == 1 and path[0] not in "./~" and not kind_of(here) and not here.exists()


def files_by_split(
    source: SourceSection, stream: bool = False, local_only: str = "", preferences: bool = False
) -> dict[str, list[Source]]:
    """The files of each split of a folder with train, valid and test files, one file ("train"), or a hub dataset.

    stream: read a hub dataset row by row, up to the source's cap; local_only: not "": the hub is not asked, and this is
    the hint where its local cache has no copy; preferences: as `formats.read`.
    """
    here = Path(source.path).expanduser()
    if is_hub_id(source.path):
        return _from_hub(source, stream, local_only, preferences)
    if here.is_dir():
        return _of_folder(here, source, preferences)
    if not here.is_file():
        raise UserError(f"no data file or folder {source.path}")
    return {"train": [_of_file(here, source, preferences)]}


def unused(found: dict[str, list[Source]]) -> tuple[str, ...]:
    """The data files, or splits of a hub dataset, that stand beside those found and that nothing reads."""
    return found["train"][0].beside


def unused_note(source: SourceSection, found: dict[str, list[Source]]) -> str:
    """What to tell a person of them; "" when there are none."""
    names = unused(found)
    if not names:
        return ""
    return f"{source.path}: not used: {', '.join(names)} (read are {', '.join(SPLITS)})"


def _of_file(file: Path, source: SourceSection, preferences: bool) -> Source:
    def identity() -> str:
        return f"{digest(file, 'blake2b')}{source.columns}{_read_as(preferences)}"

    return Source(str(file), lambda: formats.read(file, source.columns, preferences), identity)


def _read_as(preferences: bool) -> str:
    """What an identity says of the way in which rows are read."""
    return " preferences" if preferences else ""


def _of_folder(folder: Path, source: SourceSection, preferences: bool) -> dict[str, list[Source]]:
    files = _data_files(folder)
    by_split = {}
    for split in dict.fromkeys(SPLITS.values()):
        own = _split_files(folder, files, split)
        if own:
            by_split[split] = own
    if "train" not in by_split:
        raise UserError(f"{folder} has no train file", f"Expected train{'|'.join(SUFFIXES)}.{_train_inside(folder)}")
    found = {split: [_of_file(file, source, preferences) for file in own] for split, own in by_split.items()}
    used = {path for own in by_split.values() for path in own}
    return _with_unused(found, [path.name for path in files if path not in used])


def _train_inside(folder: Path) -> str:
    """A sentence on the folder inside it that holds a train file; "" where none does."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and _named(_data_files(path), "train"):
            return f" Its folder {path.name} holds one: name {path}."
    return ""


def _with_unused(found: dict[str, list[Source]], names: list[str]) -> dict[str, list[Source]]:
    first, *others = found["train"]
    found["train"] = [replace(first, beside=tuple(names)), *others]
    return found


def _data_files(folder: Path) -> list[Path]:
    files = []
    for path in sorted(folder.iterdir()):
        is_data = path.is_file() and kind_of(path) and path.name[0] != "."
        if is_data and path.name.partition(".")[0] not in ABOUT:
            files.append(path)
    return files


def _named(files: list[Path], name: str) -> list[Path]:
    """train.jsonl, or the shards of one split: train-00000-of-00002.parquet and its like."""
    return [path for path in files if path.name.partition(".")[0] == name or path.name.startswith(f"{name}-")]


def _split_files(folder: Path, files: list[Path], split: str) -> list[Path]:
    """One whole file, or the shards of one name. Raises UserError when there are several candidates."""
    by_name = {}
    for name, ours in SPLITS.items():
        own = _named(files, name)
        if ours == split and own:
            by_name[name] = own
    if not by_name:
        return []
    first_name, *other_names = by_name
    all_files = [path for own in by_name.values() for path in own]
    whole = [path for path in all_files if path.name.partition(".")[0] in SPLITS]
    if whole:  # which is alone where nothing is wrong
        first, others = whole[0], [path for path in all_files if path != whole[0]]
    else:
        first, others = all_files[0], [path for name in other_names for path in by_name[name]]
    if others:
        raise UserError(f"{folder} has both {first.name} and {others[0].name}", "Keep one of them.")
    return by_name[first_name]


def _from_hub(source: SourceSection, stream: bool, local_only: str, preferences: bool) -> dict[str, list[Source]]:
    """A dataset of the hub, its rows parsed like any other."""
    loaded = hub_dataset.splits_of(source, stream, local_only)
    named: dict[str, list[str]] = {}  # split as we name it -> as the dataset does
    for split in loaded:
        meant = split.removesuffix(OF_PREFERENCES) if preferences else split
        named.setdefault(SPLITS.get(meant, ""), []).append(split)
    unknown = named.pop("", [])
    for own in named.values():
        if len(own) > 1:
            raise UserError(
                f"{source.path} has both {own[0]} and {own[1]}: two splits for one use",
                "Save the splits to use as files train and valid in a folder, and name that folder.",
            )
    if "train" not in named:
        raise UserError(f"{source.path} has no train split", f"It has: {', '.join(loaded)}.")
    found = {}
    for ours, (theirs,) in named.items():
        found[ours] = [_of_hub_split(source, theirs, loaded[theirs], stream, preferences)]
    return _with_unused(found, unknown)


def _of_hub_split(source: SourceSection, split: str, rows: Any, stream: bool, preferences: bool) -> Source:
    name = f"{source.path}:{split}"

    def read() -> Iterator[Record | Bad]:
        found = hub_dataset.rows_of(name, rows, min(BATCH, source.cap or BATCH))
        if stream:
            return formats.parse(name, islice(found, source.cap), source.columns, preferences)
        return formats.parse(name, found, source.columns, preferences)

    def identity() -> str:
        return "" if stream else f"{name}{rows._fingerprint}{source.columns}{_read_as(preferences)}"

    return Source(name, read, identity)
