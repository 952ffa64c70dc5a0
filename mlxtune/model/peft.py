"""PEFT adapters and ours: the same updates under other names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from mlxtune_convert import layouts, peft
from mlxtune_convert.files import contents, new_folder, read_json
from mlxtune_convert.peft_config import Settings
from mlxtune_convert.peft_names import to_mlx
from mlxtune_convert.peft_tensors import is_embedding
from mlxtune_convert.tensors import save_checked

from mlxtune.data.chosen import Changes
from mlxtune.data.tokenizer import load_tokenizer
from mlxtune.errors import UserError
from mlxtune.model import lora
from mlxtune.model.arrays import to_numpy
from mlxtune.model.hub import resolve
from mlxtune.model.layers import LINEAR, own_parameters
from mlxtune.model.peft_base import Base
from mlxtune.model.spec import Spec, outside_blocks

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
    embedding = next((array for name, array in trained.items() if is_embedding(name)), None)
    tied = embedding is not None and not outside_blocks(model, LINEAR)
    if embedding is not None and tied:  # PEFT before 0.18 gives each use of a tied matrix its own copy
        trained["lm_head.weight"] = embedding
    turned = any(rule.axes == (1, 0) for rule in layout.rules)
    rslora, alternate = spec.variant == "rslora", layout.alternate
    return peft.Adapter(updates, trained, spec.dropout, rslora, base, tied=tied, transposed=turned, alternate=alternate)


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter, and no model beside it."""
    if any(path.glob("model*.safetensors")) or any(path.glob("adapters.safetensors")):
        return False
    return has_weights(path) or _says_peft(path)


def has_weights(path: Path) -> bool:
    """Whether a folder holds the tensors of a PEFT adapter, whatever else is there."""
    return any((path / name).is_file() for name in (peft.WEIGHTS_FILE, "adapter_model.bin"))


def _says_peft(path: Path) -> bool:
    file = path / peft.CONFIG_FILE
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
    """What an import made. layers: how many are adapted or trained; spec: what it is; notes: what there is to say."""

    layers: int
    spec: Spec
    notes: tuple[str, ...] = ()


def import_adapter(folder: Path, destination: Path, model: str | None, force: bool) -> Imported:
    """Write a PEFT adapter as an MLX adapter folder.

    model: the MLX model it is for; where none is named, the folder that adapter_config.json names, if there is one
    here. Raises UserError naming the key, the tensor or the layer that cannot be carried over.
    """
    notes: list[str] = []
    base = Base.of(resolve(model)) if model is not None else _named_base(folder, notes)
    adapter = peft.read_adapter(folder, None if base is None else base.matrix)
    if base is not None:
        _refuse_plain_tokens(base, folder)
        adapter = base.completed(adapter, notes)
    ours, said = to_mlx(adapter, None if base is None else base.names, folder)
    notes += said
    with new_folder(destination, force, [folder]) as work:
        spec = save(work, ours, None if base is None else len(base.model.layers))
        Changes.of_files(folder).save(work)
        if base is not None:
            _must_fit(base, work, spec, folder)
    return Imported(len(ours.updates) + len(spec.trained), spec, tuple(notes))


def _refuse_plain_tokens(base: Base, folder: Path) -> None:
    """Raise UserError where the tokenizer beside an adapter has tokens that the model's has not and that are not
    special: they split words otherwise, and of added tokens only special ones are kept beside an adapter.
    """
    if not (folder / "tokenizer_config.json").is_file() or not (base.path / "tokenizer_config.json").is_file():
        return
    known = load_tokenizer(base.path).get_vocab()
    added = load_tokenizer(folder).added_tokens_decoder.values()
    new = [token.content for token in added if not token.special and token.content not in known]
    if new:
        raise UserError(
            f"{folder}: its tokenizer has added tokens that are no special ones: {', '.join(new[:4])}",
            "Merge it with PEFT (merge_and_unload, then save_pretrained), save the tokenizer there as well, and "
            "convert the merged model.",
        )


def _must_fit(base: Base, work: Path, spec: Spec, folder: Path) -> None:
    """Load an adapter that was just written as it will be used. folder: where it comes from."""
    lora.check_head(base.model, spec, folder)
    try:
        lora.load_adapter(base.model, work, base.config)
    except UserError as error:
        hint = "Name the model that it was trained on." if error.hint == lora.OTHER_MODEL else error.hint
        raise UserError(error.message, hint) from error


def _named_base(folder: Path, notes: list[str]) -> Base | None:
    """The base that an adapter names, where that is a folder here: what its family calls the layers is known then."""
    name = Settings.read(folder).base
    if not name or not (Path(name) / "config.json").is_file():
        return None
    try:
        base = Base.of(Path(name))
    except UserError as error:
        notes.append(f"its base {name} cannot be read ({error.message}): that the adapter fits is not checked.")
        return None
    notes.append(f"the names of its layers are those of {name}, which it was trained on.")
    return base


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
        adapter.tied,
    )
