"""Which operations a device computes in a kernel that keeps less than the written-out operation; stand-ins for them.

A graph is traced on the CPU's stream, where MLX writes such operations out. For another device they are replaced by
plain operations that keep what its kernels keep.

Legend: B rows, H query heads, K key heads, T queries, S keys, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from mlxtune.adapter.layers import LoRASwitchLinear
from mlxtune.machine import backend
from mlxtune.model import linux_cpu

# MLX's kernels for the backward pass of attention on Metal (sdpa_vjp_* in its metallib): head widths, first version.
TILED_WIDTHS = frozenset((64, 72, 80, 96, 128, 192, 256, 512))
TILED_SINCE = (0, 32, 4)


@dataclass(frozen=True)
class Device:
    """What computes. kind: as backend.kind(); mlx: its version; powers: whether attention is our own (exponentials)."""

    kind: str
    mlx: tuple[int, ...]
    powers: bool = False

    @staticmethod
    def here(fast: bool = True) -> Device:
        """This one. fast: whether any of the fast ways is taken, as our own attention is with them alone."""
        numbers = tuple(int(part) for part in version("mlx").split(".")[:3] if part.isdigit())
        return Device(backend.kind(), numbers, fast and linux_cpu.worth_it())


def tiled(device: Device, width: int, mask: Any, sinks: bool) -> bool:
    """Whether the backward pass of attention goes tile by tile, so that no row of scores [T, S] is kept.

    width: D; mask: "causal", None or an array. On Metal, for some widths, without an array or sinks. Elsewhere scores
    are counted: on the CPU they are kept, and what cuDNN keeps is not known from a source.
    """
    if device.kind != "metal" or device.mlx < TILED_SINCE:
        return False
    return width in TILED_WIDTHS and not sinks and (mask is None or isinstance(mask, str))


class OwnAttention:
    """Our own attention while a graph is traced. Its backward pass is a function that MLX does not export: `gradients`
    puts it between the gradients of what comes after and of what comes before.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[tuple[mx.array, ...], tuple[mx.array, ...], float]] = []  # primals, outputs, scale
        self._given: mx.array | None = None  # instead of the attention

    def __call__(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        mask: Any = None,
        sinks: Any = None,
        **options: Any,
    ) -> mx.array:
        if not linux_cpu.is_for(q, mask, sinks):
            return linux_cpu.mlx_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)
        if self._given is not None:
            return self._given
        bias = linux_cpu.bias_of(mask, q.shape[2], k.shape[2])
        outputs = linux_cpu.forward(q, k, v, scale, bias)
        self._calls.append(((q, k, v), outputs, scale))
        return mx.stop_gradient(outputs[0])

    def gradients(
        self, function: Callable[..., list[mx.array]], wanted: list[mx.array], cotangents: list[mx.array]
    ) -> tuple[list[mx.array], list[mx.array]]:
        """As mx.vjp. A function that calls no attention, or several, is left to it."""
        outs = self._run(function, wanted)
        if len(self._calls) != 1:
            fast: Any = mx.fast
            fast.scaled_dot_product_attention = linux_cpu.mlx_attention
            try:
                return mx.vjp(function, wanted, cotangents)
            finally:
                fast.scaled_dot_product_attention = self
        (primals, outputs, scale), *_ = self._calls

        def after(given: mx.array, *arrays: mx.array) -> list[mx.array]:
            self._given = given
            try:
                return function(*arrays)
            finally:
                self._given = None

        def before(*arrays: mx.array) -> list[mx.array]:
            self._run(function, list(arrays))
            return list(self._calls[0][0])

        _, (of_attention, *late) = mx.vjp(after, [outputs[0], *wanted], cotangents)
        _, early = mx.vjp(before, wanted, list(linux_cpu.backward(primals, of_attention, outputs, scale)))
        return outs, [one + other for one, other in zip(late, early, strict=True)]

    def _run(self, function: Callable[..., list[mx.array]], arrays: list[mx.array]) -> list[mx.array]:
        self._calls.clear()
        return function(*arrays)


@contextmanager
def standing_in(device: Device) -> Iterator[None]:
    """Inside, mx.fast keeps what the kernels of `device` keep; on the CPU only our own attention is another."""
    fast: Any = mx.fast
    if device.kind == "cpu":
        found = fast.scaled_dot_product_attention
        fast.scaled_dot_product_attention = OwnAttention() if device.powers else linux_cpu.mlx_attention
        try:
            yield
        finally:
            fast.scaled_dot_product_attention = found
        return
    before = {name: getattr(fast, name) for name in ("scaled_dot_product_attention", "rms_norm", "layer_norm")}
    written_out = before["scaled_dot_product_attention"]

    def attention(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None, **options: Any
    ) -> mx.array:
        if tiled(device, q.shape[-1], mask, sinks is not None):
            return _tiled_attention(q, k, v)
        out: mx.array = written_out(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)
        return out

    fast.scaled_dot_product_attention, fast.rms_norm, fast.layer_norm = attention, _rms_norm, _layer_norm
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(fast, name, function)


class TracedSwitch(LoRASwitchLinear):
    """An expert layer whose graph can be taken down: the gradient of a sorted gather_mm to its matrices is an operation
    that MLX does not export. It needs z, and gives an array like the weight.
    """

    def _product(self, z: mx.array, weight: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        if not sorted_indices:
            return super()._product(z, weight, indices, sorted_indices)
        y = super()._product(z, mx.stop_gradient(weight), indices, sorted_indices)
        return y + (weight * (z * z).mean()).sum()


def _tiled_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Keeps q, k, v; gives [B, H, T, Dv]; not attention: only its arrays are of its sizes."""
    many = q.shape[1] // k.shape[1]
    of_keys = (k * k).sum(axis=(2, 3), keepdims=True)
    of_values = (v * v).sum(axis=2, keepdims=True)
    both = mx.repeat(of_keys * of_values, many, axis=1)
    shared: mx.array = (q * q).sum(axis=-1, keepdims=True) * both
    return shared


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float, **options: Any) -> mx.array:
    y = x * mx.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return y if weight is None else y * weight.astype(x.dtype)


def _layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float, **options: Any) -> mx.array:
    y = _rms_norm(x - x.mean(axis=-1, keepdims=True), weight, eps)
    return y if bias is None else y + bias.astype(x.dtype)
