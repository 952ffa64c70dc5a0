"""The layers that train: low-rank updates beside a frozen layer, and layers trained in full.

A new variant of LoRA touches three places:

1. here its class, and its line in VARIANTS (with a scale of 0 it must give the base: `attach.switched_off`);
2. config/schema.py: its name in `LoraSection.variant`;
3. mlxtune_convert/adapters.py: its name in VARIANTS with the tensors that it saves; what mlx-lm would misread is then
   written into a file of our own, and PEFT and GGUF refuse tensors that they have no place for.

KINDS of tests/test_variants.py holds every variant to what all must do. A class of its own for experts also needs its
graph: compute/memory/kernels.

PEFT and GGUF put adapters otherwise: what a variant has beyond lora_a and lora_b is carried over, or refused, in
mlxtune_convert/peft and ship/gguf.py.

Legend: in, out widths of a linear layer; r rank; E experts. Factors are float32 masters; their products run in the
activation dtype. `lora_a` starts uniform in +-1/sqrt(in), `lora_b` at zero, so the first step sees the base model.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlxtune.adapter.dropout import DropoutKeys
from mlxtune.model.dense import QUANTIZED, dense_weight

LINEAR = (nn.Linear, nn.QuantizedLinear)
SWITCH = (SwitchLinear, QuantizedSwitchLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)


class LoRALinear(nn.Module):
    """A linear layer with its update: lora_a [in, r], lora_b [r, out]."""

    def __init__(
        self, linear: nn.Module, rank: int, scale: float, key: mx.array, index: int, dropout: DropoutKeys
    ) -> None:
        super().__init__()
        outputs, inputs = dense_shape(linear)
        self.linear = linear
        self.rank = rank
        self.scale = scale
        bound = 1 / math.sqrt(inputs)
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank), key=key)
        self.lora_b = mx.zeros((rank, outputs))
        self._index = index
        self._dropout = dropout

    def _added(self, y: mx.array, x: mx.array) -> mx.array:
        """y [..., out] plus the update, scaled where it is narrow and added by the product that makes it wide."""
        z = self._narrowed(self._dropout.apply(x, self._index))
        return mx.addmm(y, self.scale * z, self.lora_b.astype(x.dtype))

    def _narrowed(self, x: mx.array) -> mx.array:
        """x [..., in] -> [..., r]."""
        return x @ self.lora_a.astype(x.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., in] -> [..., out]."""
        return self._added(self.linear(x), x)

    def delta(self) -> mx.array:
        """The update as a matrix [out, in], float32."""
        return self.scale * (self.lora_b.T @ self.lora_a.T)

    def merged(self, weight: mx.array) -> mx.array:
        """The layer's matrix [out, in] when its base is `weight`, float32."""
        return weight + self.delta()


