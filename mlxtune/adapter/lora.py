"""Adapters on a model (LoRA, Hu et al. 2021, arXiv:2106.09685): attached, saved, loaded; names and files as in mlx-lm
(`mlxtune_convert.adapters`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlxtune_convert.adapters import CONFIG_FILE, FACTORS, OTHER_MODEL, UNTIE, adapter_file, other_rows
from mlxtune_convert.tensors import require_fractions

from mlxtune.adapter.dropout import DropoutKeys, keys_for
from mlxtune.adapter.layers import (
    LINEAR,
    SWITCH,
    Adapter,
    DoRALinear,
    LoRALinear,
    LoRASwitchLinear,
    Trained,
    own_parameters,
    trained,
)
from mlxtune.adapter.plan import ADAPTER_FILE, OWN_FILE, Spec, heads, places
from mlxtune.adapter.vocabulary import fit
from mlxtune.errors import UserError
from mlxtune.machine.gpu_errors import recognise
from mlxtune.model.arrays import save_arrays, to_numpy
from mlxtune.model.load import model_dtype

__all__ = [
    "ADAPTER_FILE",
    "CONFIG_FILE",
    "FACTORS",
    "LINEAR",
    "OTHER_MODEL",
    "OWN_FILE",
    "SWITCH",
    "UNTIE",
    "Adapter",
    "LoRALinear",
    "Spec",
    "adapter_file",
]


def attach(model: nn.Module, spec: Spec, seed: int = 0) -> DropoutKeys:
    """Freeze the model, wrap its target layers, replace those that train in full; only these stay trainable.

    Returns the keys object that a training step sets before each forward pass.
    """
    model.freeze()
    dropout = DropoutKeys(spec.dropout)
    modules = dict(model.named_modules())
    chosen = spec.modules or dict.fromkeys(places(model, spec), (spec.rank, spec.scale))
    unknown = [path for path in (*chosen, *spec.trained) if path not in modules]
    if unknown:
        raise UserError(f"the adapter does not fit this model, which has no {unknown[0]}", OTHER_MODEL)
    if not (chosen or spec.trained):
        raise UserError("the adapter has no layer that this model has", OTHER_MODEL)
    other = [path for path in chosen if not isinstance(modules[path], LINEAR + SWITCH)]
    if other:
        raise UserError(f"the adapter does not fit this model, whose {other[0]} is no linear layer", OTHER_MODEL)
    wrapped: list[tuple[str, nn.Module]] = []
    for index, (path, (rank, scale)) in enumerate(chosen.items()):
        kind: Any = LoRASwitchLinear if isinstance(modules[path], SWITCH) else LoRALinear
        if spec.variant == "dora":
            if kind is LoRASwitchLinear:
                raise UserError(f"DoRA has no form for expert layers ({path})", "Name other lora.targets, or use lora.")
            kind = DoRALinear
        layer = kind(modules[path], rank, scale, _init_key(seed, index), index, dropout)
        layer.unfreeze(keys=list(FACTORS), recurse=False, strict=False)
        wrapped.append((path, layer))
    dtype = model_dtype(model)
    for path in spec.trained:
        wrapped.append((path, trained(modules[path], dtype)))
    # Parents first: a block's own parameters and those of its parts may both train.
    for path, layer in sorted(wrapped, key=lambda pair: pair[0].count(".")):
        model.update_modules(tree_unflatten([(path, layer)]))
    return dropout


def _init_key(seed: int, index: int) -> mx.array:
    return mx.array(keys_for(seed, 0, [index], 1)[0, 0])


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Every adapted layer by its path in the model, such as `model.layers.0.self_attn.q_proj`."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapter)}


def in_full(model: nn.Module) -> dict[str, Any]:
    """Every layer trained in full by its path in the model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Trained)}


def summed_in_any_order(model: nn.Module) -> str:
    """Of what a GPU adds up gradients in no fixed order, for a sentence; "" for nothing. MLX's scatter-add is atomic
    there: of the rows of a trained embedding, one for each time a token occurs, and of the inputs that several experts
    share.
    """
    trained = any(isinstance(layer, nn.Embedding) for layer in in_full(model).values())
    experts = any(isinstance(module, SWITCH) for _, module in model.named_modules())
    return " and ".join(["trained embeddings"] * trained + ["experts"] * experts)


