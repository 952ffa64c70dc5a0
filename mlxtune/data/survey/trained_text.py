"""The text of an example, cut where what the model must produce begins and ends."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from mlxtune.data.chat.masking import Example


def pieces(tokenizer: Any, example: Example) -> list[tuple[bool, str]]:
    """(whether the model must produce it, its text) of each piece, in their order; joined they are the example."""
    ids, mask = example.ids, example.mask
    out = []
    for is_learned, places in groupby(range(len(ids)), key=lambda place: bool(mask[place])):
        out.append((is_learned, decoded(tokenizer, [int(ids[place]) for place in places])))
    return out


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """The text of some tokens, as it stands."""
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text
