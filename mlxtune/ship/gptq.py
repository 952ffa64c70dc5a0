"""4-bit codes that keep a small update, calibrated on the user's rows. GPTQ: Frantar et al. 2022, arXiv:2210.17323.

Rounding to the nearest code makes an error about as large as a tune. GPTQ rounds a matrix column by column and moves
what is left of each column onto those not yet rounded, weighted by how the layer's inputs go together: with H = X^T X
and U the upper Cholesky factor of H^-1, column j's error is subtracted from column k > j times U[j, k] / U[j, j].

Worked example: one row w = (0.4, 0.4), codes that stand for whole numbers, and inputs that always come in equal pairs
(x, x), so that only w1 + w2 counts. Rounded to the nearest, both weights become 0: the sum was 0.8 and is 0. GPTQ
rounds w1 to 0, finds that 0.4 is missing, and adds it to w2, which is 0.8 now and becomes 1: the sum is 1.

The scales are fixed beforehand, the best of several for each group. Where the base has the same bits and groups, its
own are often best: most weights then start on a code, and only the update is rounded. Afterwards each column is rounded
once more, given all the others.

Legend: out, in widths of a matrix [out, in]; G groups in a row, in / group; N inputs of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
DAMPING = 0.01  # share of H's mean diagonal that is added to it; the paper's own
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's range: narrower codes for most, a larger error for the ends
BLOCK = 128  # columns whose errors are gathered before they move on to the rest; the paper's own

Grid = tuple[np.ndarray, np.ndarray]  # (scales, biases) [out, G] float32: a code stands for code * scale + bias


class InputGram(nn.Module):
    """A linear layer that sums X^T X [in, in] float32 of what it is given, X [N, in]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._sum = mx.array(0.0)

    def __call__(self, x: mx.array) -> mx.array:
        """x: [B, T, in] -> [B, T, out]."""
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        self._sum = self._sum + rows.T @ rows
        return self.inner(x)


