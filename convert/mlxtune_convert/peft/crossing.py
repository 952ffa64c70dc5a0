"""Adapters from MLX's names to PEFT's, and whether an adapter is for a model. The way back is `names.to_mlx`."""

from __future__ import annotations

from collections.abc import Sequence
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
OTHER = "Name the model that the adapter was trained on."


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
    for path in adapter.updates:
        match = LAYER.fullmatch(path)
        if match and base.blocks is not None and int(match[2]) >= base.blocks:
            raise UserError(f"{folder}: it adapts {path}, the model has {base.blocks} blocks", OTHER)
    if base.layers is None:
        return
    shapes = base.layers.shapes
    for path, update in adapter.updates.items():
        shape = update.matrix_shape
        if shapes.get(path) != shape:
            found = f"is {shapes[path]}" if path in shapes else "is not there"
            raise UserError(f"{folder}: it adapts a matrix {path} of {shape}; in the model that {found}", OTHER)
    for name, array in adapter.trained.items():
        path = name.rpartition(".")[0]
        if path not in shapes:
            raise UserError(f"{folder}: it holds {path}, which the model does not have", OTHER)
        if name.endswith(".weight") and shapes[path]:
            _check_whole(name, array, shapes[path], folder, grown)


def _check_whole(name: str, array: np.ndarray, shape: Sequence[int], folder: Path, grown: bool) -> None:
    """array: a matrix that replaces the model's, which is of `shape`, such as [tokens, width] of an embedding."""
    if array.shape == tuple(shape):
        return
    if array.shape[1:] != tuple(shape[1:]):
        raise UserError(f"{folder}: {name} is {array.shape}, the model needs {shape}", OTHER)
    if not (grown and len(array) > shape[0]):
        hint = other_rows(len(array), shape[0])
        raise UserError(f"{folder}: {name} is {array.shape}, the model needs {shape}", hint)
