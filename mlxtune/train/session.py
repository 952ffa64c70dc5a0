"""What commands open together: a configuration, its rows as examples, a model to score them with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtune.adapter import vocabulary
from mlxtune.compute.head import Split
from mlxtune.config.resolve import Config
from mlxtune.config.resolve import load as load_config
from mlxtune.data.chat import masking
from mlxtune.data.dataset import mixture, sources
from mlxtune.data.dataset.batches import Batch, in_order
from mlxtune.data.dataset.examples import Examples
from mlxtune.data.template.choice import BUILT_IN
from mlxtune.data.template.tokenizer import load_tokenizer
from mlxtune.errors import UserError
from mlxtune.evaluate.score import Score, score
from mlxtune.model import hub
from mlxtune.model.load import Loaded
from mlxtune.train.checkpoint import CONFIG_FILE
from mlxtune.train.reach import NOTHING, LocalOnly


@dataclass(frozen=True)
class Data:
    """The examples of a run, with what was shortened or dropped."""

    train: Examples
    valid: Examples  # held out
    folder: Path  # of the model whose tokens they are: model.path, or what was downloaded of it


def read_data(
    config: Config,
    progress: mixture.Progress = lambda source, rows: None,
    local: LocalOnly = NOTHING,
) -> tuple[Data, Config]:
    """Rows -> examples of the model's tokenizer, and the configuration with the day they were made for.

    local: for what the hub is not asked. Raises UserError before any weight is read; for a typing error in the rows,
    before a model is downloaded.
    """
    sources.glance(config.data, not Path(config.model.path).expanduser().exists(), local.data)
    folder = hub.resolve(config.model.path, local_only=local.model)
    tokenizer = load_tokenizer(folder)
    config = dated(config, folder, tokenizer)
    found = mixture.read(config.data, tokenizer, folder, config.train.seed, progress, local_only=local.data)
    return Data(found["train"], found["valid"], folder), config


def split_for(loaded: Loaded, config: Config, batch: Batch) -> Split | None:
    """The proven head split, or None when `fast.head` is off or the model's own logits are not reproduced."""
    if config.fast.head == "off":
        return None
    return Split.of(loaded.model, mx.array(batch.ids[:1, : min(64, batch.ids.shape[1])]))


def anchored(config: Config) -> Config:
    """Local paths made absolute, so that the run can be used and resumed from any folder. Hub ids stay."""

    def absolute(path: str) -> str:
        local = Path(path).expanduser()
        return str(local.resolve()) if path and local.exists() else path

    model = config.model.model_copy(update={"path": absolute(config.model.path)})
    parts = [source.model_copy(update={"path": absolute(source.path)}) for source in config.data.sources or []]
    data = config.data.model_copy(
        update={
            "path": absolute(config.data.path),
            "sources": parts or None,
            "template": config.data.template if config.data.template in BUILT_IN else absolute(config.data.template),
        }
    )
    tuned = config.lora.model_copy(update={"start_from": absolute(config.lora.start_from)})
    return config.model_copy(update={"model": model, "data": data, "lora": tuned})


def dated(config: Config, folder: Path, tokenizer: Any) -> Config:
    """The day made explicit where the template prints it, so that the run means the same tomorrow."""
    vocabulary.choose(tokenizer, folder, config)
    if config.data.date or tokenizer.chat_template is None or not masking.template_of(tokenizer, {}).prints_date:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"date": date.today().isoformat()})})


def run_config(
    run: Path, file: str | None = None, settings: tuple[str, ...] = (), flags: Mapping[str, Any] | None = None
) -> Config:
    """The resolved configuration a run was made with, or another `file`, with what a command line changes in it.

    Raises UserError when the folder is no run.
    """
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{run} is not a run of mlxtune (no {CONFIG_FILE})")
    return load_config(file or run / CONFIG_FILE, settings, flags)


def held_out(
    tokenizer: Any, folder: Path, config: Config, split: str | None = None, own: bool = True, local_only: str = ""
) -> Examples:
    """The examples to compare on; `folder` names the model in errors.

    own: the data is the run's own, of which the validation rows (or `split`) were held out; else the user named it, and
    a single file counts whole. local_only: as `sources.find`.
    """
    whole = not own and split is None and Path(config.data.path).expanduser().is_file()
    wanted = split or ("train" if whole else "valid")
    section = config.data if own else config.data.model_copy(update={"dedup": "none", "cap": None})
    found = mixture.read(section, tokenizer, folder, config.train.seed, whole=whole, local_only=local_only)
    if wanted not in found:
        raise UserError(f"{config.data.path} has no {wanted} split", f"It has: {', '.join(found)}.")
    return found[wanted]


def evaluate(loaded: Loaded, config: Config, examples: Examples) -> Score:
    loaded.check_ids([[examples.highest]])
    batches = in_order(examples)
    return score(loaded.model, split_for(loaded, config, batches[-1]), batches)
