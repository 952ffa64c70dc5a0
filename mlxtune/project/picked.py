"""The model of a new project, as a person names it: a folder, a GGUF file, a hub id. No weight is read, and no hub is
asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune_convert.gguf import model_read

from mlxtune.data.template.tokenizer import require_config, require_folder
from mlxtune.errors import UserError
from mlxtune.model import hub
from mlxtune.presets import models

CONVERTED = "model"  # the folder in the project that a model is converted into
QUANTIZED_GGUF = 4  # bits: what the codes of a quantized GGUF file take, about


@dataclass(frozen=True)
class Picked:
    """A model that a project may have."""

    named: str  # as the configuration, or `convert`, is given it: an absolute path, or a hub id
    folder: Path | None  # where its tokenizer and config.json are; None: not on this machine, or inside a GGUF file
    config: Mapping[str, Any] | None  # of a model without a folder; None: nothing is known of it
    bits: Sequence[int | None] | None  # that it may have (`presets.search.find`); None: by default
    is_gguf: bool = False  # converted before anything else, its codes as they are

    @property
    def shape(self) -> Path | Mapping[str, Any] | None:
        """What its memory is predicted from; None: nothing is known of it."""
        return self.folder or self.config


def pick(named: str) -> Picked:
    """The model that a person means. Raises UserError for what no run can be of."""
    path = Path(named).expanduser()
    if path.is_file():
        opened = model_read.open_gguf(path)
        bits = [QUANTIZED_GGUF] if opened.quantized else None
        return Picked(str(path.resolve()), None, opened.config, bits, is_gguf=opened.quantized)
    if path.is_dir():
        require_folder(path)
        require_config(path)
        return Picked(str(path.resolve()), path.resolve(), None, None)
    if not hub.is_id(named):
        raise UserError(f"no file or folder {named}", "A hub id looks like owner/name.")
    for known in models.KNOWN:
        if named == known.four_bit:
            return Picked(named, _cached(named), known.config, [_bits(known)])
        if named == known.hub:
            return Picked(named, _cached(named), known.config, None)
    return Picked(named, _cached(named), None, None)


def _bits(known: models.Known) -> int:
    """Bits of the weights that are on the hub for MLX."""
    return 4 if known.four_bit.endswith("4bit") else 16


def _cached(named: str) -> Path | None:
    """Where the hub's cache has a model; None where it does not."""
    try:
        return hub.resolve(named, local_only="-")
    except UserError:
        return None
