"""The activation that a configuration names, where mlx-lm's model of the family has another one built in.

mlx-lm computes one activation for a family whatever config.json says (`families.Family.activation`), and for some
families it is not the one that their official configurations name. Example: starcoder2's config.json names
gelu_pytorch_tanh; mlx-lm computes down(gelu(up(x))), transformers down(gelu_tanh(up(x))). Of 1 the two forms of GELU
make 0.84134 and 0.84119: little, but in every layer. So the feed-forward module gets a class whose call computes
transformers'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU
from mlxtune_convert.hf.unheeded import ACTIVATION_KEYS

from mlxtune.model.corrections.families import family_of


def _squared(x: mx.array) -> mx.array:
    return nn.relu(x).square()


Function = Callable[[mx.array], mx.array]
FUNCTIONS: dict[str, Function] = {  # by transformers' name
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
    "relu2": _squared,
}
# Layers of a feed-forward module, in the order in which they are applied.
_PLAIN = (("c_fc", "c_proj"), ("fc1", "fc2"), ("dense_h_to_4h", "dense_4h_to_h"), ("up_proj", "down_proj"))


def name_of(config: Any) -> str:
    """The activation of transformers' configuration object; "" where it names none."""
    values = (getattr(config, key, None) for key in ACTIVATION_KEYS)
    return str(next((value for value in values if value), ""))


def wanted(config: Any) -> Function | None:
    """The activation to compute in place of mlx-lm's own; None: mlx-lm's is right, or we know no other.

    config: transformers' configuration object, of the text part.
    """
    function = FUNCTIONS.get(name_of(config))
    built_in = family_of(config.model_type).activation
    if not built_in or function is FUNCTIONS[built_in]:
        return None
    return function


def put(block: nn.Module, function: Function) -> None:
    """Let the feed-forward layers of a block compute an activation."""
    for module in block.modules():
        if isinstance(module, SwitchGLU):
            module.activation = Gated(function)
        elif (call := _call(module, function)) is not None:
            kind: Any = type(module)
            module.__class__ = type(f"Activated{kind.__name__}", (kind,), {"__call__": call, "activated": function})


def has(module: nn.Module) -> bool:
    """Whether `put` gave a module its activation."""
    return isinstance(module, Gated) or hasattr(type(module), "activated")


class Gated(nn.Module):
    """What experts compute between their layers."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        """x and gate of one shape, [..., width of an expert] -> the same shape."""
        return self.function(gate) * x


def _call(module: nn.Module, function: Function) -> Callable[..., mx.array] | None:
    """The forward pass of a feed-forward module, by the layers that it has; None for any other module."""
    if "gate_proj" in module and "up_proj" in module:

        def gated(self: Any, x: mx.array) -> mx.array:
            out: mx.array = self.down_proj(function(self.gate_proj(x)) * self.up_proj(x))
            return out

        return gated
    if "gate_up_proj" in module:

        def halves(self: Any, x: mx.array) -> mx.array:
            gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
            out: mx.array = self.down_proj(function(gate) * up)
            return out

        return halves
    for first, last in _PLAIN:
        if first in module and last in module:

            def plain(self: Any, x: mx.array, first: str = first, last: str = last) -> mx.array:
                out: mx.array = self[last](function(self[first](x)))
                return out

            return plain
    return None