def factors(model: nn.Module) -> dict[str, mx.array]:
    """Everything that was trained, under mlx-lm's names."""
    out = {
        f"{path}.{name}": layer[name] for path, layer in adapters(model).items() for name in FACTORS if name in layer
    }
    for path, layer in in_full(model).items():
        out.update({f"{path}.{name}": value for name, value in own_parameters(layer).items()})
    return out


def save_config(folder: Path, spec: Spec) -> None:
    """adapter_config.json, as mlx-lm reads it where it can hold the adapter."""
    spec.save(folder)


def read_spec(folder: Path) -> Spec:
    """The adapter that a run folder (or any mlx-lm adapter folder) holds. Raises UserError when it holds none."""
    return Spec.read(folder)


def load_adapter(model: nn.Module, folder: Path, config: dict[str, Any] | None = None) -> Spec:
    """Attach the adapter in `folder` and load its tensors.

    config: the model's, needed where the adapter was trained with added tokens: its vocab_size follows. Raises
    UserError listing every tensor that does not fit: the adapter was trained on another base.
    """
    spec = read_spec(folder)
    file = folder / spec.file
    if not file.is_file():
        raise UserError(f"{folder} has no {spec.file}", "The run saved no adapter: train it, or resume it.")
    layers = len(model.layers)
    if spec.num_layers > layers:
        raise UserError(f"{folder}: the adapter covers {spec.num_layers} blocks, the model has {layers}")
    if spec.num_layers <= 0 and not spec.modules:  # mlx-lm's way to say all
        spec = replace(spec, num_layers=layers)
    spec.check_head(bool(heads(model)), folder)
    if config is not None:
        fit(model, folder, config)
    attach(model, spec)
    load_factors(model, file)
    return spec


def load_factors(model: nn.Module, file: Path) -> None:
    """Copy saved factors into the attached layers, exactly. Raises UserError for a torn file or wrong names or
    shapes.
    """
    try:
        tensors: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
        mx.eval(tensors)
    except (RuntimeError, ValueError) as error:
        if recognise(error):
            raise
        raise UserError(f"{file}: not a safetensors file, or a torn one") from error
    expected = {name: array.shape for name, array in factors(model).items()}
    problems = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    problems += [f"{name} has no place in this model" for name in tensors.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, the model needs {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{file} does not fit this model: {min(problems)}{more}", _why_not(expected, tensors))
    for name, array in tensors.items():
        if not mx.issubdtype(array.dtype, mx.floating) or not mx.isfinite(array).all():
            require_fractions(file, name, to_numpy(array))
    # Copies: MLX reads files lazily, and the file may be replaced while we hold it.
    model.load_weights([(name, mx.array(array.astype(mx.float32))) for name, array in tensors.items()], strict=False)
    mx.eval(factors(model))


def _why_not(expected: Mapping[str, Sequence[int]], tensors: Mapping[str, mx.array]) -> str:
    """What to do about tensors that do not fit."""
    for name, shape in expected.items():
        rows = tensors[name].shape[0] if name in tensors else 0
        if name.endswith(".weight") and rows and tensors[name].shape == (rows, *shape[1:]) and rows != shape[0]:
            return other_rows(rows, shape[0])
    return OTHER_MODEL


def save_factors(model: nn.Module, folder: Path, file: str = ADAPTER_FILE) -> None:
    """Write the adapter's tensors into `folder`, whole or not at all. file: Spec.file. A full disk raises OSError."""
    save_arrays(folder / file, factors(model))


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The base model: every adapter's scale is zero and every layer trained in full is the old one inside."""
    layers = list(adapters(model).values())
    scales = [layer.scale for layer in layers]
    full = in_full(model)
    for layer in layers:
        layer.scale = 0.0
    for path, layer in full.items():
        model.update_modules(tree_unflatten([(path, layer.frozen.module)]))
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale
        for path, layer in full.items():
            model.update_modules(tree_unflatten([(path, layer)]))


def describe(spec: Spec, model: nn.Module) -> str:
    """One line for people: what is trained."""
    count = sum(array.size for array in factors(model).values())
    layers = adapters(model)
    if not layers:
        return f"{count:,} parameters (in full: {len(spec.trained)} layers)"
    names = sorted({path.rsplit(".", 1)[-1] for path in layers})
    ranks = sorted({layer.rank for layer in layers.values()})
    said = f"{spec.variant}, rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else f", scale {spec.scale:g}")
    also = f"; in full: {len(spec.trained)} layers" if spec.trained else ""
    return f"{count:,} parameters ({said}, {', '.join(names)}{also})"
