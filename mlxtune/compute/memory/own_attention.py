"""The graph of an attention of ours, taken down with its gradients: of `attention.Chunked`, or of Linux's CPU.

A graph is taken down by exporting it, and MLX exports no custom gradient. So the attention's own backward pass is put
in by hand, between the gradients of what comes after it and of what comes before it:

    before(arrays) -> q, k, v -> attention -> after(attention, arrays) -> outputs
    d(arrays)      <- d(q, k, v) <- its backward pass <- d(attention) <- d(outputs)

`before` ends where the attention begins, and `after` begins with its result as another input: the same function is run
three times, with `OwnAttention` giving another answer each time.

Legend: B rows, H query heads, K key heads, T queries, S keys, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from mlxtune.model import linux_cpu


class Kind(Protocol):
    """An attention of ours, as `attention.Chunked` describes it."""

    def is_for(self, q: mx.array, mask: Any, sinks: Any) -> bool:
        """Whether attention of queries q [B, H, T, D] is computed so."""

    def forward(
        self, q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any, sinks: mx.array | None
    ) -> tuple[mx.array, ...]:
        """The attention [B, H, T, D], and what else is kept for the backward pass."""

    def backward(
        self, primals: Any, cotangent: mx.array, outputs: Any, scale: float, mask: Any
    ) -> tuple[mx.array, ...]:
        """A gradient for each of the primals: of q [B, H, T, D], of k and v [B, K, S, D], and of sinks [H] if any."""


class LinuxCpu:
    """The attention of `linux_cpu`."""

    def is_for(self, q: mx.array, mask: Any, sinks: Any) -> bool:
        """Of queries q [B, H, T, D]."""
        return linux_cpu.is_for(q, mask, sinks)

    def forward(
        self, q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any, sinks: mx.array | None
    ) -> tuple[mx.array, ...]:
        """q [B, H, T, D], k and v [B, K, S, D] -> as `linux_cpu.forward`."""
        return linux_cpu.forward(q, k, v, scale, linux_cpu.bias_of(mask, q.shape[2], k.shape[2]))

    def backward(
        self, primals: Any, cotangent: mx.array, outputs: Any, scale: float, mask: Any
    ) -> tuple[mx.array, ...]:
        """Of the attention [B, H, T, D] -> as `linux_cpu.backward`."""
        return linux_cpu.backward(primals, cotangent, outputs, scale)


@dataclass(frozen=True)
class _Call:
    """One call of the attention."""

    kind: Kind  # by which it was computed
    primals: tuple[mx.array, ...]  # q [B, H, T, D], k and v [B, K, S, D], and sinks [H] where there are any
    outputs: tuple[mx.array, ...]  # what `kind.forward` gave
    scale: float  # of the scores
    mask: Any  # None, "causal" or booleans


class OwnAttention:
    """In place of mx.fast.scaled_dot_product_attention while a graph is taken down."""

    def __init__(self, kinds: list[Kind], otherwise: Callable[..., mx.array]) -> None:
        """kinds: of attention, the first that is for a call computes it; otherwise: what does where none is."""
        self._kinds = kinds
        self._otherwise = otherwise
        self._calls: list[_Call] = []  # of the function that was run last
        self._result: mx.array | None = None  # [B, H, T, D] to answer with; None: attention is computed

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
        """[B, H, T, D], with no gradient of its own, where one of the kinds is for it."""
        kind = next((kind for kind in self._kinds if kind.is_for(q, mask, sinks)), None)
        if kind is None:
            return self._otherwise(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)
        if self._result is not None:
            return self._result
        outputs = kind.forward(q, k, v, scale, mask, sinks)
        primals = (q, k, v) if sinks is None else (q, k, v, sinks)
        self._calls.append(_Call(kind, primals, outputs, scale, mask))
        return mx.stop_gradient(outputs[0])

    def gradients(
        self, function: Callable[..., list[mx.array]], wanted: list[mx.array], cotangents: list[mx.array]
    ) -> tuple[list[mx.array], list[mx.array]]:
        """As mx.vjp: (what `function(*wanted)` gives, a gradient of the shape of each of `wanted`).

        A function that calls no attention, or several, is left to mx.vjp.
        """
        outs = self._run(function, wanted)
        if len(self._calls) != 1:
            with attention_is(self._otherwise, after=self):
                return mx.vjp(function, wanted, cotangents)
        (call,) = self._calls

        def after(result: mx.array, *arrays: mx.array) -> list[mx.array]:
            self._result = result
            try:
                return function(*arrays)
            finally:
                self._result = None

        def before(*arrays: mx.array) -> list[mx.array]:
            self._run(function, list(arrays))
            return list(self._calls[0].primals)

        _, (of_attention, *around_it) = mx.vjp(after, [call.outputs[0], *wanted], cotangents)
        of_primals = call.kind.backward(call.primals, of_attention, call.outputs, call.scale, call.mask)
        _, through_it = mx.vjp(before, wanted, list(of_primals))
        return outs, [one + other for one, other in zip(around_it, through_it, strict=True)]

    def _run(self, function: Callable[..., list[mx.array]], arrays: list[mx.array]) -> list[mx.array]:
        self._calls.clear()
        return function(*arrays)


@contextmanager
def attention_is(function: Any, after: Any) -> Iterator[None]:
    """Inside, mx.fast's attention is one function, `after` that another one."""
    fast: Any = mx.fast
    fast.scaled_dot_product_attention = function
    try:
        yield
    finally:
        fast.scaled_dot_product_attention = after
