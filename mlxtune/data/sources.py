"""Data path -> examples of each split, with everything that was shortened or dropped counted."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxtune.config import DataSection
from mlxtune.data import chat, records
from mlxtune.data.records import Record
from mlxtune.errors import UserError

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Row:
    """A record and its example. Exactly one of `example` and `dropped` (the reason) is set."""

    record: Record
    example: chat.Example | None = None
    dropped: str = ""
    shortened: bool = False


@dataclass(frozen=True)
class Examples:
    """The usable rows of one split, and what happened to the others."""

    rows: list[Row]
    dropped: list[Row] = field(default_factory=list)

    @property
    def examples(self) -> list[chat.Example]:
        return [row.example for row in self.rows if row.example is not None]

    @property
    def shortened(self) -> int:
        return sum(row.shortened for row in self.rows)

    def notes(self, split: str, max_tokens: int) -> list[str]:
        """What a person must know about rows that were not used as they are."""
        out = []
        total = len(self.rows) + len(self.dropped)
        if self.shortened:
            out.append(
                f"{split}: {self.shortened} of {total} rows shortened to data.max_tokens {max_tokens} (start kept)"
            )
        for reason, count in Counter(row.dropped for row in self.dropped).most_common():
            first, *others = [row.record for row in self.dropped if row.dropped == reason]
            listed = ", ".join([first.place, *(str(record.row) for record in others[:4])]) + ", ..." * (count > 5)
            out.append(f"{split}: {count} of {total} rows dropped: {reason} ({listed})")
        return out


def splits(path: str, section: DataSection, seed: int) -> dict[str, list[Record]]:
    """Records of "train", "valid" and, where there is one, "test".

    path: a folder with train.jsonl (.json, .csv, .parquet) and optional valid and test files, one file, or a hub
    dataset id. Without a valid file a share of the rows, chosen by `seed`, is held out; equal rows stay on one side.
    """
    if not path:
        raise UserError("no data given", "Name a folder or file: --data PATH (or data.path in the configuration).")
    place = Path(path).expanduser()
    if place.is_dir():
        found = {split: _split_file(place, split) for split in SPLITS}
        if found["train"] is None:
            raise UserError(f"{place} has no train file", f"Expected train{'|'.join(records.SUFFIXES)}.")
        out = {split: records.read(file) for split, file in found.items() if file is not None}
    elif place.is_file() or place.suffix in records.SUFFIXES or path.count("/") != 1 or path[0] in "./~":
        if not place.is_file():
            raise UserError(f"no data file or folder {path}")
        out = {"train": records.read(place)}
    else:
        out = _from_hub(path)
    if "valid" not in out:
        out["train"], out["valid"] = hold_out(out["train"], section.valid_fraction, seed)
    return out


def rows_of(path: str, section: DataSection, seed: int, split: str | None, default: str) -> list[Record]:
    """The rows of one split. Where none is named, a single file counts whole and a folder's `default` is taken.

    Raises UserError naming the splits there are.
    """
    place = Path(path).expanduser()
    if split is None and place.is_file():
        return records.read(place)
    found = splits(path, section, seed)
    if (split or default) not in found:
        raise UserError(f"{path} has no {split} split", f"It has: {', '.join(found)}.")
    return found[split or default]


def require_template(tokenizer: Any, folder: Path, rows: Iterable[Record]) -> None:
    """Raise UserError when some of the rows are conversations and the tokenizer of `folder` cannot render them."""
    if any(record.text is None for record in rows):
        chat.require_template(tokenizer, folder)


def _split_file(folder: Path, split: str) -> Path | None:
    files = [folder / f"{split}{suffix}" for suffix in records.SUFFIXES if (folder / f"{split}{suffix}").is_file()]
    if len(files) > 1:
        raise UserError(f"{folder} has both {files[0].name} and {files[1].name}", "Keep one of them.")
    return files[0] if files else None


def _from_hub(name: str) -> dict[str, list[Record]]:
    """A dataset of the hub, through `datasets`, saved rows parsed like any other."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name)
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
    out = {}
    for split, rows in loaded.items():
        if named.get(split, split) in SPLITS:
            out[named.get(split, split)] = records.parse(f"{name}:{split}", list(enumerate(rows, 1)))
    if "train" not in out:
        raise UserError(f"{name} has no train split", f"It has: {', '.join(loaded)}.")
    return out


def hold_out(rows: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, valid): rows whose seeded hash is smallest are held out, at least one. Equal rows share a hash, so a
    side.
    """

    def key(record: Record) -> str:
        content = json.dumps([record.messages, record.tools, record.text], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(f"{seed}:{content}".encode()).hexdigest()

    keys = [key(record) for record in rows]
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        raise UserError(
            f"{rows[0].file}: {len(distinct)} different row, too few to hold any out for validation",
            "Add rows, or a valid file beside the train file.",
        )
    held = set(distinct[: max(1, round(len(distinct) * fraction))])
    train = [record for record, k in zip(rows, keys, strict=True) if k not in held]
    return train, [record for record, k in zip(rows, keys, strict=True) if k in held]


def to_row(tokenizer: Any, record: Record, section: DataSection) -> Row:
    """Render one record, shorten it to `data.max_tokens`, and drop it when nothing in it is supervised."""
    if record.text is not None:
        example = chat.render_text(tokenizer, record.text)
    else:
        messages = record.messages or []
        if not any(message["role"] == "assistant" for message in messages):
            return Row(record, dropped="no assistant turn")
        try:
            text, spans = chat.spans_of(tokenizer, messages, record.tools, **section.template_kwargs)
        except chat.TemplateError as error:
            return Row(record, dropped=str(error))
        example = chat.tokenized(tokenizer, text, spans[-1:] if section.train_on == "last" else spans)
    shortened = len(example.ids) > section.max_tokens
    if shortened:
        example = chat.Example(example.ids[: section.max_tokens], example.mask[: section.max_tokens])
    if not any(example.mask[1:]):
        why = f"no supervised token in the first {section.max_tokens} tokens" if shortened else "no supervised token"
        return Row(record, dropped=why)
    return Row(record, example, shortened=shortened)


def to_examples(tokenizer: Any, rows: Iterable[Record], section: DataSection) -> Examples:
    """Render a split. Raises UserError when not one row is usable."""
    done = [to_row(tokenizer, record, section) for record in rows]
    good = Examples([row for row in done if not row.dropped], [row for row in done if row.dropped])
    if not good.rows:
        first = done[0]
        raise UserError(
            f"{first.record.file}: none of {len(done)} rows can be used; {first.record.place}: {first.dropped}",
            "`mlxtune data show` prints what the model would see.",
        )
    return good
