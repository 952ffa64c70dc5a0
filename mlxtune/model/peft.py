"""PEFT adapters and ours: the same updates under other names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from mlxtune_convert import layouts, peft
from mlxtune_convert.files import new_folder
from mlxtune_convert.tensors import save_checked

from mlxtune.data.chosen import Changes
from mlxtune.errors import UserError
from mlxtune.model import lora
from mlxtune.model.arrays import to_numpy
from mlxtune.model.hub import resolve
from mlxtune.model.layers import LINEAR, own_parameters
from mlxtune.model.load import open_model, source_of
from mlxtune.model.spec import Spec

LAYER = re.compile(r"(.+?)\.(\d+)\.(.+)")


def from_model(model: nn.Module, spec: Spec, config: dict[str, Any], base: str) -> peft.Adapter:
    """The adapter on a model as PEFT names it. config: of the original model; base: its name on the hub, or "".

    Raises UserError for what PEFT cannot express, saying what can.
    """
    layout = layouts.by_model_type(config)
    updates = {}
    for path, layer in lora.adapters(model).items():
        a, b = to_numpy(layer.lora_a), to_numpy(layer.lora_b)
        updates[layout.peft_target(path)] = peft.Update(a, b, layer.scale, to_numpy(layer.m) if "m" in layer else None)
    trained: dict[str, np.ndarray] = {}
    for path, layer in lora.in_full(model).items():
        module, _, parameter = layout.peft_target(path, whole=True).partition(":")
        if parameter not in ("", "weight"):
            raise UserError(f"PEFT cannot save whole experts ({path})", "`--to hf` exports the merged model.")
        trained.update({f"{module}.{name}": to_numpy(value) for name, value in own_parameters(layer).items()})
    embedding = next((array for name, array in trained.items() if "embed_tokens" in name), None)
    tied = embedding is not None and not lora.outside_blocks(model, LINEAR)
    if embedding is not None and tied:  # PEFT before 0.18 gives each use of a tied matrix its own copy
        trained["lm_head.weight"] = embedding
    turned = any(rule.axes == (1, 0) for rule in layout.rules)
    return peft.Adapter(updates, trained, spec.dropout, spec.variant == "rslora", base, tied=tied, transposed=turned)


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter, and no model beside it."""
    adapter = (path / peft.WEIGHTS_FILE).is_file() or (path / "adapter_model.bin").is_file()
    return adapter and not any(path.glob("model*.safetensors"))


def import_adapter(folder: Path, destination: Path, model: str | None, force: bool) -> tuple[int, Spec]:
    """Write a PEFT adapter as an MLX adapter folder; return how many layers it has, and what it is.

    model: the MLX model it is for, where the two have other names for its layers. Raises UserError naming the key, the
    tensor or the layer that cannot be carried over.
    """
    adapter = peft.read_adapter(folder)
    base = config = names = None
    if model is not None:
        path = resolve(model)
        base, config = open_model(path)
        layout = layouts.by_model_type(source_of(path)["config"])
        names = layout.peft_targets(p for p, module in base.named_modules() if own_parameters(module))
        names = {"lm_head": "lm_head", **names}  # also where it is tied, and no layer of its own
    elif any(":" in target for target in adapter.updates):
        raise UserError(
            f"{folder} adapts experts, whose names depend on the model's family", "Name the model: --base DIR"
        )
    updates = {_ours(target, names, folder): update for target, update in adapter.updates.items()}
    trained = {}
    for name, array in adapter.trained.items():
        module, _, parameter = name.rpartition(".")
        trained[f"{_ours(module, names, folder)}.{parameter}"] = array
    with new_folder(destination, force, [folder]) as work:
        ours = replace(adapter, updates=updates, trained=trained)
        spec = save(work, ours, None if base is None else len(base.layers))
        Changes.of_files(folder).save(work)
        if base is not None:
            lora.load_adapter(base, work, config)  # it must fit
    return len(updates) + len(spec.trained), spec


def save(work: Path, adapter: peft.Adapter, layers: int | None) -> Spec:
    """Write an adapter under MLX's names as an MLX adapter folder. layers: blocks of the base, None: not known."""
    spec = _spec(adapter, layers)
    tensors = dict(adapter.trained)
    for path, update in adapter.updates.items():
        tensors.update({f"{path}.lora_a": update.a, f"{path}.lora_b": update.b})
        if update.m is not None:
            tensors[f"{path}.m"] = update.m
    save_checked(work / spec.file, tensors, {"format": "mlx"})
    lora.save_config(work, spec)
    return spec


def _ours(target: str, names: Mapping[str, str] | None, folder: Path) -> str:
    if names is None:
        return target
    found = names.get(target) or names.get(f"{target}:weight")
    if found is None:
        raise UserError(f"{folder}: the model has no layer {target}", "Name the model that the adapter was trained on.")
    return found


def _spec(adapter: peft.Adapter, layers: int | None) -> Spec:
    """mlx-lm's layout where the last blocks (all, where their number is not known) are adapted alike, else each layer
    by its path."""
    modules = {path: (update.rank, update.scale) for path, update in adapter.updates.items()}
    blocks: dict[int, set[str]] = {}
    for match in filter(None, map(LAYER.fullmatch, modules)):
        blocks.setdefault(int(match[2]), set()).add(match[3])
    keys = set().union(*blocks.values())
    outside = {path for path in modules if not LAYER.fullmatch(path)}
    first = 0 if layers is None else min(blocks, default=0)
    last_ones = bool(blocks) and set(blocks) == set(range(first, layers or len(blocks)))
    if layers is None and adapter.some_blocks:
        last_ones = False  # or the first ones: nothing says how many blocks come after them
    alike = last_ones and all(block == keys for block in blocks.values()) and len(set(modules.values())) == 1
    dora = any(update.m is not None for update in adapter.updates.values())
    rank, scale = next(iter(modules.values()), (0, 0.0))
    return Spec(
        rank,
        scale,
        adapter.dropout,
        tuple(sorted(keys | outside)) if alike else (),
        len(blocks) if alike else 0,
        "dora" if dora else "rslora" if adapter.rslora else "lora",
        {} if alike else modules,
        tuple(dict.fromkeys(name.rpartition(".")[0] for name in adapter.trained)),
        adapter.own_head,
        adapter.base,
    )
