"""The unquantized model that a quantized one was made of, as its model card tells it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mlxtune_convert.files import read_json

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Words in the names of repositories that are quantized themselves.
QUANTIZED = re.compile(r"(?i)(awq|gptq|gguf|bnb|hqq|exl\d|fp8|fp4|nf4|int\d|\dbit|\d-bit|w\da\d|quant|mlx)")


def advice(folder: Path) -> str:
    """What to take instead of a folder that cannot be read."""
    return instead(original(folder))


def instead(name: str) -> str:
    """name: the original's on the hub, or ""."""
    return f"Take the unquantized original{f': {name}' if name else ', with 16-bit weights'}."


def original(folder: Path) -> str:
    """The original's hub name: `base_model` of the model card, or the name that config.json was loaded from; "" where
    neither names one that is not quantized itself.
    """
    loaded_from = read_json(folder / "config.json", "a model folder").get("_name_or_path")
    return unquantized_name([*_base_models(folder / "README.md"), loaded_from])


def unquantized_name(known: Sequence[object]) -> str:
    """The first hub name that does not say that it is quantized, or ""."""
    return next((n for n in known if isinstance(n, str) and HUB_ID.fullmatch(n) and not QUANTIZED.search(n)), "")


def _base_models(card: Path) -> list[str]:
    """The value or list under `base_model` in the lines between the first two ---."""
    if not card.is_file():
        return []
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return []
    found = re.search(r"^base_model:[ \t]*(.*)((?:\n[ \t]*-[ \t].*)*)", parts[1], re.MULTILINE)
    return HUB_ID.findall(f"{found[1]} {found[2]}") if found else []
