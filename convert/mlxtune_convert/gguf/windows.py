"""Which layers of a model see a window of a row and not all of it."""

from __future__ import annotations

from typing import Any


def windowed_layers(config: dict[str, Any], every: int) -> list[bool]:
    """One value for each layer: as config.json lists them, else every layer but each `every`-th has a window."""
    kinds = config.get("layer_types")
    if kinds:
        return [kind == "sliding_attention" for kind in kinds]
    return [(layer + 1) % every != 0 for layer in range(config["num_hidden_layers"])]
