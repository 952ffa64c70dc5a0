"""PEFT adapters and ours: the same updates under other names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlxtune_convert.adapters import FACTORS, OTHER_MODEL, AdapterConfig, save_adapter
from mlxtune_convert.files import contents, new_folder, read_json
from mlxtune_convert.hf import families
from mlxtune_convert.peft import adapter_folder, base_model, crossing, settings
from mlxtune_convert.peft.tensors import WEIGHTS_FILE

from mlxtune.adapter import adapter_files, attach
from mlxtune.adapter.layers import own_parameters
from mlxtune.adapter.peft_base import Base
from mlxtune.adapter.plan import heads
from mlxtune.data.template.tokenizer_changes import Changes
from mlxtune.errors import UserError
from mlxtune.model.arrays import to_numpy
from mlxtune.model.hub import resolve

IN_PEFT = {"lora_a", "lora_b", "m"}  # of a variant's tensors, those that PEFT has a place for


def from_model(model: nn.Module, saved: AdapterConfig, config: dict[str, Any], base: str) -> adapter_folder.Adapter:
    """The adapter on a model as PEFT names it.

    saved: what the adapter's folder says of it; config: of the original model; base: its name on the hub, or "". Raises
    UserError for what PEFT cannot express, saying what can.
    """
    layout = families.by_model_type(config)
    updates = {}
    for path, layer in attach.adapted_layers(model).items():
        if any(name in layer for name in set(FACTORS) - IN_PEFT):
            problem = f"PEFT has no form for adapters of the variant {saved.variant}"
            raise UserError(problem, "Export a merged model: --to hf.")
        length = to_numpy(layer.m) if "m" in layer else None  # DoRA's
        updates[path] = adapter_folder.Update(to_numpy(layer.lora_a), to_numpy(layer.lora_b), layer.scale, length)
    trained = {}
    for path, layer in attach.layers_in_full(model).items():
        for name, value in own_parameters(layer).items():
            trained[f"{path}.{name}"] = to_numpy(value)
    ours = adapter_folder.Adapter(updates, trained, saved.dropout, saved.variant == "rslora")
    return crossing.to_peft(ours, layout, base, bool(heads(model)))


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter, and no model beside it."""
    if any(path.glob("model*.safetensors")) or any(path.glob("adapters.safetensors")):
        return False
    return has_weights(path) or _says_peft(path)


def has_weights(path: Path) -> bool:
    """Whether a folder holds the tensors of a PEFT adapter, whatever else is there."""
    return any((path / name).is_file() for name in (WEIGHTS_FILE, "adapter_model.bin"))


def _says_peft(path: Path) -> bool:
    file = path / settings.CONFIG_FILE
    return file.is_file() and "peft_type" in read_json(file, "a PEFT adapter")


def refuse_several(path: Path) -> None:
    """Raise UserError for a folder of adapters, such as PEFT's for several or a trainer's checkpoints."""
    if (path / "config.json").is_file() or not path.is_dir():
        return
    inside = [folder.name for folder in contents(path) if folder.is_dir() and is_adapter(folder)]
    if inside:
        raise UserError(
            f"{path} holds PEFT adapters in its folders: {', '.join(inside[:4])}{', ...' if inside[4:] else ''}",
            f"Name one: mlxtune convert {path / inside[-1]} ADAPTER",
        )


@dataclass(frozen=True)
class Imported:
    """What an import made."""

    # How many layers are adapted or trained in full.
    layers: int
    # What was written into adapter_config.json.
    saved: AdapterConfig
    # Lines that a person must read.
    notes: tuple[str, ...] = ()


def import_adapter(folder: Path, destination: Path, model: str | None, force: bool) -> Imported:
    """Write a PEFT adapter as an MLX adapter folder.

    model: the MLX model it is for; where none is named, the folder that adapter_config.json names, if there is one
    here. Raises UserError naming the key, the tensor or the layer that cannot be carried over.
    """
    notes: list[str] = []
    base = Base.of(resolve(model)) if model is not None else base_model.named(folder, notes, Base.of)
    ours = base_model.read(folder, base, notes)
    with new_folder(destination, force, [folder, *([base.path] if base is not None else [])]) as work:
        saved = save_adapter(work, ours, None if base is None else len(base.model.layers))
        Changes.of_files(folder).save(work)
        if base is not None:
            _must_fit(base, work, saved, folder)
    return Imported(len(ours.updates) + len(saved.trained), saved, tuple(notes))


def _must_fit(base: Base, work: Path, saved: AdapterConfig, folder: Path) -> None:
    """Load an adapter that was just written as it will be used. folder: where it comes from."""
    saved.check_head(bool(base.own_head), folder)
    try:
        adapter_files.load_adapter(base.model, work, base.config)
    except UserError as error:
        hint = "Name the model that it was trained on." if error.hint == OTHER_MODEL else error.hint
        raise UserError(error.message, hint) from error
