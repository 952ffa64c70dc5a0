"""Adapters from MLX's names to PEFT's, and whether an adapter is for a model. The way back is `peft_names`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from mlxtune_convert.adapters import LAYER, other_rows
from mlxtune_convert.errors import UserError
from mlxtune_convert.hf.rules import MERGED, Layout
from mlxtune_convert.peft.adapter_folder import Adapter
from mlxtune_convert.peft.base_model import Base
from mlxtune_convert.peft.tensors import is_embedding

HEAD = "lm_head"  # PEFT's name of it in every family


def to_peft(adapter: Adapter, layout: Layout, base: str, own_head: bool | None) -> Adapter:
    """An adapter under MLX's names under PEFT's.

    base: the original model on the hub, or ""; own_head: whether the model has a head beside the embedding, None where
    that is not known. Raises UserError for what PEFT cannot express, saying what can.
    """
    updates = {}
    for path, update in adapter.updates.items():
        if is_embedding(f"{path}.weight"):
            raise UserError(f"LoRA on an embedding ({path}) cannot be carried over", "Train it in full instead.")
        updates[layout.peft_target(path)] = update
    trained: dict[str, np.ndarray] = {}
    for name, array in adapter.trained.items():
        path, _, own = name.rpartition(".")
        module, _, parameter = layout.peft_target(path, whole=True).partition(":")
        if parameter not in ("", "weight"):
            raise UserError(f"PEFT cannot save whole experts ({path})", MERGED)
        trained[f"{module}.{own}"] = array
    embedding = next((array for name, array in trained.items() if is_embedding(name)), None)
    if embedding is not None and own_head is None:
        raise UserError(
            "the embedding is trained, and config.json alone does not say whether it is the head as well",
            "Give the MLX model's folder, with its weights: --base DIR.",
        )
    tied = embedding is not None and not own_head
    if embedding is not None and tied:  # PEFT before 0.18 gives each use of a tied matrix its own copy
        trained[f"{HEAD}.weight"] = embedding
    turned = any(rule.axes == (1, 0) for rule in layout.rules)
    return replace(
        adapter,
        updates=updates,
        trained=trained,
        base=base,
        own_head=False,
        tied=tied,
        transposed=turned,
        alternate=layout.alternate,
    )


def check_fit(adapter: Adapter, base: Base, folder: Path, grown: bool) -> None:
    """Raise UserError when an adapter under MLX's names is not for this model: a layer, a shape or a block too many.

    Shapes are known only where the model's weights are at hand. grown: tokens were added with it, which have rows.
    """
    other = "Name the model that the adapter was trained on."
    layers = base.layers
    for path in adapter.updates:
        match = LAYER.fullmatch(path)
        if match and base.blocks is not None and int(match[2]) >= base.blocks:
            raise UserError(f"{folder}: it adapts {path}, the model has {base.blocks} blocks", other)
    if layers is None:
        return
    for path, update in adapter.updates.items():
        experts = update.a.shape[:-2]
        shape = (*experts, update.b.shape[-2], update.a.shape[-1])
        if not experts:
            shape = (update.b.shape[1], update.a.shape[0])
        if layers.shapes.get(path) != shape:
            found = f"is {layers.shapes[path]}" if path in layers.shapes else "is not there"
            raise UserError(f"{folder}: it adapts a matrix {path} of {shape}; in the model that {found}", other)
    for name, array in adapter.trained.items():
        path, _, part = name.rpartition(".")
        if path not in layers.shapes:
            raise UserError(f"{folder}: it holds {path}, which the model does not have", other)
        shape = layers.shapes[path]
        if part != "weight" or not shape or array.shape == shape:
            continue
        if array.shape[1:] != shape[1:]:
            raise UserError(f"{folder}: {name} is {array.shape}, the model needs {shape}", other)
        if not (grown and len(array) > shape[0]):
            hint = other_rows(len(array), shape[0])
            raise UserError(f"{folder}: {name} is {array.shape}, the model needs {shape}", hint)
