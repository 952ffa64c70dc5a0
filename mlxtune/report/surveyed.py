"""A data set as a page shows it: the survey of it, and a row as it is trained on.

Of a run the data is read again when its page is made. Of a split with many rows a sample is enough then: the end of a
run must not wait for a million rows. What cannot be read any more is told by what the run noted (`sections.data`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from mlxtune.config.resolve import Config
from mlxtune.data.chat.asked import KINDS
from mlxtune.data.chat.by_row import by_row
from mlxtune.data.chat.renderer import Renderer, Row
from mlxtune.data.dataset import sources
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.readers import Bad
from mlxtune.data.rows.two_sides import TwoSides, records_of, side_of, together
from mlxtune.data.survey import survey
from mlxtune.data.survey.trained_text import pieces
from mlxtune.data.template import tokenizer_changes
from mlxtune.model import hub
from mlxtune.train.run_folder import RunFolder

MOST_ROWS = 2_000  # of all sources together that a run's page looks at, of each kind of split: some two seconds
LOOKED_AT = 100  # rows among which one that is trained on is looked for
LOCAL_ONLY = "A page asks the hub for nothing."


@dataclass(frozen=True)
class ShownExample:
    """One example, for people."""

    place: str  # the row and turn that it is of
    tokens: int  # of the example, cut at data.max_tokens
    learned: int  # that the model must produce
    is_shortened: bool  # data.max_tokens cut it
    pieces: list[tuple[bool, str]]  # (whether the model must produce it, its text)
    remarks: list[str]  # on its turns, and what of the row the template drops
    side: str = ""  # chosen, rejected, good or bad; "": it is no side of anything


@dataclass(frozen=True)
class Surveyed:
    """What is known of a data set."""

    told: dict[str, Any]  # as `survey.survey` makes it
    row: list[ShownExample]  # the examples of the first row that gives any; []: none was found


def surveyed(
    config: Config, renderer: Renderer, progress: Any, most: int | None = None, local_only: str = ""
) -> Surveyed:
    """Look at the rows of a configuration; the arguments are those of `survey.survey`. Raises UserError."""
    told = survey.survey(config, renderer, progress, most, local_only)
    return Surveyed(told, first_row(config, renderer, local_only))


def of_run(folder: Path) -> Surveyed:
    """The data of a run, as it is now. Asks the hub for nothing. Raises UserError where it cannot be read.

    A page that is kept fresh is made again and again: the files are read again only when they changed.
    """
    config_file = RunFolder(folder).config_file
    config = RunFolder(folder).config()
    return _of_run(folder, tuple(_stamps(config)), config_file.stat().st_mtime_ns)


def changed_since(folder: Path) -> list[str]:
    """A line on each data file that is newer than the configuration of the run, which is written when it begins."""
    begun = RunFolder(folder).config_file.stat().st_mtime_ns
    lines = []
    for file, changed, _ in _stamps(RunFolder(folder).config()):
        if changed > begun:
            lines.append(
                f"{Path(file).name} was changed after the run began: what is said here may not be what it saw."
            )
    return lines


def _stamps(config: Config) -> Iterator[tuple[str, int, int]]:
    """(path, time of the last change in nanoseconds, bytes) of each data file of a configuration."""
    for source in config.data.mixture():
        path = Path(source.path).expanduser()
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                status = file.stat()
                yield str(file), status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=2)
def _of_run(folder: Path, stamps: tuple[Any, ...], begun: int) -> Surveyed:
    """stamps, begun: of the data files and the configuration: with others the answer is another."""
    config = RunFolder(folder).config()
    # Before a tokenizer is read: that takes longer.
    sources.require_readable(config.data, local_only=LOCAL_ONLY, preferences=bool(config.preference.loss))
    base = hub.resolve(config.model.path, local_only=LOCAL_ONLY)
    tokenizer = tokenizer_changes.tokenizer_of(base, folder)
    most = max(1, MOST_ROWS // len(config.data.mixture()))
    return surveyed(config, Renderer(tokenizer, config.data), lambda name, rows: None, most, LOCAL_ONLY)


def first_row(config: Config, renderer: Renderer, local_only: str = "") -> list[ShownExample]:
    """The examples of the first training row that gives any, among the first LOOKED_AT rows."""
    for row in islice(together(_trained(config, local_only)), LOOKED_AT):
        records = records_of(row) if isinstance(row, Record | TwoSides) else [row]
        made = chain.from_iterable(by_row(renderer.stream(records)))
        shown = [_shown(renderer.tokenizer, one) for one in made if one.example is not None]
        if shown:
            return shown
    return []


def _trained(config: Config, local_only: str) -> Iterator[Record | Bad]:
    for source in config.data.mixture():
        found = sources.files_by_split(source, config.data.hub == "stream", local_only, bool(config.preference.loss))
        yield from chain.from_iterable(file.read() for file in found["train"])


def _shown(tokenizer: Any, row: Row) -> ShownExample:
    assert row.example is not None
    remarks = [f"dropped by the chat template: {damage.text}" for damage in row.damage]
    remarks += [f"message {message + 1}: {KINDS[kind]}" for kind, message in row.kinds]
    return ShownExample(
        place=row.place,
        tokens=len(row.example.ids),
        learned=int(np.count_nonzero(row.example.mask)),
        is_shortened=row.shortened,
        pieces=pieces(tokenizer, row.example),
        remarks=remarks,
        side=side_of(row.record),
    )