class Calibration:
    """The trained model, run over training rows; layers are replaced by their quantized form as they get it."""

    def __init__(self, model: str, adapter: Path, examples: Sequence[Example]) -> None:
        loaded = load(model)
        self.model = loaded.model
        adapter_files.load_adapter(self.model, adapter, loaded.config)
        every = max(1, len(examples) // MAX_ROWS)  # rows from all over the data
        self.rows: list[mx.array] = []  # [1, T] token ids each
        for example in examples[::every][:MAX_ROWS]:
            self.rows.append(mx.array(np.asarray(example.ids[:MAX_TOKENS])[None]))

    def hessians(
        self, wanted: Sequence[str], told: Callable[[int], None] = lambda weights: None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """(path, H [in, in]) of the linear layers in `wanted`, in the model's order, a few layers at a time: as many
        as HESSIAN_BYTES hold, for each pass over the rows. told: hears of the layers' weights as rows go through them,
        of each in the end once.
        """
        layers: dict[str, nn.Module] = {}
        for path, module in self.model.named_modules():
            if path in set(wanted) and isinstance(module, (LoRALinear, *LINEAR)):
                layers[path] = module
        chunk: dict[str, nn.Module] = {}
        held = 0
        for path, layer in layers.items():
            size = 4 * _inputs(layer) ** 2
            if chunk and held + size > HESSIAN_BYTES:
                yield from self._pass(chunk, told).items()
                chunk, held = {}, 0
            chunk[path] = layer
            held += size
        if chunk:
            yield from self._pass(chunk, told).items()

    def _pass(self, layers: dict[str, nn.Module], told: Callable[[int], None]) -> dict[str, np.ndarray]:
        """H [in, in] of each layer by its path, from one pass over all rows. told: as `hessians` takes it."""
        watched = {path: InputGram(layer) for path, layer in layers.items()}
        self._put(watched)
        weights, heard = sum(math.prod(_shape(layer)) for layer in layers.values()), 0
        for number, ids in enumerate(self.rows, 1):
            self.model(ids)
            # What no Hessian needs (the head, later blocks) is never computed.
            mx.eval([layer._sum for layer in watched.values()])
            told(weights * number // len(self.rows) - heard)
            heard = weights * number // len(self.rows)
        self._put(layers)
        return {path: to_numpy(layer._sum) for path, layer in watched.items()}

    def replace(self, path: str, parts: Sequence[mx.array], bias: mx.array | None, group: int, bits: int) -> None:
        """From now on the model runs with this layer quantized, so that later ones learn to live with its error.

        parts: as `quantize` gives them; bias: [out] of the layer itself, None where it has none.
        """
        layer = nn.QuantizedLinear(group, 1, bias=bias is not None, group_size=group, bits=bits)
        layer.weight, layer.scales, layer.biases = parts
        if bias is not None:
            layer.bias = bias
        self._put({path: layer})

    def _put(self, layers: dict[str, Any]) -> None:
        for path, layer in layers.items():
            self.model.update_modules(tree_unflatten([(path, layer)]))


def _inputs(layer: Any) -> int:
    """The width of a layer's inputs."""
    return _shape(layer)[-1]


def _shape(layer: Any) -> tuple[int, ...]:
    """Of a layer's matrix."""
    return dense_shape(layer.linear if isinstance(layer, LoRALinear) else layer)


def quantize(
    weight: np.ndarray, hessian: np.ndarray, group: int, bits: int, dtype: mx.Dtype, base: Grid | None = None
) -> tuple[mx.array, mx.array, mx.array]:
    """Codes [out, in * bits / 32] uint32, scales and biases [out, G], as MLX packs them.

    weight: [out, in] float32; hessian: [in, in]; dtype: of scales and biases; base: the grid of the layer before it was
    tuned, a candidate for each group.
    """
    diagonal = np.diag(hessian)
    # An input that was always 0 says nothing about its column; a little is added so that H can be inverted.
    h = hessian.astype(np.float32) + DAMPING * diagonal.mean() * np.eye(len(hessian), dtype=np.float32)
    weight = np.where(diagonal == 0, np.float32(0), weight)
    grid = _best_grid(weight, np.diag(h), group, bits, dtype, base)
    codes = _rounded_in_order(weight, h, grid, group, bits)
    _round_once_more(weight, h, codes, grid, group, bits)
    scales, biases = grid
    return mx.array(pack(codes, bits)), mx.array(scales).astype(dtype), mx.array(biases).astype(dtype)


def _rounded_in_order(weight: np.ndarray, h: np.ndarray, grid: Grid, group: int, bits: int) -> np.ndarray:
    """Codes [out, in] uint8: column by column, the error of each moved onto those that follow. weight: [out, in]; h:
    [in, in].
    """
    scales, biases = grid
    order = np.argsort(-np.diag(h), kind="stable")  # the columns that matter most have the most others to lean on
    inverse = np.linalg.inv(h[order][:, order].astype(np.float64))
    factor = np.linalg.cholesky(inverse).T.astype(np.float32)  # U, [in, in] in that order
    rest = weight[:, order]  # [out, in] what is still to be rounded, with the errors of all columns before
    codes = np.empty(weight.shape, np.uint8)
    for start in range(0, len(order), BLOCK):
        end = min(start + BLOCK, len(order))
        errors = np.empty((len(weight), end - start), np.float32)
        for at in range(start, end):
            column = order[at]
            scale, bias = scales[:, column // group], biases[:, column // group]  # [out] each
            codes[:, column] = _nearest_codes(rest[:, at], scale, bias, bits)
            error = (rest[:, at] - (codes[:, column] * scale + bias)) / factor[at, at]
            rest[:, at + 1 : end] -= np.outer(error, factor[at, at + 1 : end])
            errors[:, at - start] = error
        rest[:, end:] -= errors @ factor[start:end, end:]  # what the inner loop would have done, in one product
    return codes


def _nearest_codes(values: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """The codes nearest to `values`, 0 where a scale is 0; all arrays of one shape, or broadcast to it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(scales == 0, 0, (values - biases) / scales)
    return np.clip(np.rint(codes), 0, 2**bits - 1)


def _best_grid(
    weight: np.ndarray, importance: np.ndarray, group: int, bits: int, dtype: mx.Dtype, base: Grid | None
) -> Grid:
    """The grid that rounds each group best, every input's error counted by `importance` [in]: the base's, MLX's own, or
    the range from smallest to largest weight, whole or narrowed. weight: [out, in].
    """
    parts = weight.reshape(len(weight), -1, group)  # [out, G, group]
    low, high = parts.min(-1), parts.max(-1)  # [out, G]
    candidates = [((high - low) * shrink / (2**bits - 1), low * shrink) for shrink in SHRINKS]
    _, scales, biases = mx.quantize(mx.array(weight), group, bits)
    candidates.append((to_numpy(scales), to_numpy(biases)))
    if base is not None:
        candidates.append(base)
    least = np.full(low.shape, np.inf, np.float32)  # [out, G] the smallest error so far
    best = np.zeros((2, *low.shape), np.float32)  # [2, out, G] and its scale and bias
    for scales_, biases_ in candidates:
        scale, bias = _as_stored(scales_, dtype), _as_stored(biases_, dtype)  # [out, G]
        wide_scale, wide_bias = scale[..., None], bias[..., None]  # [out, G, 1]
        off = _nearest_codes(parts, wide_scale, wide_bias, bits) * wide_scale + wide_bias - parts
        error = (off * off * importance.reshape(-1, group)).sum(-1)
        better = error < least
        least = np.where(better, error, least)
        best = np.where(better, np.stack([scale, bias]), best)
    return best[0], best[1]


def _as_stored(array: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """float32 numbers of what is left when they are kept in `dtype`; of any shape."""
    return to_numpy(mx.array(array).astype(dtype).astype(mx.float32))


def _round_once_more(weight: np.ndarray, h: np.ndarray, codes: np.ndarray, grid: Grid, group: int, bits: int) -> None:
    """Once more over the columns, each rounded anew to what is best given all the others; changes `codes`.

    With E [out, in] the error of the rounded matrix, the outputs are off by tr(E H E^T). Of column j alone, that is
    least where it is moved by -(E H)[:, j] / H[j, j]. weight, codes: [out, in]; h: [in, in].
    """
    scales, biases = grid
    rounded = np.repeat(scales, group, 1) * codes + np.repeat(biases, group, 1)
    slope = (rounded - weight) @ h  # E H, [out, in]
    for column in range(weight.shape[1]):
        scale, bias = scales[:, column // group], biases[:, column // group]  # [out] each
        now = codes[:, column] * scale + bias
        new = _nearest_codes(now - slope[:, column] / h[column, column], scale, bias, bits)
        rows = np.flatnonzero(new != codes[:, column])
        moved = new[rows] * scale[rows] + bias[rows] - now[rows]
        slope[rows] += np.outer(moved, h[column])
        codes[rows, column] = new[rows]
