"""Which operations a device computes in a kernel that keeps less than the written-out operation; stand-ins for them.

A graph is taken down on the CPU's stream, where MLX writes such operations out. Attention of one head, T queries and S
keys, keeps on its way to the gradients:

    written out      q, k, v, and the softmax [T, S]: 4 MB of 1,000 tokens, 16 MB of 2,000
    Metal's kernel   q, k, v and little more: it computes the softmax again, tile by tile

So for another device than the CPU such operations are replaced by plain ones that keep what its kernels keep. Their
numbers mean nothing: only sizes are looked at.

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
from mlxtune.compute import attention
from mlxtune.compute.attention import Chunked, Masks
from mlxtune.compute.memory.own_attention import Kind, LinuxCpu, OwnAttention
from mlxtune.machine import backend
from mlxtune.model import gated_delta, linux_cpu

# MLX's kernels for the backward pass of attention on Metal (sdpa_vjp_* in its metallib): head widths, first version.
TILED_WIDTHS = frozenset((64, 72, 80, 96, 128, 192, 256, 512))
TILED_SINCE = (0, 32, 4)
TOKENS_PER_STATE = 16  # of those that the backward kernel of gated delta layers makes again (GATED_DELTA_CKPT)


@dataclass(frozen=True)
class Device:
    """What computes."""

    kind: str  # "metal", "cuda" or "cpu", as backend.kind() says it
    mlx: tuple[int, ...]  # MLX's version, three numbers
    powers: bool = False  # whether attention is our own, of Linux's CPU (`linux_cpu`)
    queries: int = 0  # whose scores are computed at once (`attention`); 0: of all
    parts: tuple[str, ...] = ()  # what of the model it computes otherwise, by its names in `compute.parts`

    @staticmethod
    def here(fast: bool = True, queries: int = 0, parts: tuple[str, ...] = ()) -> Device:
        """This one. fast: whether any of the fast ways is taken, as Linux's own attention is with them alone; queries,
        parts: as the fields.
        """
        numbers = tuple(int(part) for part in version("mlx").split(".")[:3] if part.isdigit())
        return Device(backend.kind(), numbers, fast and linux_cpu.worth_it(), queries, parts)


def tiled(device: Device, width: int, mask: Any, sinks: bool) -> bool:
    """Whether the backward pass of attention goes tile by tile, so that no row of scores [T, S] is kept.

    width: D; mask: "causal", None or an array. On Metal, for some widths, without an array or sinks. Elsewhere scores
    are counted: on the CPU they are kept, and what cuDNN keeps is not known from a source.
    """
    if device.kind != "metal" or device.mlx < TILED_SINCE:
        return False
    return width in TILED_WIDTHS and not sinks and (mask is None or isinstance(mask, str))


Functions = tuple[tuple[Any, str, Any], ...]  # (module, name, the function that it holds for a while)


@contextmanager
def standing_in(device: Device) -> Iterator[None]:
    """Inside, functions keep what they keep on `device`, and can be exported. On the CPU only attention of our own is
    another one, beside those with gradients of their own.
    """
    masks = Masks()
    kinds: list[Kind] = []
    if device.queries:
        exp = linux_cpu.exp if device.powers else linux_cpu.mlx_exp
        kinds.append(Chunked(device.queries, device.kind, masks, exp))
    if device.powers:
        kinds.append(LinuxCpu())
    other = linux_cpu.mlx_attention if device.kind == "cpu" else _attention_of(device)
    attend = OwnAttention(kinds, other) if kinds else other
    kernels = () if device.kind == "cpu" else _KERNELS
    with _replaced(_NOT_EXPORTED), _replaced(kernels), attention.standing_in(attend, masks):
        yield


@contextmanager
def _replaced(functions: Functions) -> Iterator[None]:
    """Inside, each name of a module holds the function that stands beside it. Older MLX lacks some of them."""
    present = [entry for entry in functions if hasattr(entry[0], entry[1])]
    before = [(module, name, getattr(module, name)) for module, name, _ in present]
    try:
        for module, name, other in present:
            setattr(module, name, other)
        yield
    finally:
        for module, name, own in before:
            setattr(module, name, own)


def _attention_of(device: Device) -> Callable[..., mx.array]:
    """What keeps as much as a GPU's attention does."""

    def attend(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None, **options: Any
    ) -> mx.array:
        if tiled(device, q.shape[-1], mask, sinks is not None):
            return tiled_attention(q, k, v)
        return linux_cpu.mlx_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)

    return attend


