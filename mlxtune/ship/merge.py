"""Fold an adapter into its base: W + scale * (A B)^T, summed in float32, then stored as asked.

What is lost is lost in storing: 16-bit rounding is harmless, 4-bit rounding is about as large as a small update. So
every fuse is measured afterwards (`ship/verify`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlxtune_convert.configs import SOURCE_FILE, unquantized
from mlxtune_convert.files import require_space, write_json
from mlxtune_convert.tensors import ShardWriter

from mlxtune.errors import UserError
from mlxtune.model import lora
from mlxtune.model.arrays import to_numpy
from mlxtune.model.convert import UNQUANTIZED_BITS, copy_tokenizer
from mlxtune.model.load import model_dtype, open_model, source_of
from mlxtune.model.quantize import QUANTIZED, dense_weight

DEFAULT_GROUP = 64


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
        for path, module in self._walk():
            yield path, module
            _release(_inner(module))

    def sizes(self) -> dict[str, int]:
        """How many numbers each leaf holds when dense. Reads nothing."""
        return {path: _dense_size(module) for path, module in self._walk()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor when dense, by its name. Reads nothing."""
        found = {}
        for path, module in self._walk():
            inner = _inner(module)
            quantized = isinstance(inner, QUANTIZED)
            for name, value in _parameters(inner).items():
                if quantized and name == "weight":
                    found[f"{path}.weight"] = (*value.shape[:-1], value.shape[-1] * 32 // inner.bits)
                elif not (quantized and name in _QUANTIZATION_TENSORS):
                    found[f"{path}.{name}" if path else name] = tuple(value.shape)
        return found

    def count(self) -> int:
        """Parameters of the dense model."""
        return sum(self.sizes().values())

    def _walk(self) -> Iterator[tuple[str, nn.Module]]:
        inside: set[str] = set()
        for path, module in self.model.named_modules():
            if path in inside:
                continue
            if isinstance(module, lora.Adapter):
                inside.add(f"{path}.linear")
            elif not _parameters(module):
                continue
            yield path, module

    def weight(self, module: nn.Module) -> mx.array:
        """The merged matrix of one leaf, float32."""
        if isinstance(module, lora.Adapter):
            return dense_weight(module.linear) + module.delta()
        return dense_weight(module)

    def dense(self, path: str, module: nn.Module) -> list[tuple[str, mx.array]]:
        inner = _inner(module)
        out = []
        for name, value in _parameters(inner).items():
            if isinstance(inner, QUANTIZED) and name in _QUANTIZATION_TENSORS:
                continue
            array = self.weight(module) if name == "weight" else value
            full = f"{path}.{name}" if path else name
            out.append((full, array.astype(self.dtype) if mx.issubdtype(array.dtype, mx.floating) else array))
        return out


_QUANTIZATION_TENSORS = ("scales", "biases", "global_scale")


def _inner(module: nn.Module) -> Any:
    """The base's layer of a leaf."""
    return module.linear if isinstance(module, lora.Adapter) else module


def _release(module: nn.Module) -> None:
    for name in _parameters(module):
        module[name] = mx.array([])


def _parameters(module: nn.Module) -> dict[str, mx.array]:
    """A module's own arrays; names with an underscore are MLX's private ones (rotary tables), not parameters."""
    return {name: value for name, value in module.items() if isinstance(value, mx.array) and not name.startswith("_")}


def open_merged(base: Path, adapter: Path | None, dtype: mx.Dtype | None = None) -> Merged:
    """Base (quantized or not) with the adapter of a run, ready to be read. dtype None: the base's own."""
    model, config = open_model(base)
    own = model_dtype(model)
    if adapter is not None:
        lora.load_adapter(model, adapter)
    return Merged(model, config, dtype or own)


def fuse(merged: Merged, base: Path, work: Path, bits: int) -> None:
    """Write a merged MLX folder into `work`.

    bits 16: dense; 4 or 8: layers that the adapter changed are quantized again to that many bits (in the base's
    groups), layers it did not change keep the base's codes. base: where tokenizer and source come from.
    """
    needed = merged.count() * merged.dtype.size
    require_space(work, needed if bits == UNQUANTIZED_BITS else needed * (bits + 2) // 16)
    writer = ShardWriter(work, {"format": "mlx"})
    config = unquantized(merged.config)
    if bits == UNQUANTIZED_BITS:
        for name, array in merged.tensors():
            writer.add(name, to_numpy(array))
    else:
        config["quantization"] = config["quantization_config"] = _write_quantized(merged, writer, bits)
    writer.close()
    write_json(work / "config.json", config)
    copy_tokenizer(base, work)
    write_json(work / SOURCE_FILE, source_of(base))


def _dense_size(module: nn.Module) -> int:
    inner = _inner(module)
    if isinstance(inner, QUANTIZED):
        return inner.weight.size * 32 // inner.bits
    return sum(value.size for value in _parameters(inner).values())


def _write_quantized(merged: Merged, writer: ShardWriter, bits: int) -> dict[str, Any]:
    """Write every leaf, quantized where it can be; return the table that config.json keeps."""
    base_table = merged.config.get("quantization") or {}
    group = base_table.get("group_size", DEFAULT_GROUP)
    table: dict[str, Any] = {"group_size": group, "bits": bits, "mode": "affine"}
    predicate = getattr(merged.model, "quant_predicate", None) or (lambda path, module: True)
    for path, module in merged.leaves():
        adapted = isinstance(module, lora.Adapter)
        inner = _inner(module)
        if isinstance(inner, QUANTIZED) and not adapted:
            for name, value in _parameters(inner).items():
                writer.add(f"{path}.{name}", to_numpy(value))
            table[path] = {"group_size": inner.group_size, "bits": inner.bits, "mode": inner.mode}
            continue
        size = inner.group_size if isinstance(inner, QUANTIZED) and inner.mode == "affine" else DEFAULT_GROUP
        # Layers that the family or the base keeps at more bits (routers, say) stay there.
        exception = predicate(path, inner)
        width = max(bits, base_table[path]["bits"] if isinstance(base_table.get(path), dict) else 0)
        if isinstance(exception, dict):
            width, size = max(bits, exception["bits"]), exception["group_size"]
        for full, array in merged.dense(path, module):
            quantizable = hasattr(inner, "to_quantized") or isinstance(inner, QUANTIZED)
            if not (full.endswith(".weight") and quantizable and exception and array.shape[-1] % size == 0):
                writer.add(full, to_numpy(array))
                continue
            for suffix, part in zip(("weight", "scales", "biases"), mx.quantize(array, size, width), strict=True):
                writer.add(f"{path}.{suffix}", to_numpy(part))
            table[path] = {"group_size": size, "bits": width, "mode": "affine"}
    common = {key: table[key] for key in ("group_size", "bits", "mode")}
    return {**common, **{path: entry for path, entry in table.items() if isinstance(entry, dict) and entry != common}}


def check_base(base: Path, trained_on: Path) -> None:
    """Raise UserError when `base` has other tensor shapes than the model the adapter was trained on."""
    one, other = open_merged(base, None).sizes(), open_merged(trained_on, None).sizes()
    differing = sorted(path for path in one.keys() | other.keys() if one.get(path) != other.get(path))
    if differing:
        raise UserError(
            f"{base} is not the original of {trained_on}: {differing[0]} differs",
            "Give --base the same model in 16 bits.",
        )
