"""One thin product for the layers of a block that are given the same input: query, key and value; gate and up.

An adapted layer computes W x + s B (A x). A is thin (D rows, r columns, r is 8 or so), so A x is hardly arithmetic: its
time is that of reading x. Layers that are given the same x read it one after the other, and in the backward pass each
reads it again for the gradient of its A, and writes a gradient of x of its own. With their A side by side it is once:

    x @ A_q, x @ A_k, x @ A_v        three products, x read three times
    x @ [A_q | A_k | A_v]            one product, cut into three: column by column the same sums

Which layers belong together is told by their names in one module (`TOGETHER`), and that they are given the same input
by the array itself: the first of them that is called computes the product for all and keeps it beside its x. Another is
given its columns where its own x is that very object; else it computes the product anew, so a wrong name costs time but
no exactness. A block that is computed again in the backward pass is given other arrays, and so it makes a product of
its own. What was kept goes when the last layer has taken its columns.

Legend: D width of the input, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from mlxtune.adapter.layers import LoRALinear
from mlxtune.model.classes import as_classes

# Names of layers in one module of mlx-lm that are given the same input.
TOGETHER = (
    ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def is_in(model: nn.Module) -> bool:
    """Whether a model has adapted layers that belong together."""
    return bool(_groups(model))


@contextmanager
def within(model: nn.Module) -> Iterator[None]:
    """Inside, layers that belong together have one product for their A."""
    groups = _groups(model)
    classes = [(layer, _of_group(type(layer), group)) for group in groups for layer in group.layers]
    try:
        with as_classes(classes):
            yield
    finally:
        for group in groups:
            group.forget()


class _Group:
    """Layers that are given the same input, and what is kept for those of them that are still to be called."""

    def __init__(self, layers: list[LoRALinear]) -> None:
        self.layers = layers
        self._given: mx.array | None = None  # the input that the products below are of
        self._products: dict[int, mx.array] = {}  # [..., r] by the id of the layer

    def product(self, layer: LoRALinear, x: mx.array) -> mx.array:
        """x [..., D] @ A of one of the layers: [..., r]."""
        if x is not self._given or id(layer) not in self._products:
            self._given = x
            self._products = self._products_of(x)
        mine = self._products.pop(id(layer))
        if not self._products:
            self.forget()
        return mine

    def forget(self) -> None:
        """Let go of what is kept."""
        self._given = None
        self._products = {}

    def _products_of(self, x: mx.array) -> dict[int, mx.array]:
        side_by_side = mx.concatenate([layer.lora_a.astype(x.dtype) for layer in self.layers], axis=1)
        ends = []
        columns = 0
        for layer in self.layers:
            columns += layer.rank
            ends.append(columns)
        cut = mx.split(x @ side_by_side, ends[:-1], axis=-1)
        return {id(layer): z for layer, z in zip(self.layers, cut, strict=True)}


def _groups(model: nn.Module) -> list[_Group]:
    found = []
    for _, module in model.named_modules():
        for names in TOGETHER:
            layers = [module[name] for name in names if isinstance(module.get(name), LoRALinear)]
            widths = {layer.lora_a.shape[0] for layer in layers}
            if len(layers) > 1 and len(widths) == 1:
                found.append(_Group(layers))
    return found


def _of_group(kind: type, group: _Group) -> type:
    """A class like `kind`, of the same name, whose product with A comes from its group."""
    return type(kind.__name__, (kind,), {"_narrowed": lambda layer, x: group.product(layer, x)})
