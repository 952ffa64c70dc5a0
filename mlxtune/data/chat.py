"""A conversation -> token ids, and the mask of what the model must produce.

Masks are found by construction, not by searching for marker text. Each assistant turn's content is replaced by a
character that occurs nowhere in the conversation, and the template renders again: where the two renders differ is
exactly what that turn contributed. User text takes part in both renders, so nothing it contains can be mistaken for a
turn. After the content comes the end-of-turn token, found once per template in the same way. Characters are mapped to
tokens by the tokenizer's own offsets; a token that straddles the border of an answer belongs to the answer.

Costs one extra render per row, plus one per assistant turn where the template changes the content (strips it, say).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from mlxtune.errors import UserError

# Private-use characters: one that the conversation does not contain stands in for an answer.
_STAND_INS = [chr(0xE000 + offset) for offset in range(0x1900)]


@dataclass(frozen=True)
class Example:
    """One training example. mask[i] = 1: the model must produce ids[i]."""

    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)


class TemplateError(Exception):
    """The template refuses a conversation; the text says why."""


def render(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **template_kwargs: Any
) -> Example:
    """Token ids of a conversation, equal to the tokenizer's own `apply_chat_template`, with the mask of every
    assistant turn.

    tokenizer: a fast Hugging Face tokenizer with a chat template; messages: role and content each. Raises
    TemplateError when the template refuses the conversation.
    """
    text, spans = spans_of(tokenizer, messages, tools, **template_kwargs)
    return tokenized(tokenizer, text, spans)


def spans_of(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **template_kwargs: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text and, per assistant turn, the [start, end) characters that the model must produce."""

    def to_text(conversation: list[dict[str, Any]]) -> str:
        return _apply(tokenizer, conversation, tools, template_kwargs)

    text = to_text(messages)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return text, []
    unused = iter(character for character in _STAND_INS if character not in text)
    stand_ins = {index: next(unused) for index in turns}
    spans = _aligned(
        text, to_text([_replaced(m, stand_ins.get(i)) for i, m in enumerate(messages)]), messages, stand_ins
    )
    if spans is None:
        spans = [
            _difference(text, to_text([*messages[:i], _replaced(messages[i], mark), *messages[i + 1 :]]), mark)
            for i, mark in stand_ins.items()
        ]
    last = end_of_turn(tokenizer, template_kwargs)
    return text, [(start, end + len(last) * text.startswith(last, end)) for start, end in spans]


def _apply(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, template_kwargs: dict[str, Any]) -> str:
    from jinja2.exceptions import TemplateError as JinjaError

    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **template_kwargs)
    except (JinjaError, TypeError, KeyError, ValueError) as error:
        raise TemplateError(f"the chat template refuses this conversation: {error}") from error


def _replaced(message: dict[str, Any], mark: str | None) -> dict[str, Any]:
    """The same turn with nothing in it but `mark`."""
    return message if mark is None else {"role": message["role"], "content": mark}


def _aligned(
    text: str, marked: str, messages: list[dict[str, Any]], stand_ins: dict[int, str]
) -> list[tuple[int, int]] | None:
    """Spans when the template prints every answer as it is: one render for all turns. None: not that simple."""
    spans = []
    at = 0  # in text
    read = 0  # in marked
    for index, mark in stand_ins.items():
        place = marked.find(mark, read)
        if place < 0 or text[at : at + place - read] != marked[read:place]:
            return None
        start = at + place - read
        end = start + len(messages[index]["content"])
        if not text.startswith(messages[index]["content"], start):
            return None
        spans.append((start, end))
        at, read = end, place + 1
    return spans if text[at:] == marked[read:] else None


def _difference(text: str, marked: str, mark: str) -> tuple[int, int]:
    """The part of `text` that stands where `marked` has `mark`. The mark occurs nowhere else, so neither side
    overshoots.
    """
    place = marked.find(mark)
    if place < 0:
        raise TemplateError("the chat template does not print this assistant turn's content")
    before, after = marked[:place], marked[place + len(mark) :]
    start = _common_prefix(text, before)
    end = len(text) - _common_prefix(text[::-1], after[::-1])
    return start, max(start, end)


def _common_prefix(one: str, other: str) -> int:
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


_ends: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()


def end_of_turn(tokenizer: Any, template_kwargs: dict[str, Any]) -> str:
    """What the template prints after an answer, up to its end-of-turn token; "" when there is none.

    Whitespace before that token belongs to it: the model must produce it to get there.
    """
    key = f"{tokenizer.chat_template}{sorted(template_kwargs.items())}"
    known = _ends.setdefault(tokenizer, {})
    if key not in known:
        mark = _STAND_INS[0]
        probe = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": mark}]
        tail = _apply(tokenizer, probe, None, template_kwargs).partition(mark)[2]
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        stripped = tail.lstrip()
        found = max((token for token in added if stripped.startswith(token)), key=len, default="")
        known[key] = tail[: len(tail) - len(stripped) + len(found)] if found else ""
    return known[key]


def tokenized(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> Example:
    """Token ids of rendered text, and mask 1 for each token that shares a character with a span."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = []
    position = 0  # first span that may still matter
    reached = 0  # offsets may leave out a token's leading space; its text starts where the last token ended
    for start, end in encoding["offset_mapping"]:
        start, reached = min(start, reached), max(end, reached)
        while position < len(spans) and spans[position][1] <= start:
            position += 1
        mask.append(int(position < len(spans) and spans[position][0] < end and start < end))
    return Example(list(encoding["input_ids"]), mask)


def render_text(tokenizer: Any, text: str) -> Example:
    """Plain text: every token is to be produced, and the end token after it.

    The first token of all cannot be predicted from anything, so it never enters a loss.
    """
    ids = list(tokenizer(text)["input_ids"])
    if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids.append(tokenizer.eos_token_id)
    return Example(ids, [1] * len(ids))


def require_template(tokenizer: Any, folder: Any) -> None:
    if tokenizer.chat_template is None:
        raise UserError(
            f"{folder}: the tokenizer has no chat template, so conversations cannot be rendered",
            "Use the model's instruct version, or rows with the key `text`.",
        )
