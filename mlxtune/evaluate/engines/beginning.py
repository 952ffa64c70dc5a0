"""What all prompts begin with (a system prompt, a rubric, examples), computed once for all their batches.

24 prompts that begin with the same 23 tokens: 23 tokens are computed instead of 24 * 23, which saves 529.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxtune.data.dataset.beginnings import common
from mlxtune.evaluate.engines.decode import PREFILL, Caches, Counted, own_caches, prefill, repeated

WORTH = 8  # tokens: a pass for fewer of them costs what it saves


@dataclass(frozen=True)
class Beginning:
    """The tokens that prompts share, read by a model."""

    tokens: int  # how many; 0: none, the caches are empty
    caches: Caches  # of one row; never written to again

    @staticmethod
    def of(model: Counted, tokens: Sequence[int], at_once: int = PREFILL) -> Beginning:
        caches = own_caches(model)
        if tokens:
            prefill(model, caches, [tokens], at_once)
        return Beginning(len(tokens), caches)

    def under(self, rows: int) -> Caches:
        """Caches of so many rows that all begin with it."""
        return repeated(self.caches, rows)


def shared(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all prompts begin with; [] where that saves nothing.

    At least two tokens of each prompt are left: one to be read in the batch, and the last, which begins the answer.
    """
    if len(prompts) < 2:
        return []
    first = list(prompts[0])
    length = min(len(prompt) for prompt in prompts) - 2
    for prompt in prompts[1:]:
        length = min(length, common(prompt[: max(0, length)], first[: max(0, length)]))
    return first[:length] if length >= WORTH else []
