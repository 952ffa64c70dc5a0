"""Micro-batches of pairs and of rated answers, made without any file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import Batch, collate
from mlxtune.data.rows.sides import Side

Shape = tuple[int, int, int]  # tokens of a prompt, of the chosen answer, of the rejected one


def answer(prompt: Sequence[int], tokens: Sequence[int]) -> Example:
    """A prompt and its answer, all of which is supervised."""
    return Example([*prompt, *tokens], [0] * len(prompt) + [1] * len(tokens))


def examples(shapes: Sequence[Shape], seed: int = 0) -> list[Example]:
    """Two for each pair, the chosen answer first. Answers of a pair differ from their first token on."""
    draw = np.random.default_rng(seed)
    found = []
    for prompt, *sides in shapes:
        asked = draw.integers(3, 250, prompt).tolist()
        for side, count in enumerate(sides):
            found.append(answer(asked, [260 + side, *draw.integers(3, 250, count - 1).tolist()]))
    return found


def of_pairs(rows: Sequence[Example]) -> Batch:
    """rows: as `examples` gives them."""
    sides = np.array([Side.CHOSEN, Side.REJECTED] * (len(rows) // 2), np.uint8)
    return replace(collate(rows, range(len(rows))), sides=sides, answer_of=np.arange(len(rows), dtype=np.int32))


def of_rated(rows: Sequence[Example], good: Sequence[bool]) -> Batch:
    sides = np.array([Side.GOOD if each else Side.BAD for each in good], np.uint8)
    return replace(collate(rows, range(len(rows))), sides=sides, answer_of=np.arange(len(rows), dtype=np.int32))


def of_several_examples(batch: Batch, answer_of: Sequence[int]) -> Batch:
    """The same rows, some of them examples of one answer: side by side, chosen first."""
    numbers = np.array(answer_of, np.int32)
    sides = np.where(numbers % 2 == 0, Side.CHOSEN, Side.REJECTED).astype(np.uint8)
    return replace(batch, sides=sides, answer_of=numbers)
