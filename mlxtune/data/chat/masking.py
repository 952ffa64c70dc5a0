"""Texts -> token ids, and the mask of what the model must produce.

`turns` or `asked` finds the characters; here they become tokens by the tokenizer's own offsets. A token that straddles
the border of an answer belongs to the answer. For example (ChatML, the answer is `Hello` and its end token):

    tokens    <|im_start|>  assistant  \\n  Hel  lo  <|im_end|>  \\n
    mask           0            0       0    1   1       1        0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np

from mlxtune.data.chat import turns
from mlxtune.data.chat.damage import Damage
from mlxtune.data.chat.repairs import repaired, weight
from mlxtune.data.template.template import Messages, Template
from mlxtune.data.template.templates import Templates

Span = tuple[int, int]  # characters [start, end) of a text


@dataclass(frozen=True)
class Example:
    """One training example of T tokens."""

    ids: Any = ()  # list or [T] array of int: the tokens
    mask: Any = ()  # list or [T] array of 0 and 1; 1: the model must produce this token
    damage: tuple[Damage, ...] = ()  # what of the conversation the template did not print


_of_last_tokenizer: list[Templates] = []  # at most one: `render` is called row after row with the same tokenizer


def template_of(tokenizer: Any, template_kwargs: dict[str, Any], day: date | None = None) -> Template:
    """The tokenizer's template with what was learnt about it, kept until another tokenizer is asked about.

    day: what templates that print the date are given (None: today).
    """
    if not _of_last_tokenizer or _of_last_tokenizer[0].tokenizer is not tokenizer:
        _of_last_tokenizer[:] = [Templates(tokenizer)]
    return _of_last_tokenizer[0].of(template_kwargs, day)


def render(
    tokenizer: Any, messages: Messages, tools: list[dict[str, Any]] | None = None, **template_kwargs: Any
) -> Example:
    """Token ids of a conversation with the mask of every assistant turn.

    tokenizer: a fast Hugging Face tokenizer with a chat template; messages: OpenAI messages. ids equal the tokenizer's
    own `apply_chat_template` of the `repaired` messages. Raises TemplateError when the template refuses them.
    """
    template = template_of(tokenizer, template_kwargs)
    located = turns.locate(template, repaired(template, messages), tools)
    trained = [(start, end) for index, start, end in located.spans if weight(messages[index])]
    (example,) = tokenized_turns(tokenizer, [located.text], [trained])
    return Example(list(example.ids), example.mask.tolist(), tuple(located.damage))


def tokenized_turns(tokenizer: Any, texts: Sequence[str], spans: Sequence[list[Span]]) -> list[Example]:
    """Token ids of rendered texts, with mask 1 for each token that shares a character with one of its text's spans."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    out = []
    for ids, offsets, trained in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
        out.append(Example(ids, _mask(offsets, trained)))
    return out


def tokenized_texts(template: Template, texts: Sequence[str]) -> list[Example]:
    """Token ids of plain texts, of which every token is to be produced: with the tokens that the tokenizer puts around
    a text, and the end token after it. What the text has of these itself is not put there twice.

    template: knows the tokenizer, and the tokens that end a turn: they end a text too. (The first token of all cannot
    be predicted from anything, so it never enters a loss.)
    """
    if not texts:
        return []
    tokenizer = template.tokenizer
    start, end = _around(tokenizer)
    end_texts = tuple({tokenizer.eos_token or "", *template.stops} - {""})
    out = []
    for text, ids in zip(texts, tokenizer(list(texts), add_special_tokens=False)["input_ids"], strict=True):
        whole = list(ids)
        if whole[: len(start)] != start:
            whole = [*start, *whole]
        has_end = bool(end_texts) and text.rstrip().endswith(end_texts)
        if not has_end:
            whole = [*whole, *end]
        out.append(Example(whole, np.ones(len(whole), np.uint8)))
    return out


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that belong before and after a plain text: those that the tokenizer adds, and the end token."""
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    with_added = tokenizer("a")["input_ids"]
    place = 0
    for at in range(len(with_added)):
        if with_added[at : at + len(alone)] == alone:
            place = at
            break
    start, end = with_added[:place], with_added[place + len(alone) :]
    if tokenizer.eos_token_id is not None and end[-1:] != [tokenizer.eos_token_id]:
        end = [*end, tokenizer.eos_token_id]
    return start, end


def _mask(offsets: Sequence[Span], spans: list[Span]) -> np.ndarray:
    """[T] 1 where a token's characters [start, end) meet a span's.

    offsets: T pairs, the characters of each token; spans: in the text's order, none overlapping another.
    """
    if not spans or not offsets:
        return np.zeros(len(offsets), np.uint8)
    starts, ends = np.array(offsets, np.int64).T  # each [T]
    # Offsets may leave out a token's leading space; its text starts where the text of the tokens before ended.
    ended_before = np.maximum.accumulate(np.concatenate([[0], ends[:-1]]))
    starts = np.minimum(starts, ended_before)
    span_starts, span_ends = np.array(spans, np.int64).T  # each [number of spans]
    # [T] the first span that ends after the token begins; the number of spans where there is none, so one that begins
    # behind every text is put there.
    candidate = np.searchsorted(span_ends, starts, side="right")
    begins_before_token_ends = np.append(span_starts, np.iinfo(np.int64).max)[candidate] < ends
    return (begins_before_token_ends & (starts < ends)).astype(np.uint8)
