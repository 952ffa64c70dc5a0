"""Examples that begin with the same tokens, which a model need compute but once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mlxtune.data.chat.masking import Example

MIN_GROUP_TOKENS = 32  # a beginning that only some rows share is worth a batch of their own from here on


def common(a: Any, b: Any) -> int:
    """How many tokens two rows of ids begin with together. a, b: [T] each, of any lengths."""
    shared = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:shared]) != np.asarray(b[:shared]))
    return int(differ[0]) if len(differ) else shared


def first_target(example: Example) -> int:
    """The position of an example's first supervised token that something predicts."""
    return int(np.flatnonzero(example.mask[1:])[0]) + 1


def groups(examples: Sequence[Example], least: int, among: Iterable[int] | None = None) -> list[list[int]]:
    """Sets of two and more examples that share their first `least` tokens, all before their first target.

    among: the examples to look at, else all.
    """
    by_beginning: dict[bytes, list[int]] = {}
    for index in range(len(examples)) if among is None else among:
        example = examples[index]
        if first_target(example) > least:
            beginning = np.asarray(example.ids[:least], np.int32).tobytes()
            digest = hashlib.blake2b(beginning, digest_size=16).digest()
            by_beginning.setdefault(digest, []).append(index)
    return [group for group in by_beginning.values() if len(group) > 1]
