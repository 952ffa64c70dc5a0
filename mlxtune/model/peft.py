"""PEFT adapters and ours: the same updates under other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlxtune_convert import adapters, crossing, layouts, peft
from mlxtune_convert.adapters import save_adapter
from mlxtune_convert.files import new_folder

from mlxtune.data.chosen import Changes
from mlxtune.model import lora
from mlxtune.model.arrays import to_numpy
from mlxtune.model.hub import resolve
from mlxtune.model.layers import own_parameters
from mlxtune.model.load import open_model, source_of
from mlxtune.model.spec import Spec


def from_model(model: nn.Module, spec: Spec, config: dict[str, Any], base: str) -> peft.Adapter:
    """The adapter on a model as PEFT names it. config: of the original model; base: its name on the hub, or "".

    Raises UserError for what PEFT cannot express, saying what can.
    """
    layout = layouts.by_model_type(config)
    updates = {
        path: peft.Update(
            to_numpy(layer.lora_a), to_numpy(layer.lora_b), layer.scale, to_numpy(layer.m) if "m" in layer else None
        )
        for path, layer in lora.adapters(model).items()
    }
    trained = {
        f"{path}.{name}": to_numpy(value)
        for path, layer in lora.in_full(model).items()
        for name, value in own_parameters(layer).items()
    }
    ours = peft.Adapter(updates, trained, spec.dropout, spec.variant == "rslora")
    return crossing.to_peft(ours, layout, base, crossing.has_head(layout, _paths(model)))


def _paths(model: nn.Module) -> list[str]:
    """Of every layer that holds parameters itself."""
    return [path for path, module in model.named_modules() if own_parameters(module)]


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter, and no model beside it."""
    adapter = (path / peft.WEIGHTS_FILE).is_file() or (path / "adapter_model.bin").is_file()
    return adapter and not any(path.glob("model*.safetensors"))


def import_adapter(folder: Path, destination: Path, model: str | None, force: bool) -> tuple[int, adapters.Spec]:
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
        names = crossing.names_of(layout, _paths(base))
    ours = crossing.from_peft(adapter, names, folder)
    with new_folder(destination, force, [folder]) as work:
        spec = save_adapter(work, ours, None if base is None else len(base.layers))
        Changes.of_files(folder).save(work)
        if base is not None:
            lora.load_adapter(base, work, config)  # it must fit
    return len(ours.updates) + len(spec.trained), spec
