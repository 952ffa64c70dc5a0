"""Gated activations that are computed again in the backward pass: SwiGLU, GeGLU and their kin.

The feed-forward part of most models is down(act(gate(x)) * up(x)). On the way to its gradient MLX keeps, of a token:

    as it is written    gate, sigmoid(gate), act(gate), up, and the product, which an adapter of `down` needs: 5 F
    here                gate, up and the product: 3 F

F is the width of the feed-forward part, 2.7 to 4 times the model's. What is left out is made again from gate and up
when the backward pass comes there, element by element: next to the matrix products that is nothing. `mx.checkpoint`
does it, so the numbers are the same bits and no derivative is written by hand. It also makes what is computed again
wait for the gradient: in a compiled step MLX joins equal operations, and would keep the first one's result after all.

Where a whole block is computed again anyway, it brings nothing.

Most families call a function by its name, which can stand for another (`functions`). Some write the activation out in
the call of a class: those layers get a class whose call is the same with the activation computed again (`classes`).

Rejected: derivatives written by hand. SmolLM2's widths, 4 blocks, 384 tokens, LoRA on all layers: the peak is 127.6 MB
as it is, 106.4 MB so, 104.0 MB by hand, for one formula a kind of activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.model.classes import as_classes, calling
from mlxtune.model.functions import Function, finds_any, function, in_place_of

# Modules of mlx-lm and their functions of arrays, element by element.
FUNCTIONS = (
    ("activations", "swiglu"),
    ("activations", "precise_swiglu"),
    ("activations", "swiglu_oai"),
    ("activations", "xielu"),
    ("gemma4_text", "geglu"),
    ("step3p5", "clamped_swiglu"),
    ("iquestloopcoder", "_silu_mul"),
)
# Modules and classes of mlx-lm whose call is down_proj(act(gate_proj(x)) * up_proj(x)), and act.
WRITTEN_OUT: dict[tuple[str, str], Callable[[mx.array], mx.array]] = {
    ("gemma", "MLP"): nn.gelu,
    ("gemma2", "MLP"): nn.gelu_approx,
    ("gemma3_text", "MLP"): nn.gelu_approx,
    ("olmo_hybrid", "MLP"): nn.silu,
    ("recurrent_gemma", "MLPBlock"): nn.gelu_approx,
    ("muse_glimmer", "MLP"): nn.silu,
    ("spark2_5", "MLP"): nn.gelu,
}


def is_in(model: nn.Module) -> bool:
    """Whether a model has such activations."""
    return bool(_classes(model)) or finds_any(model, _functions())


@contextmanager
def computed_again(model: nn.Module) -> Iterator[None]:
    """Inside, the model's gated activations keep what they are given, and nothing else."""
    with in_place_of(model, _functions()), as_classes(_classes(model)):
        yield


def keeping_inputs(activation: Function) -> Function:
    """A function of arrays that keeps them alone for its gradient. What it is given by name is no array."""

    def call(*arrays: mx.array, **options: Any) -> Any:
        return mx.checkpoint(partial(activation, **options))(*arrays)

    return call


def _functions() -> dict[Function, Function]:
    found = {}
    for module, name in FUNCTIONS:
        activation = function(module, name)
        if activation is not None:
            found[activation] = keeping_inputs(activation)
    return found


def _classes(model: nn.Module) -> list[tuple[nn.Module, type]]:
    """(layer, the class that it gets for the while) of the layers that write the activation out."""
    found = []
    for _, layer in model.named_modules():
        kind = type(layer)
        family = kind.__module__.removeprefix("mlx_lm.models.")
        activation = WRITTEN_OUT.get((family, kind.__name__))
        if activation is not None:
            found.append((layer, calling(kind, _gated_by(activation))))
    return found


def _gated_by(activation: Callable[[mx.array], mx.array]) -> Callable[..., mx.array]:
    gated = keeping_inputs(lambda gate, up: activation(gate) * up)

    def call(self: Any, x: mx.array) -> mx.array:
        out: mx.array = self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
        return out

    return call