class DoRALinear(LoRALinear):
    """LoRA that trains the length m [out] of W's rows apart from their direction (Liu et al. 2024, arXiv:2402.09353).

    y = m / ||W + s BA|| * (W x + s BA x) + bias (eq. 5), the norm of each row a constant in the backward pass (sec.
    4.3). The norm needs no second copy of W: ||W + sBA||^2 = ||W||^2 + 2s <WA', B> + s^2 <B A A', B>, row by row.
    """

    def __init__(
        self, linear: nn.Module, rank: int, scale: float, key: mx.array, index: int, dropout: DropoutKeys
    ) -> None:
        super().__init__(linear, rank, scale, key, index, dropout)
        self._squares = mx.square(dense_weight(linear)).sum(axis=1)
        self.m = mx.sqrt(self._squares)
        mx.eval(self._squares, self.m)

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., in] -> [..., out]."""
        y = self.linear(x)
        if self.scale == 0:  # switched off
            return y
        bias = self.linear.get("bias")
        y = self._added(y if bias is None else y - bias, x)
        y = y * (self.m / mx.stop_gradient(self._norms(x.dtype))).astype(x.dtype)
        return y if bias is None else y + bias

    def _norms(self, dtype: mx.Dtype) -> mx.array:
        """[out] lengths of the rows of W + s BA, float32."""
        a, b = self.lora_a, self.lora_b
        projected = self.linear(a.T.astype(dtype))  # [r, out]
        if "bias" in self.linear:
            projected = projected - self.linear.bias
        cross = (projected.astype(mx.float32) * b).sum(axis=0)
        own = ((a.T @ a) @ b * b).sum(axis=0)
        return mx.sqrt(self._squares + 2 * self.scale * cross + self.scale**2 * own)

    def merged(self, weight: mx.array) -> mx.array:
        """m times the direction of the rows of W + s BA, [out, in]."""
        moved = weight + self.delta()
        return moved * (self.m / mx.linalg.norm(moved, axis=1))[:, None]


class LoRASwitchLinear(nn.Module):
    """Expert layers with one update each: lora_a [E, r, in], lora_b [E, out, r]."""

    def __init__(
        self, linear: nn.Module, rank: int, scale: float, key: mx.array, index: int, dropout: DropoutKeys
    ) -> None:
        super().__init__()
        experts, outputs, inputs = dense_shape(linear)
        self.linear = linear
        self.rank = rank
        self.scale = scale
        bound = 1 / math.sqrt(inputs)
        self.lora_a = mx.random.uniform(-bound, bound, (experts, rank, inputs), key=key)
        self.lora_b = mx.zeros((experts, outputs, rank))
        self._index = index
        self._dropout = dropout

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [..., 1 or K, 1, in], indices [..., K] of the K experts that each token goes to -> [..., K, 1, out].

        sorted_indices: mlx-lm has sorted the N = tokens x K rows by expert: x is [N, 1, in] then, indices [N].
        """
        z = self._dropout.apply(x, self._index)
        for factor in (self.lora_a, self.lora_b):
            z = self._product(z, factor.astype(x.dtype).swapaxes(-1, -2), indices, sorted_indices)
        return self.linear(x, indices, sorted_indices=sorted_indices) + self.scale * z

    def _product(self, z: mx.array, weight: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        return mx.gather_mm(z, weight, rhs_indices=indices, sorted_indices=sorted_indices)

    def delta(self) -> mx.array:
        """The updates as matrices [E, out, in], float32."""
        return self.scale * (self.lora_b @ self.lora_a)

    def merged(self, weight: mx.array) -> mx.array:
        """The layer's matrices [E, out, in] when their base is `weight`, float32."""
        return weight + self.delta()


AdaptedLayer = LoRALinear | LoRASwitchLinear


def _over_rank(alpha: float, rank: int) -> float:
    return alpha / rank


def _over_root_of_rank(alpha: float, rank: int) -> float:
    """rsLoRA, Kalajdzievski 2023, arXiv:2312.03732."""
    return alpha / math.sqrt(rank)


@dataclass(frozen=True)
class Variant:
    """A kind of adapter that lora.variant can name."""

    # As people write it.
    title: str
    # Adapts a linear layer.
    linear: type[LoRALinear]
    # Adapts a layer of experts; None: it has no form for them.
    experts: type[LoRASwitchLinear] | None
    # (lora.alpha, rank) -> what the update B A is multiplied by.
    scale: Callable[[float, int], float]


VARIANTS = {
    "lora": Variant("LoRA", LoRALinear, LoRASwitchLinear, _over_rank),
    "rslora": Variant("rsLoRA", LoRALinear, LoRASwitchLinear, _over_root_of_rank),
    "dora": Variant("DoRA", DoRALinear, None, _over_rank),
}


def dense_shape(linear: nn.Module) -> tuple[int, ...]:
    """The shape of a linear layer's or embedding's matrix before quantization: [out, in], or [E, out, in]."""
    *shape, columns = linear.weight.shape
    if isinstance(linear, QUANTIZED):
        columns = columns * 32 // linear.bits
    return (*shape, columns)


class FrozenOriginal:
    """Holds the layer that a trained one replaced, out of sight of MLX's module tree."""

    def __init__(self, module: nn.Module, dtype: mx.Dtype) -> None:
        self.module = module
        self.dtype = dtype


class TrainedInFull:
    """Mixed into the class of a layer trained in full: float32 masters, results in the activation dtype."""

    frozen: FrozenOriginal

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)  # type: ignore[misc]
        return out.astype(self.frozen.dtype) if isinstance(out, mx.array) else out

    def as_linear(self, x: mx.array) -> mx.array:
        """A tied head: x [..., width] -> logits [..., vocabulary]."""
        return x @ self.weight.astype(x.dtype).T  # type: ignore[attr-defined]


@functools.cache
def _trained_kind(kind: Any) -> type:
    return type(f"Trained{kind.__name__}", (TrainedInFull, kind), {})


def trained_in_full(module: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """A layer like `module` whose own parameters are dense, float32 and trainable; `module` stays as it is.

    dtype: of the activations.
    """
    layer = dense_copy(module)
    for name, value in own_parameters(layer).items():
        layer[name] = tree_map(lambda array: mx.array(array.astype(mx.float32)), value)
    layer.__class__ = _trained_kind(type(layer))  # type: ignore[arg-type]
    layer.frozen = FrozenOriginal(module, dtype)
    layer.unfreeze(recurse=False)
    return layer


# What a quantized layer becomes when its matrix is dense.
DENSE: dict[type, Any] = {
    nn.QuantizedLinear: nn.Linear,
    nn.QuantizedEmbedding: nn.Embedding,
    QuantizedSwitchLinear: SwitchLinear,
    QuantizedMultiLinear: MultiLinear,
}


def dense_copy(module: nn.Module) -> Any:
    """A layer of its own with the same parameters, the matrix of a quantized one made dense (float32)."""
    for quantized, dense in DENSE.items():
        if isinstance(module, quantized):
            layer = dense.__new__(dense)
            nn.Module.__init__(layer)
            layer.weight = dense_weight(module)
            if "bias" in module:
                layer.bias = module.bias
            return layer
    layer = copy.copy(module)
    layer._no_grad = set()
    return layer


def own_parameters(module: nn.Module) -> dict[str, mx.array]:
    """A module's own arrays by name, of any shape; those of its children and its buffers are not among them."""
    return {name: value for name, value in module.items() if isinstance(value, mx.array) and not name.startswith("_")}