class TracedSwitch(LoRASwitchLinear):
    """An expert layer whose graph can be taken down: the gradient of a sorted gather_mm to its matrices is an operation
    that MLX does not export. It needs z, and gives an array like the weight.
    """

    def _product(self, z: mx.array, weight: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        """As the layer's own, with the weight's gradient made of operations that are exported."""
        if not sorted_indices:
            return super()._product(z, weight, indices, sorted_indices)
        y = super()._product(z, mx.stop_gradient(weight), indices, sorted_indices)
        return y + (weight * (z * z).mean()).sum()


def tiled_attention(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
    """Keeps q, k, v; gives [B, H, T, Dv]; not attention: only its arrays are of its sizes."""
    heads_per_key_head = q.shape[1] // k.shape[1]
    of_keys = (k * k).sum(axis=(2, 3), keepdims=True)
    of_values = (v * v).sum(axis=2, keepdims=True)
    both = mx.repeat(of_keys * of_values, heads_per_key_head, axis=1)
    shared: mx.array = (q * q).sum(axis=-1, keepdims=True) * both
    return shared


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float, **options: Any) -> mx.array:
    y = x * mx.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return y if weight is None else y * weight.astype(x.dtype)


def _layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float, **options: Any) -> mx.array:
    y = _rms_norm(x - x.mean(axis=-1, keepdims=True), weight, eps)
    return y if bias is None else y + bias.astype(x.dtype)


def _gated_delta(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Keeps what it is given, and needs some states going back, from which the kernel computes the others again.

    q, k [B, T, K, D], v [B, T, H, V], g and beta [B, T, H], state [B, H, V, D] -> [B, T, H, V], [B, H, V, D].
    """
    count = -(-q.shape[1] // TOKENS_PER_STATE)
    given = _squares(q, k, g)
    rows, heads, *matrix = state.shape
    states = mx.broadcast_to((state + given)[:, :, None], (rows, heads, count, *matrix))
    y = v * beta[..., None] + _squares(states)
    return y, state * given


def _computed_again(function: Any) -> Any:
    """In place of mx.checkpoint: what is given is kept, and what the function makes of it is not."""

    def call(*arrays: mx.array) -> mx.array:
        out: mx.array = mx.stop_gradient(function(*arrays))
        return out + _squares(*arrays).astype(out.dtype)

    return call


def _inverse(below: mx.array) -> mx.array:
    return mx.stop_gradient(gated_delta.inverse_by_blocks(below)) + below


def _contiguous(array: mx.array, **options: Any) -> mx.array:
    """An array of its own, for which nothing is kept."""
    return -array


def _squares(*arrays: mx.array) -> mx.array:
    """One number, whose gradient needs all of the arrays."""
    total = mx.array(0.0)
    for array in arrays:
        total = total + (array * array).sum()
    return total


# What MLX does not export: gradients of functions that are no operations of its own, and one of its operations.
_NOT_EXPORTED: Functions = (
    (mx, "checkpoint", _computed_again),
    (gated_delta, "inverse", _inverse),
    (mx, "contiguous", _contiguous),
)
# What stands for the kernels of a GPU, beside its attention.
_KERNELS: Functions = (
    (mx.fast, "rms_norm", _rms_norm),
    (mx.fast, "layer_norm", _layer_norm),
    (mx.fast, "gated_delta_update", _gated_delta),
)
