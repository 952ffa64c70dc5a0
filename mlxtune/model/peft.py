"""PEFT adapters and ours: the same updates under other names."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
        target = layout.peft_target(path)
        half = target.partition("#")[2]
        m = to_numpy(layer.m) if "m" in layer else None
        updates[target] = peft.Update(to_numpy(layer.lora_a), to_numpy(layer.lora_b), layer.scale, m, half)
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
    names = _names(model)
    if names is None and any(":" in target for target in adapter.updates):
        raise UserError(
            f"{folder} adapts experts, whose names depend on the model's family", "Name the model: --model DIR"
        )
    updates = {_ours(target, names, folder): update for target, update in adapter.updates.items()}
    trained = {}
    for name, array in adapter.trained.items():
        module, _, parameter = name.rpartition(".")
        trained[f"{_ours(module, names, folder)}.{parameter}"] = array
    spec = _spec(updates, trained, adapter)
    tensors = dict(trained)
    for path, update in updates.items():
        tensors.update({f"{path}.lora_a": update.a, f"{path}.lora_b": update.b})
        if update.m is not None:
            tensors[f"{path}.m"] = update.m
    with new_folder(destination, force, [folder]) as work:
        save_checked(work / spec.file, {n: np.ascontiguousarray(a) for n, a in tensors.items()}, {"format": "mlx"})
        lora.save_config(work, spec)
        Changes.of_files(folder).save(work)
        if model is not None:
            loaded, config = open_model(resolve(model))
            lora.load_adapter(loaded, work, config)  # it must fit
    return len(updates) + len(spec.trained), spec


def _names(model: str | None) -> dict[str, str] | None:
    """PEFT's name -> MLX path of a model's layers; None: they are the same."""
    if model is None:
        return None
    path = resolve(model)
    layout = layouts.by_model_type(source_of(path)["config"])
    modules = dict(open_model(path)[0].named_modules())
    names = layout.peft_targets(p for p, module in modules.items() if own_parameters(module))
    return {"lm_head": "lm_head", **names}  # also where it is tied, and no layer of its own


def _ours(target: str, names: Mapping[str, str] | None, folder: Path) -> str:
    if names is None:
        return target
    found = names.get(target) or names.get(f"{target}:weight")
    if found is None:
        raise UserError(f"{folder}: the model has no layer {target}", "Name the model that the adapter was trained on.")
    return found


def _spec(updates: dict[str, peft.Update], trained: dict[str, np.ndarray], adapter: peft.Adapter) -> Spec:
    """mlx-lm's layout where every block from the first is adapted alike, else each layer by its path."""
    modules = {path: (u.a.shape[-2] if u.a.ndim == 3 else u.a.shape[1], u.scale) for path, u in updates.items()}
    blocks: dict[int, set[str]] = {}
    outside = set()
    for path in updates:
        match = LAYER.fullmatch(path)
        if match:
            blocks.setdefault(int(match[2]), set()).add(match[3])
        else:
            outside.add(path)
    keys = set().union(*blocks.values()) if blocks else set()
    whole = set(blocks) == set(range(len(blocks))) and all(block == keys for block in blocks.values())
    alike = whole and bool(blocks) and len(set(modules.values())) == 1
    dora = any(update.m is not None for update in updates.values())
    rank, scale = next(iter(modules.values()), (0, 0.0))
    return Spec(
        rank,
        scale,
        adapter.dropout,
        tuple(sorted(keys | outside)) if alike else (),
        len(blocks) if alike else 0,
        "dora" if dora else "rslora" if adapter.rslora else "lora",
        {} if alike else modules,
        tuple(dict.fromkeys(name.rpartition(".")[0] for name in trained)),
        adapter.own_head,
        adapter.base,
    )
