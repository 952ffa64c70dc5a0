"""How the tokens of an answer are chosen, so that an answer does not depend on what is answered beside it.

MLX's own random draws come from one state for the whole process: the second row of a batch gets what the first one
left. So each row has a key of its own, made of (seed, prompt, sample), and each token of it one more:

    row     key of the row        token 0               token 1
    a, 0    [k0, k1]              [k0, k1 + 0]          [k0, k1 + 1]
    b, 0    [m0, m1]              [m0, m1 + 0]          [m0, m1 + 1]

A token is drawn by the Gumbel-max trick: with G independent Gumbel noise, argmax(log p / T + G) is i with the
probability that softmax(log p / T) gives i. The noise of a row is a function of its key alone, in any batch.

Legend: B rows, V vocabulary, C the last tokens that a repetition penalty looks at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

PENALTY_TOKENS = 64  # C


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen."""

    max_tokens: int = 512  # of an answer, its thought included
    temperature: float = 0.0  # 0: always the most likely token
    top_p: float = 1.0  # nucleus: of the most likely tokens, as many as have this probability together; 1: all
    repetition_penalty: float = 1.0  # divides the logits of the last PENALTY_TOKENS tokens; 1: none
    seed: int = 0  # of the random choices


def row_key(seed: int, id: str = "", sample: int = 0) -> np.ndarray:
    """[2] uint32: where the random numbers of one answer begin. id, sample: of the prompt."""
    digest = hashlib.sha256(f"{seed}\0{sample}\0{id}".encode()).digest()
    return np.frombuffer(digest[:8], np.uint32)


class Chooser:
    """Chooses the next token of each row of a batch; called once for each place in the answers."""

    def __init__(self, sampling: Sampling, keys: Sequence[np.ndarray], prompts: Sequence[Sequence[int]]) -> None:
        """keys: as `row_key` makes them, one of each row; prompts: the rows' token ids, none of them empty."""
        self._sampling = sampling
        self._keys = np.stack(keys)  # [B, 2]
        self._place = 0  # of the token in the answers
        # [B, C]; a prompt that is shorter begins with its first token several times, which changes nothing: a token is
        # penalized once however often it is there.
        recent = [[*[prompt[0]] * (PENALTY_TOKENS - len(prompt)), *prompt[-PENALTY_TOKENS:]] for prompt in prompts]
        self._recent = mx.array(np.array(recent, np.int32)) if sampling.repetition_penalty != 1.0 else None

    def __call__(self, logits: mx.array) -> mx.array:
        """[B, V] logits -> [B] token ids."""
        logits = logits.astype(mx.float32)
        if self._recent is not None:
            logits = _penalized(logits, self._recent, self._sampling.repetition_penalty)
        if self._sampling.temperature == 0:
            chosen = mx.argmax(logits, axis=-1)
        else:
            if self._sampling.top_p < 1:
                logits = _nucleus(logits, self._sampling.top_p)
            chosen = mx.argmax(logits / self._sampling.temperature + self._noise(logits.shape[-1]), axis=-1)
        self._place += 1
        if self._recent is not None:
            self._recent = mx.concatenate([self._recent[:, 1:], chosen[:, None].astype(mx.int32)], axis=1)
        return chosen

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch alone."""
        self._keys = self._keys[list(rows)]
        if self._recent is not None:
            self._recent = self._recent[mx.array(list(rows))]

    def _noise(self, vocabulary: int) -> mx.array:
        """[B, V] Gumbel noise of the tokens at this place."""
        keys = self._keys + np.array([0, self._place], np.uint32)  # wraps around, as uint32 does
        return mx.vmap(lambda key: mx.random.gumbel(shape=(vocabulary,), key=key))(mx.array(keys))


def _penalized(logits: mx.array, recent: mx.array, penalty: float) -> mx.array:
    """logits [B, V], those of the tokens `recent` [B, C] made smaller (Keskar et al. 2019, arXiv:1909.05858)."""
    found = mx.take_along_axis(logits, recent, axis=-1)
    smaller = mx.where(found < 0, found * penalty, found / penalty)
    return mx.put_along_axis(logits, recent, smaller, axis=-1)


def _nucleus(logits: mx.array, share: float) -> mx.array:
    """logits [B, V], minus infinity but for the most likely tokens that have `share` of the probability together.

    A token stays where those before it have less than that, so the most likely one always does (Holtzman et al. 2020,
    arXiv:1904.09751).
    """
    order = mx.argsort(-logits, axis=-1)
    likely_first = mx.take_along_axis(mx.softmax(logits, axis=-1), order, axis=-1)
    before = mx.cumsum(likely_first, axis=-1) - likely_first
    kept = mx.where(before < share, mx.take_along_axis(logits, order, axis=-1), -mx.inf)
    return mx.put_along_axis(logits, order, kept, axis=-1)
