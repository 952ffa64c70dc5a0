"""Data paths -> the examples of each split: files and hub ids found, mixed, deduplicated, held out, counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from mlxtune.config import DataSection, SourceSection
from mlxtune.data import duplicates, records, store
from mlxtune.data.chat import Example
from mlxtune.data.examples import Renderer
from mlxtune.data.files import SUFFIXES, Bad, kind_of, place
from mlxtune.data.records import Record
from mlxtune.data.store import CHAT, DAMAGED, SHORTENED, Store
from mlxtune.data.template import use
from mlxtune.errors import UserError

SPLITS = ("train", "valid", "test")
LISTED = 8  # damaged rows that an error message names
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Source:
    """One file's rows, or one split of a hub dataset. digest: of its bytes; "" where they are not at hand."""

    name: str
    read: Callable[[], Iterator[Record | Bad]]
    digest: Callable[[], str] = lambda: ""


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """The usable examples of one split. which, where: [N] the store and the place in it of each; weights: per store,
    for a mixture; ordered: whether `order` is to be kept.
    """

    stores: list[Store]
    which: np.ndarray
    where: np.ndarray
    weights: list[float] = field(default_factory=list)
    order: str = "shuffled"
    left_out: dict[str, int] = field(default_factory=dict)

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
            drawn = draw.choice(len(self.stores), len(self), p=share)
            own = [order[self.which[order] == number] for number in range(len(self.stores))]
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
    parts: dict[str, list[tuple[Store, np.ndarray, float, dict[str, int]]]] = {}
    for source in mixture:
        own = section.model_copy(update={"columns": {**section.columns, **source.columns}})
        stores = {
            split: _stored(found, own, tokenizer, folder, progress)
            for split, found in find(source.path, own, source.cap).items()
        }
        chosen = {split: np.arange(len(made)) for split, made in stores.items()}
        left: dict[str, dict[str, int]] = {split: {} for split in stores}
        if not whole and "valid" not in stores:
            limit = duplicates.threshold(stores["train"].all_hashes, section.valid_fraction, seed)
            if limit is None:
                raise UserError(
                    f"{stores['train'].facts['file']}: fewer than two different rows, too few to hold any out",
                    "Add rows, or a valid file beside the train file.",
                )
            held = duplicates.seeded(stores["train"].columns["hash"], seed) <= limit
            stores["valid"], chosen["valid"], left["valid"] = stores["train"], np.flatnonzero(held), {}
            chosen["train"] = np.flatnonzero(~held)
        chosen["train"], left["train"] = _thinned(stores["train"], chosen["train"], own, source, seed)
        for split, made in stores.items():
            parts.setdefault(split, []).append((made, chosen[split], source.weight, left[split]))
    weighted = len({source.weight for source in mixture}) > 1
    return {split: _joined(split, found, section, weighted) for split, found in parts.items()}


def glance(section: DataSection, whole: bool = False) -> None:
    """Raise UserError when a source is missing or its first row has no known format; whole: when any row is bad."""
    if not section.path and not section.sources:
        raise UserError("no data given", "Name a folder or file: --data PATH (or data.path in the configuration).")
    for source in section.mixture():
        own = section.model_copy(update={"columns": {**section.columns, **source.columns}})
        for found in find(source.path, own, source.cap).values():
            rows = found.read()
            first = next(rows, None)
            if whole:
                good_or_bad = [isinstance(row, Bad) and row for row in chain([first], rows)]
                records.require_good([row for row in good_or_bad if row], len(good_or_bad))


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


def with_template(rows: Iterator[Record | Bad], tokenizer: Any, folder: Path, template: str) -> Iterator[Record | Bad]:
    """The same rows; the template is chosen, or its absence said, when the first conversation comes."""
    chosen = False
    for row in rows:
        if not chosen and (template or (isinstance(row, Record) and row.text is None)):
            use(tokenizer, folder, template)
            chosen = True
        yield row


