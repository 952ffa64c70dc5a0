"""Fold an adapter into its base: W + scale * (A B)^T, summed in float32, then stored as asked.

What is lost is lost in storing: 16-bit rounding is harmless, 4-bit rounding is about as large as a small update. So
every fuse is measured afterwards (`ship/verify`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
from mlxtune.adapter.layers import SWITCH, AdaptedLayer, own_parameters
from mlxtune.errors import UserError
from mlxtune.model.arrays import to_numpy
from mlxtune.model.convert import UNQUANTIZED_BITS, copy_tokenizer, write_config
from mlxtune.model.dense import QUANTIZED, dense_weight
from mlxtune.model.load import model_dtype, open_model, source_of
from mlxtune.ship import gptq
from mlxtune.ship.gptq import Calibration

DEFAULT_GROUP = 64
CALIBRATED_BELOW = 8  # bits; at 8 rounding to the nearest is as good


@dataclass(frozen=True)
class Merged:
    """A model with its adapter folded in, tensor by tensor; nothing is computed until it is read.

    It can be read once: what was read is released, so that a 16-bit base is never whole in memory.

    dtype: of the dense tensors; config: of the base, with what describes its quantization.
    """

    model: nn.Module
    config: dict[str, Any]
    dtype: mx.Dtype

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
        """(name, array) of the dense model under MLX's names: float32 sums rounded once to `dtype`."""
        for path, layer in self.leaves():
            yield from self.dense(path, layer)

    def leaves(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module that holds parameters itself, an adapter with its linear layer counting as one."""
        for path, module in self.modules():
            yield path, module
            _release(_inner(module))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor when dense, by its name. Reads nothing."""
        found = {}
        for path, module in self.modules():
            inner = _inner(module)
            quantized = isinstance(inner, QUANTIZED)
            for name, value in own_parameters(inner).items():
                if quantized and name == "weight":
                    found[f"{path}.weight"] = (*value.shape[:-1], value.shape[-1] * 32 // inner.bits)
                elif not (quantized and name in _QUANTIZATION_TENSORS):
                    found[f"{path}.{name}" if path else name] = tuple(value.shape)
        return found

    def count(self) -> int:
        """Parameters of the dense model."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The same leaves, none of them released."""
        inside: set[str] = set()
        for path, module in self.model.named_modules():
            if path in inside:
                continue
            if isinstance(module, AdaptedLayer):
                inside.add(f"{path}.linear")
            elif not own_parameters(module):
                continue
            yield path, module

    def weight(self, module: nn.Module) -> mx.array:
        """The merged matrix of one leaf, float32."""
        if isinstance(module, AdaptedLayer):
            return module.merged(dense_weight(module.linear))
        return dense_weight(module)

    def dense(self, path: str, module: nn.Module) -> list[tuple[str, mx.array]]:
        inner = _inner(module)
        out = []
        for name, value in own_parameters(inner).items():
            if isinstance(inner, QUANTIZED) and name in _QUANTIZATION_TENSORS:
                continue
            array = self.weight(module) if name == "weight" else value
            full = f"{path}.{name}" if path else name
            out.append((full, array.astype(self.dtype) if mx.issubdtype(array.dtype, mx.floating) else array))
        return out


_QUANTIZATION_TENSORS = ("scales", "biases", "global_scale")


def _inner(module: nn.Module) -> Any:
    """The base's layer of a leaf."""
    return module.linear if isinstance(module, AdaptedLayer) else module


def _release(module: nn.Module) -> None:
    for name in own_parameters(module):
        module[name] = mx.array([])


def open_merged(base: Path, adapter: Path | None, dtype: mx.Dtype | None = None) -> Merged:
    """Base (quantized or not) with the adapter of a run, ready to be read. dtype None: the base's own."""
    model, config = open_model(base)
    own = model_dtype(model)
    if adapter is not None:
        adapter_files.load_adapter(model, adapter, config)
    return Merged(model, config, dtype or own)


def fuse(
    merged: Merged,
    base: Path,
    work: Path,
    bits: int,
    group: int | None,
    calibration: Calibration | None,
    code: bool = False,
) -> list[str]:
    """Write a merged MLX folder into `work`; return what a person must know.

    bits 16: dense; 4 or 8: layers that the adapter changed are quantized again to that many bits in groups of `group`
    (None: the base's), layers it did not change keep the base's codes. base: where tokenizer and source come from;
    calibration: the trained model and rows to choose codes by, or None to round to the nearest; code: with the .py
    files that belong to the model.
    """
    needed = merged.count() * merged.dtype.size
    require_space(work, needed if bits == UNQUANTIZED_BITS else needed * (bits + 2) // 16)
    writer = ShardWriter(work, {"format": "mlx"})
    config = unquantized(merged.config)
    if bits == UNQUANTIZED_BITS:
        for name, array in merged.tensors():
            writer.add(name, to_numpy(array))
    else:
        quantizer = _Quantizer(merged, writer, bits, group)
        if calibration is not None:
            quantizer.calibrated(calibration)
        config["quantization"] = config["quantization_config"] = quantizer.finish()
    writer.close()
    source = source_of(base)
    resize(source["config"], vocabulary(config))
    write_config(work, config, source, code)
    return copy_tokenizer(base, work, code)


class _Quantizer:
    """Writes every leaf of a merged model, quantized where it can be, and keeps the table for config.json."""

    def __init__(self, merged: Merged, writer: ShardWriter, bits: int, group: int | None) -> None:
        self.merged = merged
        self.writer = writer
        self.base = merged.config.get("quantization") or {}
        self.group = group or self.base.get("group_size", DEFAULT_GROUP)
        self.asked = group
        self.bits = bits
        self.table: dict[str, Any] = {}
        self.done: set[str] = set()
        self._predicate = getattr(merged.model, "quant_predicate", None) or (lambda path, module: True)

    def form(self, path: str, module: nn.Module) -> tuple[int, int] | None:
        """(group, bits) that a leaf is to get, or None when it stays as it is."""
        inner = _inner(module)
        if isinstance(inner, QUANTIZED) and module is inner:
            return None
        quantizable = hasattr(inner, "to_quantized") or isinstance(inner, QUANTIZED)
        own = inner.group_size if isinstance(inner, QUANTIZED) and inner.mode == "affine" else DEFAULT_GROUP
        # Layers that the family or the base keeps at more bits (routers, say) stay there.
        exception = self._predicate(path, inner)
        width, size = self.bits, self.asked or own
        if isinstance(self.base.get(path), dict):
            width = max(width, self.base[path]["bits"])
        if isinstance(exception, dict):
            width, size = max(self.bits, exception["bits"]), exception["group_size"]
        columns = _dense_columns(inner) if quantizable and exception else 0
        return (size, width) if columns and columns % size == 0 else None

    def calibrated(self, calibration: Calibration) -> None:
        """Write the linear layers whose inputs can be watched, each with the codes that disturb its outputs least."""
        leaves = {path: module for path, module in self.merged.modules() if not isinstance(_inner(module), SWITCH)}
        forms = {path: form for path, module in leaves.items() if (form := self.form(path, module))}
        wanted = [path for path, (_, width) in forms.items() if width < CALIBRATED_BELOW]
        for path, hessian in calibration.hessians(wanted):
            module, (size, width) = leaves[path], forms[path]
            inner = _inner(module)
            weight = to_numpy(self.merged.weight(module))
            grid = None
            if isinstance(inner, QUANTIZED) and (inner.group_size, inner.bits, inner.mode) == (size, width, "affine"):
                grid = (_float32(inner.scales), _float32(inner.biases))
            parts = gptq.quantize(weight, hessian, size, width, self.merged.dtype, grid)
            bias = own_parameters(inner).get("bias")
            self._add(path, parts, size, width)
            if bias is not None:
                self.writer.add(f"{path}.bias", to_numpy(bias))
            calibration.replace(path, parts, bias, size, width)
            self.done.add(path)

    def finish(self) -> dict[str, Any]:
        """Write the rest, rounded to the nearest; return the table."""
        for path, module in self.merged.leaves():
            if path in self.done:
                continue
            inner = _inner(module)
            form = self.form(path, module)
            if form is None and isinstance(inner, QUANTIZED) and module is inner:
                for name, value in own_parameters(inner).items():
                    self.writer.add(f"{path}.{name}", to_numpy(value))
                self.table[path] = {"group_size": inner.group_size, "bits": inner.bits, "mode": inner.mode}
                continue
            for full, array in self.merged.dense(path, module):
                if form is not None and full.endswith(".weight"):
                    self._add(path, mx.quantize(array, *form), *form)
                else:
                    self.writer.add(full, to_numpy(array))
        common = {"group_size": self.group, "bits": self.bits, "mode": "affine"}
        return {**common, **{path: entry for path, entry in self.table.items() if entry != common}}

    def _add(self, path: str, parts: Sequence[mx.array], size: int, width: int) -> None:
        for suffix, part in zip(("weight", "scales", "biases"), parts, strict=True):
            self.writer.add(f"{path}.{suffix}", to_numpy(part))
        self.table[path] = {"group_size": size, "bits": width, "mode": "affine"}


def _float32(array: Any) -> np.ndarray:
    return to_numpy(array.astype(mx.float32))


def _dense_columns(inner: nn.Module) -> int:
    columns: int = inner.weight.shape[-1]
    return columns * 32 // inner.bits if isinstance(inner, QUANTIZED) else columns


def check_base(base: Path, trained_on: Path) -> None:
    """Raise UserError when `base` has other tensor shapes than the model the adapter was trained on."""
    one, other = open_merged(base, None).shapes(), open_merged(trained_on, None).shapes()
    differing = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    if differing:
        raise UserError(
            f"{base} is not the original of {trained_on}: {differing[0]} differs",
            "Give --base the same model in 16 bits.",
        )
