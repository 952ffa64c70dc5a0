"""The graph of the attention that Linux's CPU has (`linux_cpu.attention`), taken down with its gradients.

A graph is taken down by exporting it, and MLX exports no custom gradient. So the attention's own backward pass is put
in by hand, between the gradients of what comes after it and of what comes before it:

    before(arrays) -> q, k, v -> attention -> after(attention, arrays) -> outputs
    d(arrays)      <- d(q, k, v) <- linux_cpu.backward <- d(attention) <- d(outputs)

`before` ends where the attention begins, and `after` begins with its result as another input: the same function is run
three times, with `OwnAttention` giving another answer each time. A Mac never comes here.

Legend: B rows, H query heads, K key heads, T queries, S keys, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxtune.model import linux_cpu


@dataclass(frozen=True)
class _Call:
    """One call of the attention."""

    primals: tuple[mx.array, ...]  # q [B, H, T, D], k and v [B, K, S, D]
    outputs: tuple[mx.array, ...]  # what `linux_cpu.forward` gave
    scale: float  # of the scores


class OwnAttention:
    """In place of mx.fast.scaled_dot_product_attention while a graph is taken down."""

    def __init__(self) -> None:
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
        """[B, H, T, D], with no gradient of its own; as `linux_cpu.attention`."""
        if not linux_cpu.is_for(q, mask, sinks):
            return linux_cpu.mlx_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)
        if self._result is not None:
            return self._result
        bias = linux_cpu.bias_of(mask, q.shape[2], k.shape[2])
        outputs = linux_cpu.forward(q, k, v, scale, bias)
        self._calls.append(_Call((q, k, v), outputs, scale))
        return mx.stop_gradient(outputs[0])

    def gradients(
        self, function: Callable[..., list[mx.array]], wanted: list[mx.array], cotangents: list[mx.array]
    ) -> tuple[list[mx.array], list[mx.array]]:
        """As mx.vjp: (what `function(*wanted)` gives, a gradient of the shape of each of `wanted`).

        A function that calls no attention, or several, is left to mx.vjp.
        """
        outs = self._run(function, wanted)
        if len(self._calls) != 1:
            with _attention_is(linux_cpu.mlx_attention, after=self):
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
        of_primals = linux_cpu.backward(call.primals, of_attention, call.outputs, call.scale)
        _, through_it = mx.vjp(before, wanted, list(of_primals))
        return outs, [one + other for one, other in zip(around_it, through_it, strict=True)]

    def _run(self, function: Callable[..., list[mx.array]], arrays: list[mx.array]) -> list[mx.array]:
        self._calls.clear()
        return function(*arrays)


@contextmanager
def own_attention(powers: bool) -> Iterator[None]:
    """Inside, attention is what can be taken down: our own (powers), or MLX's as it is without us."""
    before = mx.fast.scaled_dot_product_attention
    with _attention_is(OwnAttention() if powers else linux_cpu.mlx_attention, after=before):
        yield


@contextmanager
def _attention_is(function: Any, after: Any) -> Iterator[None]:
    """Inside, mx.fast's attention is one function, `after` that another one."""
    fast: Any = mx.fast
    fast.scaled_dot_product_attention = function
    try:
        yield
    finally:
        fast.scaled_dot_product_attention = after
