"""The architectures whose names and shapes in Hugging Face's files are MLX's own, so that a model goes back as it is.

(GGUF's names are in `gguf_families`.)
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxtune_convert.errors import UserError


@dataclass(frozen=True)
class Family:
    """model_type: of config.json."""

    model_type: str


FAMILIES = (Family("llama"), Family("qwen2"))


def by_model_type(model_type: str) -> Family:
    """The family of a config.json. Raises UserError naming what is covered and what works instead."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    covered = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(
        f"models of type {model_type} cannot be exported yet (covered: {covered})",
        "`mlxtune fuse` makes a merged MLX model of any type.",
    )