def _thinned(
    made: Store, chosen: np.ndarray, section: DataSection, source: SourceSection, seed: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Training rows without duplicates and beyond the cap, and how many were left out for what."""
    left = {}
    row = made.columns["row"]
    if section.dedup != "none":
        _, first = np.unique(made.columns["hash"][chosen], return_index=True)
        rows = set(row[chosen[first]].tolist())  # an expanded row's examples share its hash
        if section.dedup == "near":
            leaders = duplicates.near(np.asarray(made.signature[chosen]))
            rows &= set(row[chosen[leaders == np.arange(len(chosen))]].tolist())
        kept = chosen[np.isin(row[chosen], list(rows))]
        left["duplicates" if section.dedup == "exact" else "equal or near duplicates"] = len(chosen) - len(kept)
        chosen = kept
    if source.cap is not None and source.cap < len(chosen):
        keys = duplicates.seeded(
            made.columns["hash"][chosen] + made.columns["part"][chosen].astype(np.uint64), seed + 1
        )
        kept = np.sort(chosen[np.argsort(keys, kind="stable")[: source.cap]])
        left[f"beyond the cap of {source.cap}"] = len(chosen) - len(kept)
        chosen = kept
    return chosen, left


def _joined(
    split: str, parts: list[tuple[Store, np.ndarray, float, dict[str, int]]], section: DataSection, weighted: bool
) -> Examples:
    """The examples of all sources; rows that the template damages are treated as data.on_damage says."""
    stores, chosen, weights = [], [], []
    left_out: dict[str, int] = {}
    for made, rows, weight, left in parts:
        damaged = made.columns["flags"][rows] & DAMAGED > 0
        if damaged.any() and section.on_damage == "error":
            listed = "; ".join(f"{where}: {text}" for where, text in made.facts["damaged"][:LISTED])
            more = f"; and {damaged.sum() - LISTED} more" if damaged.sum() > LISTED else ""
            raise UserError(
                f"{made.facts['file']}: the chat template damages {damaged.sum()} of {len(rows)} rows: {listed}{more}",
                "Mend the rows, or set data.on_damage=drop or keep; `mlxtune data show` prints them.",
            )
        if section.on_damage == "drop":
            rows = rows[~damaged]
            left = {**left, "damaged by the chat template": int(damaged.sum())}
        stores.append(made)
        chosen.append(rows)
        weights.append(weight)
        for reason, count in left.items():
            left_out[reason] = left_out.get(reason, 0) + count
    which = np.concatenate([np.full(len(rows), number, np.int32) for number, rows in enumerate(chosen)])
    if not len(which):
        raise UserError(f"no {split} example is left", f"Left out: {left_out}.")
    order = section.order if split == "train" else "shuffled"
    return Examples(stores, which, np.concatenate(chosen), weights if weighted else [], order, left_out)


def find(path: str, section: DataSection, cap: int | None = None) -> dict[str, Source]:
    """The splits of a folder with train, valid and test files, of one file ("train"), or of a hub dataset."""
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


def _of_files(files: list[Path], section: DataSection) -> Source:
    def rows() -> Iterator[Record | Bad]:
        for file in files:
            yield from records.read(file, section.columns)

    def digest() -> str:
        return "".join(f"{file}{store.file_digest(file)}" for file in files)

    return Source(str(files[0]), rows, digest)


def _split_files(folder: Path, split: str) -> list[Path]:
    """train.jsonl, or the shards of one split: train-00000-of-00002.parquet and its like."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and kind_of(path))
    whole = [path for path in files if path.name.partition(".")[0] == split]
    if len(whole) > 1:
        raise UserError(f"{folder} has both {whole[0].name} and {whole[1].name}", "Keep one of them.")
    return whole or [path for path in files if path.name.startswith(f"{split}-")]


def _from_hub(name: str, section: DataSection, cap: int | None) -> dict[str, Source]:
    """A dataset of the hub, through `datasets`, its rows parsed like any other; NAME:SUBSET where it has several."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    datasets.disable_progress_bars()
    repo, _, subset = name.partition(":")
    if section.hub == "stream" and cap is None:
        raise UserError("data.hub=stream needs data.cap: how many rows to read", "Or set data.hub=download.")
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
        named.get(split, split): _of_hub(f"{name}:{split}", rows, section, cap)
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
    """The rows of one split, as they stand in the file. Where none is named, a single file counts whole and a folder's
    `default` is taken. Raises UserError naming the splits there are.
    """
    found = find(path, section)
    if split is None and Path(path).expanduser().is_file():
        return found["train"].read()
    wanted = split or default
    if wanted in found and (wanted != "train" or "valid" in found):
        return found[wanted].read()
    if wanted == "test":
        raise UserError(f"{path} has no test split", f"It has: {', '.join(dict.fromkeys([*found, 'valid']))}.")
    # Held out by the hash of each row, as for training.
    hashes = [duplicates.content_hash(row) for row in found["train"].read() if isinstance(row, Record)]
    limit = duplicates.threshold(np.array(hashes, np.uint64), section.valid_fraction, seed)
    held = iter((duplicates.seeded(hashes, seed) <= (-1 if limit is None else limit)).tolist())
    return (row for row in found["train"].read() if isinstance(row, Bad) or next(held) == (wanted == "valid"))
