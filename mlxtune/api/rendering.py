"""`mlxtune.render`: rows as the model sees them, and what of them it learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxtune.api import tuned
from mlxtune.api.arguments import RENDERING, in_python

if TYPE_CHECKING:
    from mlxtune.api.tuning import Run
    from mlxtune.config.resolve import Config
    from mlxtune.data.chat.renderer import Renderer, Row


@dataclass(frozen=True)
class Rendered:
    """One example of a row, or why there is none."""

    place: str  # file and line: "rows.jsonl line 3"
    text: str  # what the template printed
    ids: list[int]  # the tokens; empty where `dropped` says why
    # Of each token, whether it is of what the row teaches: the model learns to produce it. Of an answer whose side is
    # rejected or bad it learns to produce it less.
    mask: list[bool]
    dropped: str  # why the row gives no example; "": it does
    damage: list[str]  # what of the row the template does not print, in words
    # What was said of its answer: "chosen" or "rejected" of a pair, which gives examples of both; "good" or "bad" of a
    # rated answer (with preference.loss kto in the settings); "": nothing, an answer to learn.
    side: str = ""

    @classmethod
    def of(cls, row: Row) -> Rendered:
        """One of the renderer's rows."""
        from mlxtune.data.chat.by_row import side_of
        from mlxtune.data.rows.sides import Side

        damage = [one.text for one in row.damage]
        said = side_of(row)
        side = "" if said is Side.NONE else said.word
        if row.example is None:
            return cls(row.place, row.text, [], [], row.dropped, damage, side)
        ids = [int(token) for token in row.example.ids]
        return cls(row.place, row.text, ids, [bool(one) for one in row.example.mask], "", damage, side)


def render(
    model: Run | str | Path,
    data: str | Path,
    *,
    split: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> Iterator[Rendered]:
    """Rows rendered by the model's chat template, as `mlxtune data show` does: a row may give several examples.

    model: a folder with a tokenizer, or a hub id; or a run or its folder, whose model and settings are taken. data: a
    folder, a file, or a dataset of the hub. split: train and valid divide the rows of a train file as training does;
    None: all rows of the train files. settings: keys of the section data ({"data.max_tokens": 512}), and
    {"preference.loss": "kto"}, with which labels are ratings.

    Raises UserError for what is missing or has no known format.

    >>> first = next(mlxtune.render("model", "data/train.jsonl"))
    >>> len(first.ids) == len(first.mask), any(first.mask)
    (True, True)
    """
    from mlxtune.config import resolve
    from mlxtune.data.chat.by_row import by_row
    from mlxtune.data.dataset import holdout
    from mlxtune.data.dataset.store_writing import untold
    from mlxtune.data.rows.readers import Bad
    from mlxtune.data.rows.two_sides import records_of, together
    from mlxtune.train.run_folder import RunFolder

    flags = {"data.path": str(data), **(settings or {})}
    with in_python(RENDERING):
        named, run = tuned.model_and_run(model)
        config = resolve.load(None, (), flags) if run is None else RunFolder(run).config(None, (), flags)
        renderer = renderer_of(named, config)
        preferences = bool(config.preference.loss)
        rows = holdout.rows_of_split(config.data, config.train.seed, split, renderer, untold, preferences)
    for one in together(rows):
        records = [one] if isinstance(one, Bad) else records_of(one)
        for parts in by_row(renderer.stream(records)):
            for row in parts:
                yield Rendered.of(row)


def renderer_of(model: str, config: Config) -> Renderer:
    """What makes examples with the tokenizer of a model, once the data is known to be there."""
    from mlxtune.data.chat.renderer import Renderer
    from mlxtune.data.dataset import sources
    from mlxtune.data.template.tokenizer_changes import preview_tokenizer
    from mlxtune.model import hub

    sources.require_readable(config.data, preferences=bool(config.preference.loss))
    return Renderer(preview_tokenizer(hub.resolve(model), config), config.data)
