"""Answers from a model, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from textwrap import shorten
from typing import Any

import mlx.core as mx

from mlxtune.data.template.answers import Plain, Reader
from mlxtune.data.template.template import Messages, Template, TemplateError
from mlxtune.errors import UserError
from mlxtune.model.corrections.extent import longest_alike
from mlxtune.model.load import Loaded

CUT = "\ufffd"  # what bytes that are no whole character yet are decoded to


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


class Refused(UserError):
    """The chat template refuses a conversation, or leaves a text out of it. system: it does so for a system prompt."""

    def __init__(self, message: str, system: bool) -> None:
        super().__init__(message)
        self.system = system


def template_for(loaded: Loaded, template_kwargs: dict[str, Any], day: str = "") -> Template | None:
    """The model's chat template with the variables, and the day (ISO; "": today), that a run trained with; None when it
    has none.
    """
    if loaded.tokenizer.chat_template is None:
        return None
    return loaded.templates.of(template_kwargs, date.fromisoformat(day) if day else None)


def prompt_ids(loaded: Loaded, messages: Messages, template_kwargs: dict[str, Any], day: str = "") -> list[int]:
    """A conversation as the model sees it before it answers; plain text when it has no chat template.

    Raises Refused when the template does, and UserError for a token that the model does not know.
    """
    template = template_for(loaded, template_kwargs, day)
    if template is None:
        ids = list(loaded.tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"])
    else:
        ids = list(loaded.tokenizer(prompt_text(template, messages), add_special_tokens=False)["input_ids"])
    loaded.check_ids([ids])
    return ids


def prompt_text(template: Template, messages: Messages) -> str:
    """The same as text. Raises Refused."""
    system = any(message["role"] == "system" for message in messages)
    try:
        text = template.text(messages, prompt=True)
    except TemplateError as error:
        others = [message for message in messages if message["role"] != "system"]
        system = system and bool(template.attempt(others, prompt=True))
        what = "a system prompt" if system else "this conversation"
        reason = shorten(str(error.__cause__ or error), 200, placeholder=" ...")
        raise Refused(f"the chat template refuses {what}: {reason}", system) from error
    marks = [chr(0xE000 + index) for index in range(len(messages))]
    shown = template.attempt([{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)], prompt=True)
    lost = {m["role"] for m, mark in zip(messages, marks, strict=True) if shown and mark not in shown} - {"assistant"}
    if lost:
        system = lost == {"system"}
        what = "a system prompt" if system else f"the text of a message of the {min(lost - {'system'})}"
        raise Refused(f"the chat template leaves out {what}", system)
    return text


def stream(loaded: Loaded, ids: list[int], sampling: Sampling) -> Iterator[str]:
    """Pieces of the answer as they come, special tokens included; the last one is the end token, unless the answer is
    cut after `max_tokens`.
    """
    made: list[int] = []
    start = known = 0  # the text of made[:known] was given; both are at the border of a character
    for token in tokens(loaded, ids, sampling):
        made.append(token)
        text = decoded(loaded, made[start:])  # some tokenizers drop a space at the start: with tokens before it
        if not text.endswith(CUT):
            yield text[len(decoded(loaded, made[start:known])) :]
            start, known = known, len(made)
    if known < len(made):
        yield decoded(loaded, made[start:])[len(decoded(loaded, made[start:known])) :]


def end_ids(loaded: Loaded) -> set[int]:
    """The tokens that end an answer: those that the model's files name, and those that its template trains turns to end
    with, which a folder made by hand may not name.
    """
    ends = set(loaded.eos_ids)
    if loaded.tokenizer.chat_template is not None:
        template = loaded.templates.of()
        last = template.special.findall(template.end_of_turn)[-1:]
        known = loaded.tokenizer.get_added_vocab()  # special tokens; the whole vocabulary is a dict made anew each time
        for token in (*last, template.header_that_ends(calls=False), template.header_that_ends(calls=True)):
            ends |= {known[token.strip()]} if token.strip() in known else set()
    return ends


def tokens(loaded: Loaded, ids: list[int], sampling: Sampling) -> Iterator[int]:
    """The answer's token ids, the one that ends it included."""
    from mlx_lm.generate import stream_generate
    from mlx_lm.sample_utils import make_logits_processors, make_sampler
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    mx.random.seed(sampling.seed)
    penalty = sampling.repetition_penalty if sampling.repetition_penalty != 1.0 else None
    limit = longest_alike(loaded.model)
    whole = limit is not None and len(ids) > limit  # in parts, the first would be rotated as a short row
    for piece in stream_generate(
        loaded.model,
        TokenizerWrapper(loaded.tokenizer, eos_token_ids=end_ids(loaded)),
        ids,
        max_tokens=sampling.max_tokens,
        sampler=make_sampler(sampling.temperature, sampling.top_p if sampling.top_p < 1 else 0.0),
        logits_processors=make_logits_processors(repetition_penalty=penalty, repetition_context_size=64),
        **({"prefill_step_size": len(ids)} if whole else {}),
    ):
        yield piece.token


def decoded(loaded: Loaded, ids: list[int]) -> str:
    text: str = loaded.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def reader_for(loaded: Loaded, messages: Messages, template_kwargs: dict[str, Any], day: str = "") -> Reader | Plain:
    """What tells thought and answer apart in the model's answer to a conversation, whose prompt was made before."""
    ends = frozenset(decoded(loaded, [index]) for index in end_ids(loaded)) - {""}  # ids without a token
    template = template_for(loaded, template_kwargs, day)
    return Plain(ends) if template is None else Reader(template, messages, ends=ends)


def answer(
    loaded: Loaded, messages: Messages, sampling: Sampling, template_kwargs: dict[str, Any], day: str = ""
) -> str:
    """The whole answer, its thought and special tokens included, without its end token."""
    made = list(tokens(loaded, prompt_ids(loaded, messages, template_kwargs, day), sampling))
    return decoded(loaded, made[:-1] if made[-1] in end_ids(loaded) else made)
