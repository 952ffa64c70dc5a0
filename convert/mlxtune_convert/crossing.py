"""Adapters across the fence: the same updates under MLX's names and under PEFT's.

Which layer is which follows from the family's layout (`layouts`); which layers there are, from the weights of the MLX
model where they are at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxtune_convert import layouts
from mlxtune_convert.adapters import LAYER
from mlxtune_convert.errors import UserError
from mlxtune_convert.peft import Adapter
from mlxtune_convert.rules import MERGED, Layout

HEAD = "lm_head"  # PEFT's name of it in every family
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "embeddings")  # last names of the token embedding
BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # config.json's names of their number


@dataclass(frozen=True)
class Base:
    """The model an adapter is for, as far as names need it.

    config: of the original model; modules: path in MLX -> shape of its matrix when dense, for every layer there is;
    None where the weights are not at hand, or not in MLX's form.
    """

    config: dict[str, Any]
    modules: Mapping[str, tuple[int, ...]] | None = None

    @property
    def layout(self) -> Layout:
        """Raises UserError for a family whose names are not known."""
        return layouts.by_model_type(self.config)

    @property
    def blocks(self) -> int | None:
        """How many blocks there are, where the configuration says so."""
        text = self.config.get("text_config") or {}
        found = [part[name] for part in (self.config, text) for name in BLOCKS if isinstance(part.get(name), int)]
        return found[0] if found else None


def has_head(layout: Layout, modules: Iterable[str]) -> bool:
    """Whether an MLX model has a head of its own, beside the embedding. modules: its layers' paths."""
    return HEAD in layout.peft_targets(modules)


def to_peft(adapter: Adapter, layout: Layout, base: str, own_head: bool | None) -> Adapter:
    """An adapter under MLX's names under PEFT's.

    base: the original model on the hub, or ""; own_head: whether the model has a head beside the embedding, None where
    that is not known. Raises UserError for what PEFT cannot express, saying what can.
    """
    updates = {}
    for path, update in adapter.updates.items():
        if path.rpartition(".")[2] in EMBEDDINGS:
            raise UserError(f"LoRA on an embedding ({path}) cannot be carried over", "Train it in full instead.")
        updates[layout.peft_target(path)] = update
    trained: dict[str, np.ndarray] = {}
    for name, array in adapter.trained.items():
        path, _, own = name.rpartition(".")
        module, _, parameter = layout.peft_target(path, whole=True).partition(":")
        if parameter not in ("", "weight"):
            raise UserError(f"PEFT cannot save whole experts ({path})", MERGED)
        trained[f"{module}.{own}"] = array
    embedding = next((array for name, array in trained.items() if name.split(".")[-2] in EMBEDDINGS), None)
    if embedding is not None and own_head is None:
        raise UserError(
            "the embedding is trained, and config.json alone does not say whether it is the head as well",
            "Give the MLX model's folder, with its weights: --base DIR.",
        )
    tied = embedding is not None and not own_head
    if embedding is not None and tied:  # PEFT before 0.18 gives each use of a tied matrix its own copy
        trained[f"{HEAD}.weight"] = embedding
    turned = any(rule.axes == (1, 0) for rule in layout.rules)
    return replace(adapter, updates=updates, trained=trained, base=base, own_head=False, tied=tied, transposed=turned)


def names_of(layout: Layout, modules: Iterable[str]) -> dict[str, str]:
    """PEFT's name -> path in MLX, for the layers of an MLX model."""
    return {HEAD: HEAD, **layout.peft_targets(modules)}  # the head also where it is tied, and no layer of its own


def names_by_table(adapter: Adapter, layout: Layout) -> dict[str, str]:
    """The same for the layers of an adapter under PEFT's names, where the model's weights are not at hand."""
    targets = {*adapter.updates, *(name.rpartition(".")[0] for name in adapter.trained)}
    return {target: HEAD if target == HEAD else layout.mlx_path(target) for target in targets}


def from_peft(adapter: Adapter, names: Mapping[str, str] | None, folder: Path) -> Adapter:
    """An adapter under PEFT's names under MLX's. names: PEFT's -> MLX's, None: the same; folder: for messages.

    Raises UserError when the model has no such layer.
    """
    if names is None and any(":" in target for target in adapter.updates):
        raise UserError(
            f"{folder} adapts experts, whose names depend on the model's family", "Name the model: --base DIR"
        )
    updates = {_ours(target, names, folder): update for target, update in adapter.updates.items()}
    trained = {}
    for name, array in adapter.trained.items():
        module, _, parameter = name.rpartition(".")
        trained[f"{_ours(module, names, folder)}.{parameter}"] = array
    return replace(adapter, updates=updates, trained=trained)


def _ours(target: str, names: Mapping[str, str] | None, folder: Path) -> str:
    if names is None:
        return target
    found = names.get(target) or names.get(f"{target}:weight")
    if found is None:
        raise UserError(f"{folder}: the model has no layer {target}", "Name the model that the adapter was trained on.")
    return found


def check_fit(adapter: Adapter, base: Base, folder: Path) -> None:
    """Raise UserError when an adapter under MLX's names is not for this model: a layer, a shape or a block too many.

    Shapes are known only where the model's weights are at hand.
    """
    other = "Name the model that the adapter was trained on."
    for path in adapter.updates:
        match = LAYER.fullmatch(path)
        if match and base.blocks is not None and int(match[2]) >= base.blocks:
            raise UserError(f"{folder}: it adapts {path}, the model has {base.blocks} blocks", other)
    if base.modules is None:
        return
    for path, update in adapter.updates.items():
        experts = update.a.shape[:-2]
        shape = (*experts, update.b.shape[-2], update.a.shape[-1])
        if not experts:
            shape = (update.b.shape[1], update.a.shape[0])
        if base.modules.get(path) != shape:
            found = f"is {base.modules[path]}" if path in base.modules else "is not there"
            raise UserError(f"{folder}: it adapts a matrix {path} of {shape}; in the model that {found}", other)
    for name in adapter.trained:
        path = name.rpartition(".")[0]
        if path not in base.modules:
            raise UserError(f"{folder}: it holds {path}, which the model does not have", other)
