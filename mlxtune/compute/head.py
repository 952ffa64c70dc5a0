"""The model cut in two: trunk (tokens -> hidden state) and head (hidden state -> logits).

The loss needs logits only at supervised positions; the head on all of them is often half of a step's work. No table
of families is needed: the head is the model class's own `__call__`, run on a stand-in whose trunk returns the hidden
rows it is given, so soft-caps, logit scales and tied embeddings are whatever the model does:

    class Model:                                      # of mlx-lm
        def __call__(self, ids):
            out = self.model(ids)                     # the trunk, [B, T, D]
            return self.lm_head(out) / self.scale     # what is wanted of it

    trunk alone   model.model(ids)
    head alone    Model.__call__(stand_in, ids), where stand_in.model(anything) gives the rows that were gathered, and
                  everything else of stand_in, such as lm_head and scale, is the model's own

`Split.of` proves itself on real tokens before it is used.

Legend: B rows, T tokens, N gathered positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.compute.precision import in_float32
from mlxtune.model.arrays import named, scalar

TRUNKS = ("model", "transformer", "backbone")  # what the families of mlx-lm call it
TOLERANCE = 1e-5  # of the largest logit, in float32: the same operations on the same rows, perhaps in another order


class _FixedTrunk:
    """A trunk that returns given hidden rows, and otherwise is the real one (tied heads ask it for the embedding)."""

    def __init__(self, trunk: nn.Module, hidden: mx.array) -> None:
        self._trunk = trunk
        self._hidden = hidden

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        """[1, N, D], whatever it is called with."""
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)

    def __contains__(self, name: str) -> bool:
        return name in self._trunk


class _ModelWithFixedTrunk:
    """A model with its trunk replaced."""

    def __init__(self, model: nn.Module, trunk_name: str, trunk: _FixedTrunk) -> None:
        self._model = model
        self._trunk_name = trunk_name
        self._trunk = trunk

    def __getattr__(self, name: str) -> Any:
        if name == self._trunk_name:
            return self._trunk
        return getattr(self._model, name)

    def __contains__(self, name: str) -> bool:
        return name in self._model


class Split:
    """How to run trunk and head apart.

    holder: the module whose attribute `trunk_name` is the trunk; vocabulary: V, the width of its logits.
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
        names = [name for name in TRUNKS if name in holder]
        if not names:
            return None
        split = Split(holder, names[0])
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
        _, gradients = nn.value_and_grad(model, lambda: mx.square(self.logits(hidden)).sum())()
        return any(scalar(mx.abs(gradient).max()) > 0 for gradient in named(gradients).values())

    def logits(self, hidden: mx.array) -> mx.array:
        """[N, D] hidden rows -> [N, V] logits."""
        trunk = _FixedTrunk(getattr(self._holder, self._name), hidden[None])
        stand_in = _ModelWithFixedTrunk(self._holder, self._name, trunk)
        any_ids = mx.zeros((1, hidden.shape[0]), mx.int32)
        out: mx.array = type(self._holder).__call__(stand_in, any_ids)
        return out[0]
