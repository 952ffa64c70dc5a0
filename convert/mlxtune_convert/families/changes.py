"""Changes to a config.json that several families need: what mlx-lm insists on, out of what transformers writes.

What transformers' configuration says is never changed in meaning: a key is added that mlx-lm insists on, or a word
becomes the word that mlx-lm knows.
"""

from __future__ import annotations

from typing import Any

from mlxtune_convert.families.family import Change, Config


def fixed(**values: Any) -> Change:
    """Keys that mlx-lm insists on and transformers does not have, because the family has only this."""

    def change(config: Config) -> None:
        for key, value in values.items():
            config.setdefault(key, value)

    return change


def copied(**names: str) -> Change:
    """Keys under a second name. names: mlx-lm's name = transformers' name."""

    def change(config: Config) -> None:
        for ours, theirs in names.items():
            if theirs in config:
                config.setdefault(ours, config[theirs])

    return change


def rotary_part(config: Config) -> float:
    """Which part of a head is rotated."""
    rope = config.get("rope_parameters") or {}
    return config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
