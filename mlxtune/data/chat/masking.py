"""A conversation -> token ids, and the mask of what the model must produce.

`turns` finds the characters; here they become tokens by the tokenizer's own offsets. A token that straddles the border
of an answer belongs to the answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np

from mlxtune.data.chat import turns
from mlxtune.data.chat.turns import Damage
from mlxtune.data.rows.messages import WEIGHTS, parsed_arguments, with_arguments, with_short_ids
from mlxtune.data.template.template import THINKING_KEYS, Messages, Template


@dataclass(frozen=True)
class Example:
    """One training example. mask[i] = 1: the model must produce ids[i]. damage: what the template did not print."""

    ids: Any = ()  # list or [T] array of int
    mask: Any = ()
    damage: tuple[Damage, ...] = ()


_templates: dict[tuple[int, str], Template] = {}


def template_of(tokenizer: Any, template_kwargs: dict[str, Any], day: date | None = None) -> Template:
    """The tokenizer's template, with what was learnt about it; day: for templates that print the date (None: today)."""
    key = id(tokenizer), f"{tokenizer.chat_template}{sorted(template_kwargs.items())}{day}"
    if key not in _templates:
        _templates[key] = Template(tokenizer, template_kwargs, day)
    return _templates[key]


def render(
    tokenizer: Any, messages: Messages, tools: list[dict[str, Any]] | None = None, **template_kwargs: Any
) -> Example:
    """Token ids of a conversation with the mask of every assistant turn.

    tokenizer: a fast Hugging Face tokenizer with a chat template; messages: OpenAI messages. ids equal the tokenizer's
    own `apply_chat_template` of the `repaired` messages. Raises TemplateError when the template refuses them.
    """
    template = template_of(tokenizer, template_kwargs)
    found = turns.locate(template, repaired(template, messages), tools)
    weighed = [(start, end) for index, start, end in found.spans if weight(messages[index])]
    (example,) = tokenized_all(tokenizer, [found.text], [weighed])
    return Example(list(example.ids), example.mask.tolist(), tuple(found.damage))


def weight(message: dict[str, Any]) -> int:
    """1: the turn is trained on; 0: it is context."""
    return min(int(message.get(key, 1)) for key in WEIGHTS)


def repaired(template: Template, messages: Messages) -> Messages:
    """The messages as the template can print them, where that is certain: absent content becomes empty, text parts are
    joined, tool-call arguments take the form (object or JSON text) that the template prints as it should be, and ids of
    calls the length that it demands.
    """
    out = [_repaired(template, message) for message in messages]
    calls = any(message.get("tool_calls") or message.get("tool_call_id") for message in out)
    return with_short_ids(out) if calls and template.wants_short_ids else out


def _repaired(template: Template, message: dict[str, Any]) -> dict[str, Any]:
    out = {key: value for key, value in message.items() if value is not None and key not in WEIGHTS}
    for key in THINKING_KEYS:
        if isinstance(out.get(key), str) and not out[key].strip():
            del out[key]  # a blank thought is none; some templates print an empty one where the key is there
    content = out.get("content", "")
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        content = "".join(part["text"] for part in content)
    out["content"] = content
    if out.get("tool_calls"):
        out["tool_calls"] = [_repaired_call(template, call) for call in out["tool_calls"]]
    return out


def _repaired_call(template: Template, call: dict[str, Any]) -> dict[str, Any]:
    given = call.get("function", call).get("arguments")
    arguments = parsed_arguments(given)
    if not isinstance(arguments, dict):
        return call
    if template.arguments_form == "text":
        once = isinstance(given, str) and _decodes_to_object(given)
        return call if once else with_arguments(call, json.dumps(arguments, ensure_ascii=False))
    if template.arguments_form == "either" and isinstance(given, str) and _decodes_to_object(given):
        return call
    return call if arguments is given else with_arguments(call, arguments)


def _decodes_to_object(text: str) -> bool:
    """Whether JSON text holds an object, and not a text that was encoded once more."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


Span = tuple[int, int]


def tokenized_all(tokenizer: Any, texts: Sequence[str], spans: Sequence[list[Span] | None]) -> list[Example]:
    """Token ids of rendered texts, and mask 1 for each token that shares a character with one of its text's spans.

    Spans None: a plain text, of which every token is to be produced, with the tokens that the tokenizer puts around a
    text, and the end token after it; what the text has of these itself is not put there twice. (The first token of all
    cannot be predicted from anything, so it never enters a loss.)
    """
    rendered = [place for place, own in enumerate(spans) if own is not None]
    plain = [place for place, own in enumerate(spans) if own is None]
    out: dict[int, Example] = {}
    if rendered:
        chosen = [texts[place] for place in rendered]
        encoded = tokenizer(chosen, add_special_tokens=False, return_offsets_mapping=True)
        for place, ids, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            out[place] = Example(ids, _mask(offsets, spans[place] or []))
    if plain:
        chosen = [texts[place] for place in plain]
        start, end = _around(tokenizer)
        ends = tuple({tokenizer.eos_token or "", *template_of(tokenizer, {}).stops} - {""})
        encoded = tokenizer(chosen, add_special_tokens=False)["input_ids"]
        for place, text, ids in zip(plain, chosen, encoded, strict=True):
            before = [] if ids[: len(start)] == start else start
            after = [] if ends and text.rstrip().endswith(ends) else end
            whole = [*before, *ids, *after]
            out[place] = Example(whole, np.ones(len(whole), np.uint8))
    return [out[place] for place in range(len(texts))]


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that belong before and after a plain text: those that the tokenizer adds, and the end token."""
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    added = tokenizer("a")["input_ids"]
    place = next((at for at in range(len(added)) if added[at : at + len(alone)] == alone), 0)
    start, end = added[:place], added[place + len(alone) :]
    if tokenizer.eos_token_id is not None and end[-1:] != [tokenizer.eos_token_id]:
        end = [*end, tokenizer.eos_token_id]
    return start, end


def _mask(offsets: Sequence[Span], spans: list[Span]) -> np.ndarray:
    """[T] 1 where a token's characters [start, end) meet a span's; spans in order, none overlapping another."""
    if not spans or not offsets:
        return np.zeros(len(offsets), np.uint8)
    starts, ends = np.array(offsets, np.int64).T
    # Offsets may leave out a token's leading space; its text starts where the text of the tokens before ended.
    reached = np.maximum.accumulate(np.concatenate([[0], ends[:-1]]))
    starts = np.minimum(starts, reached)
    first, last = np.array(spans, np.int64).T
    candidate = np.searchsorted(last, starts, side="right")  # the first span that ends after the token begins
    meets = np.append(first, np.iinfo(np.int64).max)[candidate] < ends
    return (meets & (starts < ends)).astype(np.uint8)
