"""An adapter folded into its base. The sum is made in float32, then stored as asked: W + scale * (A B)^T

    W      [out, in]   the base's matrix; where it is quantized, the numbers that its codes stand for
    A      [in, r]     lora_a
    B      [r, out]    lora_b

What is lost is lost in storing: 16-bit rounding is harmless, 4-bit rounding is about as large as a small update. So
every fuse is measured afterwards (`ship/verify`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlxtune_convert.files import require_space
from mlxtune_convert.hf.configs import unquantized
from mlxtune_convert.hf.model_folder import resize, vocabulary
from mlxtune_convert.tensors import ShardWriter

from mlxtune.adapter import adapter_files
from mlxtune.adapter.layers import SWITCH, AdaptedLayer, dense_shape, own_parameters
from mlxtune.errors import UserError
from mlxtune.model.arrays import to_numpy
from mlxtune.model.convert import UNQUANTIZED_BITS, copy_tokenizer, write_config
from mlxtune.model.dense import QUANTIZED, dense_weight
from mlxtune.model.load import model_dtype, open_model, source_of
from mlxtune.ship import gptq
from mlxtune.ship.gptq import Calibration

DEFAULT_GROUP = 64  # mx.quantize's own
CALIBRATED_BELOW = 8  # bits; at 8 rounding to the nearest is as good
Progress = Callable[[int, int], None]  # (weights done, weights in all)
# Of a quantized layer, beside its codes; they are part of the dense matrix.
QUANTIZATION_TENSORS = ("scales", "biases", "global_scale")


@dataclass(frozen=True)
class Merged:
    """A model with its adapter folded in, tensor by tensor; nothing is computed until it is read.

    It can be read once: what was read is released, so that a 16-bit base is never whole in memory.

    A leaf is a module that holds parameters itself: a norm, an embedding, a linear layer. An adapter counts as one leaf
    together with the layer of the base inside it, and has that layer's path:

        model.layers.0.mlp.up_proj          LoRALinear     lora_a, lora_b
        model.layers.0.mlp.up_proj.linear   QuantizedLinear  weight (codes), scales, biases, bias
        -> one leaf, two dense tensors: model.layers.0.mlp.up_proj.weight and .bias
    """

    model: nn.Module  # mlx-lm's model, the adapter's layers on it
    config: dict[str, Any]  # of the base, with what describes its quantization
    dtype: mx.Dtype  # of the dense tensors

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
        """(name, array) of the dense model under MLX's names: float32 sums rounded once to `dtype`, each in its dense
        shape.
        """
        for path, module in self.leaves():
            yield from self.dense(path, module)

    def leaves(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, module) of every leaf; its weights are released when the next one is asked for."""
        for path, module in self.modules():
            yield path, module
            _release(_inner(module))

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, module) of every leaf, to look at: nothing is released."""
        inside: set[str] = set()
        for path, module in self.model.named_modules():
            if path in inside:
                continue
            if isinstance(module, AdaptedLayer):
                inside.add(f"{path}.linear")
            elif not own_parameters(module):
                continue
            yield path, module

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor when dense, by its name. Reads no weights."""
        found = {}
        for path, module in self.modules():
            inner = _inner(module)
            for name, value in _dense_parameters(inner):
                shape = tuple(value.shape)
                if name == "weight":
                    shape = (*shape[:-1], _dense_columns(inner))
                found[_full_name(path, name)] = shape
        return found

    def count(self) -> int:
        """Parameters of the dense model."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def weight(self, module: nn.Module) -> mx.array:
        """The merged matrix of one leaf, [out, in] float32; experts [E, out, in]."""
        if isinstance(module, AdaptedLayer):
            return module.merged(dense_weight(module.linear))
        return dense_weight(module)

    def dense(self, path: str, module: nn.Module) -> list[tuple[str, mx.array]]:
        """(name, array) of every dense tensor of one leaf, floats in `dtype`, each in its dense shape."""
        out = []
        for name, value in _dense_parameters(_inner(module)):
            array = self.weight(module) if name == "weight" else value
            if mx.issubdtype(array.dtype, mx.floating):
                array = array.astype(self.dtype)
            out.append((_full_name(path, name), array))
        return out


def _inner(module: nn.Module) -> Any:
    """The base's layer of a leaf."""
    return module.linear if isinstance(module, AdaptedLayer) else module


def _dense_parameters(inner: nn.Module) -> list[tuple[str, mx.array]]:
    """(name, array as it is stored) of the parameters that a layer has when it is dense."""
    quantized = isinstance(inner, QUANTIZED)
    return [
        (name, value)
        for name, value in own_parameters(inner).items()
        if not (quantized and name in QUANTIZATION_TENSORS)
    ]


