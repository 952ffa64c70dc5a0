"""An adapter on a model (LoRA, Hu et al. 2021, arXiv:2106.09685): put there, asked for what it trained, switched off.

Attaching changes the model itself. With a plan that adapts q_proj and trains the norm,

    model.layers.0.self_attn.q_proj    Linear   ->  LoRALinear, which holds the Linear as `linear`
    model.norm                         RMSNorm  ->  TrainedRMSNorm, which holds the RMSNorm as `frozen`

and everything else is frozen. `adapter_files` keeps what these two train in a folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlxtune_convert.adapters import FACTORS, OTHER_MODEL

from mlxtune.adapter.dropout import DropoutKeys, keys_for
from mlxtune.adapter.layers import (
    LINEAR,
    SWITCH,
    VARIANTS,
    AdaptedLayer,
    TrainedInFull,
    own_parameters,
    trained_in_full,
)
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.errors import UserError
from mlxtune.model.load import model_dtype


def attach(model: nn.Module, plan: AdapterPlan, seed: int = 0) -> DropoutKeys:
    """Freeze the model, wrap the layers that the plan adapts, replace those that train in full; only these train.

    Returns the keys object that a training step sets before each forward pass. Raises UserError when the plan is not
    for this model, or its variant has no form for a layer.
    """
    model.freeze()
    dropout = DropoutKeys(plan.dropout)
    modules = dict(model.named_modules())
    _require_fit(plan, modules)
    replaced: list[tuple[str, nn.Module]] = []  # (path in the model, the layer that comes there)
    for index, (path, (rank, scale)) in enumerate(plan.modules.items()):
        kind: Any = _kind(plan.variant, path, modules[path])
        layer = kind(modules[path], rank, scale, _init_key(seed, index), index, dropout)
        layer.unfreeze(keys=list(FACTORS), recurse=False, strict=False)
        replaced.append((path, layer))
    dtype = model_dtype(model)
    for path in plan.trained:
        replaced.append((path, trained_in_full(modules[path], dtype)))
    # Parents first: a block's own parameters and those of its parts may both train.
    for path, layer in sorted(replaced, key=lambda pair: pair[0].count(".")):
        model.update_modules(tree_unflatten([(path, layer)]))
    return dropout


def _require_fit(plan: AdapterPlan, modules: Mapping[str, nn.Module]) -> None:
    """Raise UserError unless a model has every layer that the plan names. modules: of the model, by path."""
    for path in (*plan.modules, *plan.trained):
        if path not in modules:
            raise UserError(f"the adapter does not fit this model, which has no {path}", OTHER_MODEL)
    if not (plan.modules or plan.trained):
        raise UserError("the adapter has no layer that this model has", OTHER_MODEL)
    for path in plan.modules:
        if not isinstance(modules[path], LINEAR + SWITCH):
            raise UserError(f"the adapter does not fit this model, whose {path} is no linear layer", OTHER_MODEL)


def _kind(variant: str, path: str, layer: nn.Module) -> type[AdaptedLayer]:
    """The class that adapts a layer. Raises UserError where the variant has none for it."""
    forms = VARIANTS[variant]
    if not isinstance(layer, SWITCH):
        return forms.linear
    if forms.experts is None:
        raise UserError(
            f"{forms.title} has no form for expert layers ({path})", "Name other lora.targets, or use lora."
        )
    return forms.experts


def _init_key(seed: int, index: int) -> mx.array:
    """[2] uint32: the random key that the adapted layer of this number starts from."""
    return mx.array(keys_for(seed, 0, [index], 1)[0, 0])


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Every adapted layer by its path in the model, such as `model.layers.0.self_attn.q_proj`."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLayer)}


def layers_in_full(model: nn.Module) -> dict[str, Any]:
    """Every layer trained in full by its path in the model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, TrainedInFull)}


def trained_tensors(model: nn.Module) -> dict[str, mx.array]:
    """Everything that trains, float32, under mlx-lm's names: `<path>.lora_a` and the like, and the parameters of
    layers trained in full. Their shapes are those of `layers`.
    """
    found = {}
    for path, layer in adapted_layers(model).items():
        for name in FACTORS:
            if name in layer:
                found[f"{path}.{name}"] = layer[name]
    for path, layer in layers_in_full(model).items():
        for name, value in own_parameters(layer).items():
            found[f"{path}.{name}"] = value
    return found


def summed_in_any_order(model: nn.Module) -> str:
    """What of a model has gradients that a GPU adds up in no fixed order, for a sentence; "" for nothing.

    MLX's scatter-add is atomic there. It adds up the rows of a trained embedding, one for each time a token occurs, and
    the inputs that several experts share.
    """
    found = []
    if any(isinstance(layer, nn.Embedding) for layer in layers_in_full(model).values()):
        found.append("trained embeddings")
    if any(isinstance(module, SWITCH) for _, module in model.named_modules()):
        found.append("experts")
    return " and ".join(found)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base: every adapter's scale is zero, every layer trained in full is the old one."""
    adapted = list(adapted_layers(model).values())
    scales = [layer.scale for layer in adapted]
    full = layers_in_full(model)
    for layer in adapted:
        layer.scale = 0.0
    for path, layer in full.items():
        model.update_modules(tree_unflatten([(path, layer.frozen.module)]))
    try:
        yield
    finally:
        for layer, scale in zip(adapted, scales, strict=True):
            layer.scale = scale
        for path, layer in full.items():
            model.update_modules(tree_unflatten([(path, layer)]))


def describe(plan: AdapterPlan, model: nn.Module) -> str:
    """One line for people: what is trained. model: with the adapter on it."""
    count = sum(array.size for array in trained_tensors(model).values())
    if not plan.modules:
        return f"{count:,} parameters (in full: {len(plan.trained)} layers)"
    names = sorted({path.rsplit(".", 1)[-1] for path in plan.modules})
    ranks = sorted({rank for rank, _ in plan.modules.values()})
    how = f"{plan.variant}, rank {ranks[0]}"
    if len(ranks) > 1:
        how += f" to {ranks[-1]}"
    else:
        _, scale = next(iter(plan.modules.values()))
        how += f", scale {scale:g}"
    also = f"; in full: {len(plan.trained)} layers" if plan.trained else ""
    return f"{count:,} parameters ({how}, {', '.join(names)}{also})"
