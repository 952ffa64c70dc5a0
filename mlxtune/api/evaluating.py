"""`mlxtune.evaluate`: the loss of a model and of what was tuned of it, on held-out rows."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxtune.api import tuned
from mlxtune.api.tuned import Note, to_nobody
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from mlxtune.api.tuning import Run
    from mlxtune.evaluate.score import Score


@dataclass(frozen=True)
class Evaluation:
    """What both sides lose on the same rows. A Score has loss (nats a token), perplexity, accuracy and tokens."""

    split: str  # "valid", "test", "train"; "all": every row of one file
    rows: int  # that were scored
    examples: int  # that they gave
    also: str  # how many examples, in words, where they are not as many as the rows: " (12 examples)"
    base: Score  # of the model without the adapter
    tuned: Score | None  # of the model with it; None: there is no adapter


def evaluate(
    model: Run | str | Path,
    adapter: Run | str | Path | None = None,
    *,
    data: str | Path | None = None,
    split: str | None = None,
) -> Evaluation:
    """Score a model, and what was tuned of it, on held-out rows, as `mlxtune eval` does.

    model: a run, with the model that it was trained on; or an MLX folder, a 16-bit Hugging Face folder or a hub id.
    adapter: a run, or any MLX adapter folder. data: a folder, a file, or a dataset of the hub; None: the run's own.
    split: of a folder.

    Raises UserError for what is missing or does not fit.

    >>> scores = mlxtune.evaluate(run)
    >>> scores.tuned.tokens == scores.base.tokens
    True
    """
    of_model, of_adapter = model_and_adapter(model, adapter)
    return scored(of_model, of_adapter, None if data is None else str(data), split)


def model_and_adapter(model: Run | str | Path, adapter: Run | str | Path | None) -> tuple[str, Path | None]:
    """(The model, the adapter's folder) of what a caller names."""
    folder = None
    if adapter is not None:
        folder = adapter if isinstance(adapter, str | Path) else adapter.folder
    if isinstance(model, str | Path):
        return str(model), None if folder is None else Path(folder)
    return model.model, Path(folder) if folder is not None else model.folder


def scored(
    model: str,
    adapter: Path | None,
    data: str | None,
    split: str | None = None,
    settings: tuple[str, ...] = (),
    note: Note = to_nobody,
    around: AbstractContextManager[object] | None = None,
) -> Evaluation:
    """The same for the command. settings: of --set; note: hears what is said of the rows; around: entered while it
    computes.
    """
    from mlxtune.adapter.attach import switched_off
    from mlxtune.data.dataset import holdout
    from mlxtune.evaluate.score import score_examples

    if adapter is None and data is None and not any(setting.startswith("data.") for setting in settings):
        raise UserError("no rows to score", "Name them: --data PATH; or --adapter RUN, whose held-out rows are taken.")
    tuned.run_settings(adapter, data, settings)  # a typing error is said before the model is read
    loaded = tuned.load_model(model, adapter)
    examples, config = tuned.held_out(loaded.tokenizer, loaded.path, adapter, data, settings, split, note)
    is_whole = data is not None and holdout.is_whole_file(data, split)
    label = split or ("all" if is_whole else "valid")
    for line in examples.notes(label, config.data.max_tokens):
        note(line)
    with around or nullcontext():
        with switched_off(loaded.model):
            base = score_examples(loaded, config, examples)
        with_adapter = None if adapter is None else score_examples(loaded, config, examples)
    return Evaluation(label, examples.rows, len(examples), examples.also, base, with_adapter)
