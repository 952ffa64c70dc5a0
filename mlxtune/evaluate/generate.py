"""Answers from a model, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxtune.model.load import Loaded


@dataclass(frozen=True)
class Sampling:
    """temperature 0: always the most likely token; top_p: nucleus; repetition_penalty 1: none (it looks back 64
    tokens).
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


def prompt_ids(loaded: Loaded, messages: list[dict[str, Any]], template_kwargs: dict[str, Any]) -> list[int]:
    """A conversation as the model sees it before it answers; plain text when it has no chat template."""
    tokenizer = loaded.tokenizer
    if tokenizer.chat_template is None:
        ids = list(tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"])
    else:
        ids = list(
            tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False, **template_kwargs
            )
        )
    loaded.check_ids([ids])
    return ids


def stream(loaded: Loaded, ids: list[int], sampling: Sampling) -> Iterator[str]:
    """Pieces of the answer as they come; ends at any end-of-turn id or after `max_tokens`."""
    from mlx_lm.generate import stream_generate
    from mlx_lm.sample_utils import make_logits_processors, make_sampler
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    mx.random.seed(sampling.seed)
    penalty = sampling.repetition_penalty if sampling.repetition_penalty != 1.0 else None
    for piece in stream_generate(
        loaded.model,
        TokenizerWrapper(loaded.tokenizer, eos_token_ids=loaded.eos_ids),
        ids,
        max_tokens=sampling.max_tokens,
        sampler=make_sampler(sampling.temperature, sampling.top_p if sampling.top_p < 1 else 0.0),
        logits_processors=make_logits_processors(repetition_penalty=penalty, repetition_context_size=64),
    ):
        if piece.text:
            yield piece.text


def answer(loaded: Loaded, messages: list[dict[str, Any]], sampling: Sampling, template_kwargs: dict[str, Any]) -> str:
    """The whole answer."""
    return "".join(stream(loaded, prompt_ids(loaded, messages, template_kwargs), sampling))
