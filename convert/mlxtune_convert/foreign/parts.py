"""What the readers of all formats make: quantized matrices that can be computed one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlxtune_convert.gguf.quant_blocks import Codes


@dataclass(frozen=True)
class Part:
    """One quantized tensor."""

    name: str  # in the plain model
    shape: tuple[int, ...]  # there
    uses: tuple[str, ...]  # the tensors that stand for it in the file
    # Computes one of its matrices by number (of the expert): float32, in the last two axes of `shape`.
    matrix: Callable[[int], np.ndarray]
    # The same weights as codes in MLX's layout, with scales of the given type; None where MLX has no such form.
    codes: Callable[[np.dtype], Codes] | None = None

    def dense(self, kind: np.dtype) -> np.ndarray:
        """All of it, in `shape`, each number rounded once from float32."""
        out = np.empty(self.shape, kind)
        for index, place in enumerate(out.reshape(-1, *self.shape[-2:])):
            with np.errstate(over="ignore", invalid="ignore"):  # whoever writes it looks for what is not finite
                place[:] = self.matrix(index).astype(kind)
        return out


@dataclass(frozen=True)
class Found:
    """What is quantized in a model."""

    title: str  # method and form, for people
    parts: list[Part]  # one for each quantized tensor


def counted(kinds: list[str]) -> str:
    """The different forms of a model's parts, the most frequent first."""
    return ", ".join(sorted(set(kinds), key=lambda kind: -kinds.count(kind)))
