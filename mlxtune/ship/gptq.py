"""4-bit codes that keep a small update: GPTQ (Frantar et al. 2022, arXiv:2210.17323), calibrated on the user's rows.

Rounding to the nearest code makes an error about as large as a tune. GPTQ rounds a matrix column by column and moves
what is left of each column onto those not yet rounded, weighted by how the layer's inputs go together: with H = X^T X
and U the upper Cholesky factor of H^-1, column j's error is subtracted from column k > j times U[j, k] / U[j, j].

The scales are fixed beforehand, the best of several for each group. Where the base has the same bits and groups, its
own are often best: most weights then start on a code, and only the update is rounded. Afterwards each column is rounded
once more, given all the others. Legend: out, in widths; G groups in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlxtune_convert.gguf.quant_blocks import pack

from mlxtune.adapter import adapter_files
from mlxtune.adapter.layers import LINEAR, LoRALinear, dense_shape
from mlxtune.data.chat.masking import Example
from mlxtune.model.arrays import to_numpy
from mlxtune.model.load import load

MAX_ROWS = 64  # calibration rows
MAX_TOKENS = 256  # of each
HESSIAN_BYTES = 1 << 30  # held at a time; more layers mean another pass over the rows
DAMPING = 0.01  # share of H's mean diagonal that is added to it
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's range: narrower codes for most, a larger error for the ends
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
        loaded = load(model)
        self.model = loaded.model
        adapter_files.load_adapter(self.model, adapter, loaded.config)
        step = max(1, len(examples) // MAX_ROWS)
        self.rows = [mx.array(np.asarray(example.ids[:MAX_TOKENS])[None]) for example in examples[::step][:MAX_ROWS]]

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
        return {path: to_numpy(layer._sum) for path, layer in watched.items()}

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
    return dense_shape(layer.linear if isinstance(layer, LoRALinear) else layer)[-1]


def quantize(
    weight: np.ndarray,
    hessian: np.ndarray,
    group: int,
    bits: int,
    dtype: mx.Dtype,
    base: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and biases as MLX packs them.

    weight: [out, in] float32; hessian: [in, in]; dtype: of scales and biases; base: the (scales, biases) [out, G] of
    the layer before it was tuned, a candidate for each group.
    """
    # Inputs that never came have no say; a little is added so that H can be inverted.
    h = hessian.astype(np.float32) + DAMPING * np.diag(hessian).mean() * np.eye(len(hessian), dtype=np.float32)
    weight = np.where(np.diag(hessian) == 0, np.float32(0), weight)
    scales, biases = _grid(weight, np.diag(h), group, bits, dtype, base)
    order = np.argsort(-np.diag(h), kind="stable")  # the columns that matter most have the most others to lean on
    factor = np.linalg.cholesky(np.linalg.inv(h[order][:, order].astype(np.float64))).T.astype(np.float32)
    rest = weight[:, order]
    codes = np.empty(weight.shape, np.uint8)
    for start in range(0, len(order), BLOCK):
        end = min(start + BLOCK, len(order))
        errors = np.empty((len(weight), end - start), np.float32)
        for at in range(start, end):
            column = order[at]
            scale, bias = scales[:, column // group], biases[:, column // group]
            codes[:, column] = _codes(rest[:, at], scale, bias, bits)
            error = (rest[:, at] - (codes[:, column] * scale + bias)) / factor[at, at]
            rest[:, at + 1 : end] -= np.outer(error, factor[at, at + 1 : end])
            errors[:, at - start] = error
        rest[:, end:] -= errors @ factor[start:end, end:]
    _descend(weight, h, codes, scales, biases, group, bits)
    return mx.array(pack(codes, bits)), mx.array(scales).astype(dtype), mx.array(biases).astype(dtype)


def _codes(values: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(scales == 0, 0, (values - biases) / scales)
    return np.clip(np.rint(codes), 0, 2**bits - 1)


def _grid(
    weight: np.ndarray,
    importance: np.ndarray,
    group: int,
    bits: int,
    dtype: mx.Dtype,
    base: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The (scales, biases) [out, G] of each group that round it best, every input's error counted by `importance` [in]:
    the base's, MLX's own, or the range from smallest to largest, whole or narrowed.
    """
    parts = weight.reshape(len(weight), -1, group)
    low, high = parts.min(-1), parts.max(-1)
    tries = [((high - low) * shrink / (2**bits - 1), low * shrink) for shrink in SHRINKS]
    _, scales, biases = mx.quantize(mx.array(weight), group, bits)
    tries.append((to_numpy(scales), to_numpy(biases)))
    best = np.full(low.shape, np.inf, np.float32)
    chosen = np.zeros((2, *low.shape), np.float32)
    for pair in [*tries, *([base] if base else [])]:
        # As they will be stored.
        scale, bias = (to_numpy(mx.array(x).astype(dtype).astype(mx.float32))[..., None] for x in pair)
        off = _codes(parts, scale, bias, bits) * scale + bias - parts
        error = (off * off * importance.reshape(-1, group)).sum(-1)
        better = error < best
        best = np.where(better, error, best)
        chosen = np.where(better, np.stack([scale[..., 0], bias[..., 0]]), chosen)
    return chosen[0], chosen[1]


def _descend(
    weight: np.ndarray, h: np.ndarray, codes: np.ndarray, scales: np.ndarray, biases: np.ndarray, group: int, bits: int
) -> None:
    """Once more over the columns, each rounded anew to what is best given all the others; changes `codes`."""
    error = np.repeat(scales, group, 1) * codes + np.repeat(biases, group, 1) - weight
    slope = error @ h
    for column in range(weight.shape[1]):
        scale, bias = scales[:, column // group], biases[:, column // group]
        now = codes[:, column] * scale + bias
        new = _codes(now - slope[:, column] / h[column, column], scale, bias, bits)
        rows = np.flatnonzero(new != codes[:, column])
        slope[rows] += np.outer(new[rows] * scale[rows] + bias[rows] - now[rows], h[column])
        codes[rows, column] = new[rows]
