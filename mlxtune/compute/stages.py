"""In what order the graph of a loss and its gradients is computed.

MLX only notes what is to be computed, and computes when it is asked to: then it allocates ahead, in an order of its
own. Asked for everything at once, a step would hold the activations of all blocks and the logits of all chunks at the
same time. So the graph is asked for in stages, each of which lets go of what only it needed:

    stages  [output of block 1, output of block 3, [loss so far, gradient] of chunk 1, ... of chunk 2]
    then    gradients of the last layer, of the one before, ..., of the first
    then    the rest

Why is `stages` a list that is handed down and added to, and not something that is returned? The arrays are born inside
a block's `__call__`, inside a custom function, and inside the function that `nn.value_and_grad` calls: none of the
three lets anything out beside its result. What `nn.value_and_grad` would let out, it wraps in operations of its own.
"""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx

from mlxtune.machine import backend
from mlxtune.model.arrays import named

Stages = list[Any]  # each an array or a list of arrays, of any shape, in the order in which they are to be computed

OUTSIDE = -1  # in place of a layer's number, for what belongs to no layer


def compute(stages: Stages, value: mx.array, gradients: Any) -> None:
    """Compute a loss (a scalar) and its gradients, or, on a GPU, hand them to it; `stages` is empty after.

    On a GPU the caller waits once, at the end: waiting for each stage would leave it idle between them.
    """
    take = mx.async_eval if backend.policy().queued else mx.eval
    while stages:
        take(stages.pop(0))
    by_layer = _by_layer(gradients)
    for layer in sorted(by_layer, reverse=True):
        take(by_layer[layer])
    take(value, gradients)


def _by_layer(gradients: Any) -> dict[int, list[mx.array]]:
    """The gradients of each layer, by its number: "model.layers.3.mlp..." and "transformer.h.3.mlp..." are of 3."""
    found: dict[int, list[mx.array]] = {}
    for name, array in named(gradients).items():
        number = re.search(r"\.(\d+)\.", name)
        layer = OUTSIDE if number is None else int(number[1])
        found.setdefault(layer, []).append(array)
    return found
