"""Which layout a configuration has: its tensors in Hugging Face's files and in MLX's; or why none, so no export.

What is known of each family is in `families/`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxtune_convert.errors import UserError
from mlxtune_convert.families.table import FAMILIES, family_of
from mlxtune_convert.hf import unheeded
from mlxtune_convert.hf.rules import Layout

LAYOUTS: dict[str, Layout] = {name: family.hf for name, family in FAMILIES.items() if family.hf is not None}
# Families that both libraries have, and why their models leave as MLX folders only.
NOT_EXPORTED = {name: family.not_exported for name, family in sorted(FAMILIES.items()) if family.not_exported}


def differs(config: dict[str, Any]) -> str:
    """Why mlx-lm's model of this configuration is not the one in transformers, or "". Found by comparing logits."""
    family = family_of(config)
    why = family.differs(config) if family.differs else ""
    return why or unheeded.why(config)


def of(config: dict[str, Any]) -> Layout:
    """The layout of a configuration, whether or not an export can be; an empty one where there is none."""
    family = family_of(config)
    if family.hf_of:
        return family.hf_of(config)
    return family.hf or Layout()


def by_model_type(config: dict[str, Any]) -> Layout:
    """The layout of a config.json. Raises UserError naming why an export cannot be, and what works instead."""
    kind = str(config.get("model_type"))
    why = differs(config) or NOT_EXPORTED.get(kind)
    if why:
        raise UserError(
            f"models of type {kind} cannot be exported: {why}",
            "`mlxtune fuse` makes a merged MLX model, which is what was trained.",
        )
    if kind not in LAYOUTS:
        raise UserError(
            f"models of type {kind} cannot be exported yet (covered: {', '.join(sorted(LAYOUTS))})",
            "`mlxtune fuse` makes a merged MLX model of any type.",
        )
    layout = of(config)
    try:
        return replace(layout, dropped=tuple(part.format_map(config) for part in layout.dropped))
    except KeyError as error:
        raise UserError(f"config.json of a model of type {kind} lacks {error}", "Name a whole one.") from error
