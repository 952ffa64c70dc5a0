"""The model cut in two: trunk (tokens -> hidden state) and head (hidden state -> logits).

The loss needs logits only at supervised positions; the head on all of them is often half of a step's work. No table
of families is needed: the head is the model class's own `__call__`, run on a stand-in whose trunk returns the hidden
rows it is given, so soft-caps, logit scales and tied embeddings are whatever the model does. `Split.of` proves itself
on real tokens before it is used.

Legend: B rows, T tokens, N gathered positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.compute.precision import in_float32
from mlxtune.model.arrays import named, scalar

TRUNKS = ("model", "transformer", "backbone")
TOLERANCE = 1e-5  # of the largest logit, in float32: the same operations on the same rows, perhaps in another order


class _Stub:
    """A trunk that returns given hidden rows, and otherwise is the real one (tied heads ask it for the embedding)."""

    def __init__(self, trunk: nn.Module, hidden: mx.array) -> None:
        self._trunk = trunk
        self._hidden = hidden

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)

    def __contains__(self, name: str) -> bool:
        return name in self._trunk


class _StandIn:
    """A model with its trunk replaced."""

    def __init__(self, model: nn.Module, trunk_name: str, stub: _Stub) -> None:
        self._model = model
        self._replaced = {trunk_name: stub}

    def __getattr__(self, name: str) -> Any:
        return self._replaced[name] if name in self._replaced else getattr(self._model, name)

    def __contains__(self, name: str) -> bool:
        return name in self._model


class Split:
    """How to run trunk and head apart. `holder` is the module whose attribute `trunk_name` is the trunk; vocabulary: V,
    the width of its logits.
    """

    def __init__(self, holder: nn.Module, trunk_name: str, vocabulary: int = 0) -> None:
        self._holder = holder
        self._name = trunk_name
        self.vocabulary = vocabulary

    @staticmethod
    def of(model: nn.Module, ids: mx.array) -> Split | None:
        """The split of a model, if it reproduces the model's own logits on `ids` [B, T]; else None: use the plain
        path.
        """
        holder = model
        while "language_model" in holder:
            holder = holder.language_model
        name = next((name for name in TRUNKS if name in holder), None)
        if name is None:
            return None
        split = Split(holder, name)
        with in_float32(model):
            try:
                logits = split.logits(split.hidden(ids).reshape(ids.size, -1))
            except (ValueError, TypeError, AttributeError):  # a head that needs more than hidden rows
                return None
            plain = model(ids)
            if logits.size != plain.size:
                return None
            difference = scalar(mx.abs(logits.reshape(plain.shape) - plain).max())
            largest = scalar(mx.abs(plain).max())
        split.vocabulary = plain.shape[-1]
        return split if difference <= TOLERANCE * max(largest, 1.0) else None

    def hidden(self, ids: mx.array, cache: Any = None) -> mx.array:
        """[B, T] tokens -> [B, T, D] final hidden state. cache: of the model's layers, where a prefix is shared."""
        trunk = getattr(self._holder, self._name)
        out: mx.array = trunk(ids) if cache is None else trunk(ids, cache=cache)
        return out

    def head_is_trained(self, model: nn.Module, hidden: mx.array) -> bool:
        """Whether a gradient from the head reaches a trainable parameter (head LoRA, trained head, tied embedding).

        hidden: one row [1, D]. The step after a fresh adapter would be too late to see: of its two factors one always
        gets a gradient.
        """
        gradients = nn.value_and_grad(model, lambda: mx.square(self.logits(hidden)).sum())()[1]
        return any(scalar(mx.abs(gradient).max()) > 0 for gradient in named(gradients).values())

    def logits(self, hidden: mx.array) -> mx.array:
        """[N, D] hidden rows -> [N, V] logits."""
        stub = _Stub(getattr(self._holder, self._name), hidden[None])
        ids = mx.zeros((1, hidden.shape[0]), mx.int32)
        out: mx.array = type(self._holder).__call__(_StandIn(self._holder, self._name, stub), ids)
        return out[0]