def _dense_columns(inner: Any) -> int:
    """The columns of a layer's matrix when dense: codes are packed into words of 32 bits."""
    columns: int = inner.weight.shape[-1]
    return columns * 32 // inner.bits if isinstance(inner, QUANTIZED) else columns


def _full_name(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name  # a model may hold a parameter itself


def _release(module: nn.Module) -> None:
    for name in own_parameters(module):
        module[name] = mx.array([])


def open_merged(
    base: Path, adapter: Path | None, dtype: mx.Dtype | None = None, original_of: Path | None = None
) -> Merged:
    """A base (quantized or not) with the adapter of a run, ready to be read. dtype: None, the base's own; original_of:
    the model that the adapter was trained on, where `base` is another.

    Raises UserError when the base has other tensors than that model, or the adapter is not for it.
    """
    model, config = open_model(base)
    own = model_dtype(model)
    if original_of is not None:
        _require_same_shapes(Merged(model, config, own), base, original_of)
    if adapter is not None:
        adapter_files.load_adapter(model, adapter, config)
    return Merged(model, config, dtype or own)


def _require_same_shapes(merged: Merged, base: Path, trained_on: Path) -> None:
    ours, theirs = merged.shapes(), open_merged(trained_on, None).shapes()
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differing:
        raise UserError(
            f"{base} is not the original of {trained_on}: {differing[0]} differs",
            "Give --base the same model in 16 bits.",
        )


def fuse(
    merged: Merged,
    base: Path,
    work: Path,
    bits: int,
    group: int | None,
    calibration: Calibration | None,
    code: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write a merged MLX folder into `work`; return what a person must know.

    bits 16: dense; 4 or 8: layers that the adapter changed are quantized again to that many bits in groups of `group`
    (None: the base's), layers it did not change keep the base's codes. base: where tokenizer and source come from;
    calibration: the trained model and rows to choose codes by, or None to round to the nearest; code: with the .py
    files that belong to the model; progress: hears how many weights are written.
    """
    count = merged.count()
    dense_bytes = count * merged.dtype.size
    told = Told(count, progress)
    # Scale and bias, 16 bits each, add 32 bits to a group of at least 32 weights: one bit a weight, and one to spare.
    require_space(work, dense_bytes if bits == UNQUANTIZED_BITS else dense_bytes * (bits + 2) // 16)
    writer = ShardWriter(work, {"format": "mlx"})
    config = unquantized(merged.config)
    if bits == UNQUANTIZED_BITS:
        for name, array in merged.tensors():
            writer.add(name, to_numpy(array))
            told.add(array.size)
    else:
        quantizer = _Quantizer(merged, writer, bits, group, told)
        if calibration is not None:
            quantizer.write_calibrated(calibration)
        config["quantization"] = config["quantization_config"] = quantizer.write_rest()
    writer.close()
    source = source_of(base)
    resize(source["config"], vocabulary(config))
    write_config(work, config, source, code)
    return copy_tokenizer(base, work, code)


class Told:
    """Counts the weights that are done, and tells whoever wants to hear it."""

    def __init__(self, count: int, progress: Progress | None) -> None:
        """count: weights in all; more may be added."""
        self.count = count
        self.done = 0
        self._progress = progress

    def add(self, weights: int) -> None:
        self.done += weights
        if self._progress is not None:
            self._progress(self.done, self.count)


@dataclass(frozen=True)
class _Form:
    """How a matrix is quantized, in mode affine."""

    group: int  # weights that share a scale
    bits: int  # of a code

    def entry(self) -> dict[str, Any]:
        """As config.json says it."""
        return {"group_size": self.group, "bits": self.bits, "mode": "affine"}


class _Quantizer:
    """Writes every leaf of a merged model, quantized where it can be, and keeps the table for config.json."""

    def __init__(self, merged: Merged, writer: ShardWriter, bits: int, group: int | None, told: Told) -> None:
        """bits, group: as `fuse` takes them."""
        self.merged = merged
        self.writer = writer
        self.told = told
        self.bits = bits
        self.asked_group = group
        # The base's own settings: common ones, and by path the exceptions.
        self.base: dict[str, Any] = merged.config.get("quantization") or {}
        self.table: dict[str, dict[str, Any]] = {}  # path -> entry of config.json
        self.done: set[str] = set()  # paths of what was written already
        # A family says which of its layers may be quantized, or in which other form (routers in 8 bits).
        self._predicate = getattr(merged.model, "quant_predicate", None) or (lambda path, module: True)

    def form(self, path: str, module: nn.Module) -> _Form | None:
        """The form that a leaf is to get; None when it stays as it is."""
        inner = _inner(module)
        if _keeps_codes(module) or not (hasattr(inner, "to_quantized") or isinstance(inner, QUANTIZED)):
            return None
        of_family = self._predicate(path, inner)
        if not of_family:
            return None
        # Layers that the family or the base keeps at more bits stay there.
        if isinstance(of_family, dict):
            form = _Form(of_family["group_size"], max(self.bits, of_family["bits"]))
        else:
            of_base = self.base.get(path)
            bits = max(self.bits, of_base["bits"]) if isinstance(of_base, dict) else self.bits
            form = _Form(self.asked_group or _own_group(inner), bits)
        columns = _dense_columns(inner)
        return form if columns and columns % form.group == 0 else None

    def write_calibrated(self, calibration: Calibration) -> None:
        """Write the linear layers whose inputs can be watched, each with the codes that disturb its outputs least."""
        leaves: dict[str, nn.Module] = {}
        forms: dict[str, _Form] = {}
        for path, module in self.merged.modules():
            form = None if isinstance(_inner(module), SWITCH) else self.form(path, module)
            if form is not None and form.bits < CALIBRATED_BELOW:
                leaves[path], forms[path] = module, form
        # These weights count twice: once while their inputs are looked at, which takes as long.
        self.told.count += sum(math.prod(dense_shape(_inner(module))) for module in leaves.values())
        for path, hessian in calibration.hessians(list(forms), self.told.add):
            module, form = leaves[path], forms[path]
            inner = _inner(module)
            weight = to_numpy(self.merged.weight(module))
            grid = _base_grid(inner, form)
            parts = gptq.quantize(weight, hessian, form.group, form.bits, self.merged.dtype, grid)
            self._add(path, parts, form)
            bias = own_parameters(inner).get("bias")
            if bias is not None:
                self.writer.add(f"{path}.bias", to_numpy(bias))
            calibration.replace(path, parts, bias, form.group, form.bits)
            self.done.add(path)
            self.told.add(weight.size + (0 if bias is None else bias.size))

    def write_rest(self) -> dict[str, Any]:
        """Write what is left, rounded to the nearest; return the table for config.json."""
        for path, module in self.merged.leaves():
            if path in self.done:
                continue
            if _keeps_codes(module):
                self._add_as_it_is(path, module)
                self.told.add(sum(array.size for _, array in self.merged.dense(path, module)))
                continue
            form = self.form(path, module)
            for name, array in self.merged.dense(path, module):
                if form is not None and name.endswith(".weight"):
                    self._add(path, mx.quantize(array, form.group, form.bits), form)
                else:
                    self.writer.add(name, to_numpy(array))
                self.told.add(array.size)
        common_group = self.asked_group or self.base.get("group_size", DEFAULT_GROUP)
        common = _Form(common_group, self.bits).entry()
        exceptions = {path: entry for path, entry in self.table.items() if entry != common}
        return {**common, **exceptions}

    def _add(self, path: str, parts: Sequence[mx.array], form: _Form) -> None:
        """parts: codes [out, in * bits / 32] uint32, scales and biases [out, in / group], as mx.quantize gives them."""
        for suffix, part in zip(("weight", "scales", "biases"), parts, strict=True):
            self.writer.add(f"{path}.{suffix}", to_numpy(part))
        self.table[path] = form.entry()

    def _add_as_it_is(self, path: str, layer: Any) -> None:
        for name, value in own_parameters(layer).items():
            self.writer.add(f"{path}.{name}", to_numpy(value))
        self.table[path] = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}


def _keeps_codes(module: nn.Module) -> bool:
    """Whether a leaf is a quantized layer of the base that the adapter did not change."""
    return isinstance(module, QUANTIZED)


def _own_group(inner: Any) -> int:
    """The group of a layer of the base; other modes than affine have groups of their own."""
    if isinstance(inner, QUANTIZED) and inner.mode == "affine":
        return int(inner.group_size)
    return DEFAULT_GROUP


def _base_grid(inner: Any, form: _Form) -> tuple[np.ndarray, np.ndarray] | None:
    """The base's scales and biases of a layer, [out, in / group] float32 each; None unless it has the same form."""
    if not isinstance(inner, QUANTIZED) or inner.mode != "affine":
        return None
    if _Form(inner.group_size, inner.bits) != form:
        return None
    return _float32(inner.scales), _float32(inner.biases)


def _float32(array: Any) -> np.ndarray:
    return to_numpy(array.astype(mx.float32))
