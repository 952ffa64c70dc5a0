"""The activation that a configuration names, where mlx-lm's model of the family has another one built in.

mlx-lm computes one activation for a family whatever config.json says, and for some families it is not the one that
their official configurations name (both are forms of GELU).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU
from mlxtune_convert.hf.unheeded import ACTIVATION_KEYS


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
_SILU = (
    "cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 ernie4_5_moe exaone4 glm glm4 glm4_moe granite granitemoe "
    "helium hunyuan_v1_dense llama ministral3 mistral mixtral olmo2 olmo3 olmoe phi3 phimoe qwen2 qwen2_moe qwen3 "
    "qwen3_moe seed_oss smollm3 stablelm"
)
BUILT_IN: dict[str, Function] = {  # what mlx-lm computes in the feed-forward layers of a family
    **dict.fromkeys(_SILU.split(), nn.silu),
    **dict.fromkeys(("gemma", "starcoder2", "gpt_bigcode"), nn.gelu),
    **dict.fromkeys(("gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi"), nn.gelu_approx),
    "nemotron": _squared,
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
    return None if function is BUILT_IN.get(config.model_type, function) else function


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
