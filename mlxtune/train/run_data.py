"""The examples that a run trains on and holds out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from mlxtune.adapter import vocabulary
from mlxtune.config.resolve import Config
from mlxtune.data.dataset import mixture, sources
from mlxtune.data.dataset.examples import Examples
from mlxtune.data.dataset.store_writing import Progress, untold
from mlxtune.data.template.template import Template
from mlxtune.data.template.tokenizer_changes import Changes
from mlxtune.model import hub
from mlxtune.train.preference.rows import require_fitting
from mlxtune.train.reach import NOTHING, LocalOnly


@dataclass(frozen=True)
class Data:
    """The examples of a run, with what was shortened or dropped."""

    train: Examples  # to learn from
    valid: Examples  # held out
    folder: Path  # of the model whose tokens they are: model.path, or what was downloaded of it
    tokenizer: Any  # of that model, set up for the run
    changes: Changes  # what the run changes in the tokenizer of the folder


def read_data(
    config: Config,
    progress: Progress = untold,
    local: LocalOnly = NOTHING,
) -> tuple[Data, Config]:
    """Rows -> examples of the model's tokenizer, and the configuration with the day they were made for.

    progress: called with a file's name and how many of its rows are tokenized; local: for what the hub is not asked.
    Raises UserError before any weight is read, also for rows that do not fit the objective; for a typing error in the
    rows, before a model is downloaded.
    """
    model_is_here = Path(config.model.path).expanduser().exists()
    preferences = bool(config.preference.loss)
    sources.require_readable(config.data, not model_is_here, local.data, preferences)
    folder = hub.resolve(config.model.path, local_only=local.model)
    tokenizer, changes = vocabulary.run_tokenizer(folder, config)
    config = with_date(config, tokenizer)
    splits = mixture.read(
        config.data, tokenizer, config.train.seed, progress, local_only=local.data, preferences=preferences
    )
    require_fitting(config.preference, {split: splits[split] for split in ("train", "valid")})
    return Data(splits["train"], splits["valid"], folder, tokenizer, changes), config


def with_date(config: Config, tokenizer: Any) -> Config:
    """The day made explicit where the template prints it, so that the run means the same tomorrow."""
    if config.data.date or tokenizer.chat_template is None:
        return config
    if not Template(tokenizer).prints_date:
        return config
    today = date.today().isoformat()
    return config.model_copy(update={"data": config.data.model_copy(update={"date": today})})
