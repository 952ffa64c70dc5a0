"""Rows read as training reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxtune.config.schema import DataSection
from mlxtune.data.dataset import mixture
from mlxtune.data.dataset.examples import Examples
from mlxtune.data.template.choice import set_template

ASKED = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def read(
    path: Path, tokenizer: Any, seed: int = 0, whole: bool = False, preferences: bool = False, **options: Any
) -> dict[str, Examples]:
    """The examples of each split; nothing is cached unless asked. options: of data."""
    section = DataSection(**{"path": str(path), "cache": "off", **options})
    set_template(tokenizer, path.parent, section.template)
    return mixture.read(section, tokenizer, seed, whole=whole, preferences=preferences)


def all_of(path: Path, tokenizer: Any, **options: Any) -> Examples:
    """The examples of one file, none held out."""
    return read(path, tokenizer, whole=True, **options)["train"]


def shown(found: Examples, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(example.ids, skip_special_tokens=True) for example in found]


def rows_of(found: Examples) -> list[int]:
    return found.column("row").tolist()
