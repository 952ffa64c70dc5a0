"""4-bit codes that keep a small update: GPTQ (Frantar et al. 2022, arXiv:2210.17323), calibrated on the user's rows.

Rounding to the nearest code makes an error about as large as a tune. GPTQ rounds a matrix column by column and moves
what is left of each column onto those not yet rounded, weighted by how the layer's inputs go together: with H = X^T X
and U the upper Cholesky factor of H^-1, column j's error is subtracted from column k > j times U[j, k] / U[j, j].

Where the base is already quantized to the same bits and groups, its own scales are kept: most weights then start on a
code, and only the update is rounded. Legend: out, in widths; G groups in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlxtune_convert.quant import pack

from mlxtune.data.chat import Example
from mlxtune.model import lora
from mlxtune.model.layers import LINEAR, LoRALinear
from mlxtune.model.load import load

MAX_ROWS = 64  # calibration rows
MAX_TOKENS = 256  # of each
HESSIAN_BYTES = 1 << 30  # held at a time; more layers mean another pass over the rows
DAMPING = 0.01  # share of H's mean diagonal that is added to it
BLOCK = 128  # columns whose errors are gathered before they move on to the rest


class _Watched(nn.Module):
    """A linear layer that sums X^T X [in, in] of what it is given, float32."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._sum = mx.array(0.0)

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        self._sum = self._sum + rows.T @ rows
        return self.inner(x)


class Calibration:
    """The trained model, run over training rows; layers are replaced by their quantized form as they get it."""

    def __init__(self, model: str, adapter: Path, examples: Sequence[Example]) -> None:
        self.model = load(model, "auto").model
        lora.load_adapter(self.model, adapter)
        step = max(1, len(examples) // MAX_ROWS)
        self.rows = [mx.array([example.ids[:MAX_TOKENS]]) for example in examples[::step][:MAX_ROWS]]

    def hessians(self, wanted: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """(path, H [in, in]) of the linear layers in `wanted`, in the model's order, a few layers at a time."""
        layers = {
            path: module
            for path, module in self.model.named_modules()
            if path in set(wanted) and isinstance(module, (LoRALinear, *LINEAR))
        }
        chunk: list[str] = []
        held = 0
        for path in [*layers, ""]:
            size = 4 * _inputs(layers[path]) ** 2 if path else 0
            if chunk and (not path or held + size > HESSIAN_BYTES):
                yield from self._pass({name: layers[name] for name in chunk}).items()
                chunk, held = [], 0
            chunk.append(path)
            held += size

    def _pass(self, layers: dict[str, nn.Module]) -> dict[str, np.ndarray]:
        watched = {path: _Watched(layer) for path, layer in layers.items()}
        self._put(watched)
        for ids in self.rows:
            self.model(ids)
            # What no Hessian needs (the head, later blocks) is never computed.
            mx.eval([layer._sum for layer in watched.values()])
        self._put(layers)
        return {path: np.array(layer._sum) for path, layer in watched.items()}

    def replace(self, path: str, parts: Sequence[mx.array], bias: mx.array | None, group: int, bits: int) -> None:
        """From now on the model runs with this layer quantized, so that later ones learn to live with its error."""
        layer = nn.QuantizedLinear(group, 1, bias=bias is not None, group_size=group, bits=bits)
        layer.weight, layer.scales, layer.biases = parts
        if bias is not None:
            layer.bias = bias
        self._put({path: layer})

    def _put(self, layers: dict[str, Any]) -> None:
        for path, layer in layers.items():
            self.model.update_modules(tree_unflatten([(path, layer)]))


def _inputs(layer: Any) -> int:
    linear = layer.linear if isinstance(layer, LoRALinear) else layer
    columns: int = linear.weight.shape[-1]
    return columns * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else columns


def quantize(
    weight: np.ndarray,
    hessian: np.ndarray,
    group: int,
    bits: int,
    dtype: mx.Dtype,
    grid: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and biases as MLX packs them.

    weight: [out, in] float32; hessian: [in, in]; dtype: of scales and biases; grid: the (scales, biases) [out, G] to
    keep, or None to fit them group by group, each to what the groups before left over.
    """
    rest = weight.copy()
    factor = _factor(hessian, rest)
    codes = np.empty(weight.shape, np.uint8)
    groups = weight.shape[1] // group
    scales, biases = grid or (np.empty((len(weight), groups), np.float32), np.empty((len(weight), groups), np.float32))
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        errors = np.empty((len(weight), end - start), np.float32)
        for column in range(start, end):
            at = column // group
            if grid is None and column % group == 0:
                scales[:, at], biases[:, at] = _fit(rest[:, column : column + group], group, bits, dtype)
            scale, bias = scales[:, at], biases[:, at]
            with np.errstate(divide="ignore", invalid="ignore"):
                code = np.where(scale == 0, 0, (rest[:, column] - bias) / scale)
            codes[:, column] = np.clip(np.rint(code), 0, 2**bits - 1)
            error = (rest[:, column] - (codes[:, column] * scale + bias)) / factor[column, column]
            # Up to the end of the group at once: its scales are fitted to what is there when it begins.
            rest[:, column + 1 : end] -= np.outer(error, factor[column, column + 1 : end])
            errors[:, column - start] = error
        rest[:, end:] -= errors @ factor[start:end, end:]
    return mx.array(pack(codes, bits)), mx.array(scales).astype(dtype), mx.array(biases).astype(dtype)


def _factor(hessian: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """U [in, in], upper triangular, U^T U = H^-1. Inputs that were always zero get weights of zero."""
    h = hessian.astype(np.float64)
    dead = np.diag(h) == 0
    h[dead, dead] = 1.0
    weight[:, dead] = 0.0
    h[np.diag_indices_from(h)] += DAMPING * np.diag(h).mean()
    return np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32)


def _fit(part: np.ndarray, group: int, bits: int, dtype: mx.Dtype) -> tuple[np.ndarray, np.ndarray]:
    """MLX's own scales and biases of one group, as they will be stored."""
    _, scales, biases = mx.quantize(mx.array(part), group, bits)
    return tuple(np.array(x.astype(dtype).astype(mx.float32))[:, 0] for x in (scales, biases))  # type: ignore[return-value]


def error(weight: np.ndarray, parts: Sequence[mx.array], hessian: np.ndarray, group: int, bits: int) -> float:
    """How far the layer's outputs move on the calibration rows: tr(E H E^T) for E = quantized - weight."""
    codes, scales, biases = parts
    dense = mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), group, bits)
    moved = np.array(dense) - weight
    return float(np.einsum("oi,oi->", moved @ hessian, moved))
