"""The rows that a model is compared on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxtune.config.resolve import Config
from mlxtune.data.dataset import holdout, mixture
from mlxtune.data.dataset.examples import Examples
from mlxtune.data.template.choice import set_template
from mlxtune.errors import UserError


def held_out(
    tokenizer: Any, folder: Path, config: Config, split: str | None = None, own: bool = True, local_only: str = ""
) -> Examples:
    """The examples to compare on.

    tokenizer: as the run changed it; it gets the template that `config` chooses, which may be another one. folder: of
    the model, for messages. own: the data is the run's own, of which the validation rows (or `split`) were
    held out; else the user named it, and a single file counts whole. local_only: as `sources.files_by_split`.

    Raises UserError for a split that the data lacks.
    """
    section = config.data
    whole_file = False
    if not own:
        # What a user names is scored as it is: nothing is left out of it.
        section = section.model_copy(update={"dedup": "none", "cap": None})
        whole_file = holdout.is_whole_file(section.path, split)
    if split is None:
        split = "train" if whole_file else "valid"
    set_template(tokenizer, folder, section.template)
    preferences = bool(config.preference.loss)
    examples = mixture.read(
        section, tokenizer, config.train.seed, whole=whole_file, local_only=local_only, preferences=preferences
    )
    if split not in examples:
        raise UserError(f"{section.path} has no {split} split", f"It has: {', '.join(examples)}.")
    return examples[split]
