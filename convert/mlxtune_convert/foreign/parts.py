"""What the readers of all formats make: quantized matrices that can be computed one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlxtune_convert.gguf.quant_blocks import Codes


@dataclass(frozen=True)
class Part:
    """One quantized tensor.

    name: in the plain model; shape: there; uses: the tensors that stand for it in the file; matrix: computes one of its
    matrices in float32, by number where there are several (experts); codes: the same weights as codes in MLX's layout,
    with scales of a type, or None where MLX has no such form.
    """

    name: str
    shape: tuple[int, ...]
    uses: tuple[str, ...]
    matrix: Callable[[int], np.ndarray]
    codes: Callable[[np.dtype], Codes] | None = None

    def dense(self, kind: np.dtype) -> np.ndarray:
        """All of it, each number rounded once from float32."""
        out = np.empty(self.shape, kind)
        for index, place in enumerate(out.reshape(-1, *self.shape[-2:])):
            with np.errstate(over="ignore", invalid="ignore"):  # whoever writes it looks for what is not finite
                place[:] = self.matrix(index).astype(kind)
        return out


@dataclass(frozen=True)
class Found:
    """A quantized model. title: method and form, for people; parts: its quantized tensors."""

    title: str
    parts: list[Part]


def counted(kinds: list[str]) -> str:
    """The different forms of a model's parts, the most frequent first."""
    return ", ".join(sorted(set(kinds), key=lambda kind: -kinds.count(kind)))
