"""Answers from a model, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from textwrap import shorten
from typing import Any

import numpy as np

from mlxtune.data.template.answers import Plain, Reader
from mlxtune.data.template.template import Messages, Template, TemplateError
from mlxtune.errors import UserError
from mlxtune.evaluate.engines.decode import PREFILL, Counted, decode, own_caches
from mlxtune.evaluate.engines.sampling import Chooser, Sampling, row_key
from mlxtune.model.corrections.extent import longest_alike
from mlxtune.model.load import Loaded

MARK = 0xE000  # the first private-use character: no message contains one
CALL_MARK = "called_7c1f"  # a function that nobody has
CUT = "\ufffd"  # what bytes that are no whole character yet are decoded to


class Refused(UserError):
    """The chat template refuses a conversation, or leaves a text out of it."""

    def __init__(self, message: str, system: bool) -> None:
        """system: it does so for a system prompt."""
        super().__init__(message)
        self.system = system


def template_for(loaded: Loaded, template_kwargs: dict[str, Any], day: str = "") -> Template | None:
    """The model's chat template with the variables, and the day (ISO; "": today), that a run trained with; None when it
    has none.
    """
    if loaded.tokenizer.chat_template is None:
        return None
    its_day = date.fromisoformat(day) if day else None
    return loaded.templates.of(template_kwargs, its_day)


def prompt_ids(
    loaded: Loaded, messages: Messages, template_kwargs: dict[str, Any], day: str = "", tools: Any = None
) -> list[int]:
    """A conversation as the model sees it before it answers; plain text when it has no chat template.

    Raises Refused when the template does, and UserError for a token that the model does not know, or when there is none
    at all: nothing can be answered to nothing.
    """
    template = template_for(loaded, template_kwargs, day)
    if template is None:
        text = "\n\n".join(str(message.get("content") or "") for message in messages)
        ids = list(loaded.tokenizer(text)["input_ids"])
    else:
        text = prompt_text(template, messages, tools)
        ids = list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        whose = "the prompt has no text" if template is None else "the chat template makes nothing of this conversation"
        raise UserError(f"there is nothing to answer: {whose}")
    loaded.check_ids([ids])
    return ids


def prompt_text(template: Template, messages: Messages, tools: Any = None) -> str:
    """The same as text. Raises Refused."""
    try:
        text = template.text(messages, tools, prompt=True)
    except TemplateError as error:
        raise _refusal(template, messages, error) from error
    lost = _lost_roles(template, messages)
    if lost:
        system = lost == {"system"}
        what = "a system prompt" if system else f"the text of a message of the {min(lost - {'system'})}"
        raise Refused(f"the chat template leaves out {what}", system)
    return text


def unprinted(loaded: Loaded, messages: Messages, template_kwargs: dict[str, Any], day: str, tools: Any) -> list[str]:
    """What of a conversation's tools the model does not see, for a sentence: the tools, and earlier calls of them."""
    template = template_for(loaded, template_kwargs, day)
    called = any(message.get("tool_calls") for message in messages)
    if template is None:
        return [*(["the tools"] if tools else []), *(["earlier tool calls"] if called else [])]
    found = []
    if tools and template.attempt(messages, tools, prompt=True) == template.attempt(messages, prompt=True):
        found.append("the tools")
    if called:
        shown = template.attempt([_marked(message) for message in messages], tools, prompt=True)
        if shown and CALL_MARK not in shown:
            found.append("earlier tool calls")
    return found


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """The same with another name in each tool call, so that it can be looked for in what is printed."""
    if not message.get("tool_calls"):
        return message
    calls = [{**call, "function": {**call["function"], "name": CALL_MARK}} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def _refusal(template: Template, messages: Messages, error: TemplateError) -> Refused:
    """Why the template cannot print a conversation: for its system prompt, when it prints the rest."""
    others = [message for message in messages if message["role"] != "system"]
    system = len(others) < len(messages) and bool(template.attempt(others, prompt=True))
    what = "a system prompt" if system else "this conversation"
    reason = shorten(str(error.__cause__ or error), 200, placeholder=" ...")
    return Refused(f"the chat template refuses {what}: {reason}", system)


def _lost_roles(template: Template, messages: Messages) -> set[str]:
    """Whose text the template leaves out of a conversation, the assistant's aside: thoughts may go. Each text is
    replaced by a character of its own, and looked for in what is printed.
    """
    marked = []
    for index, message in enumerate(messages):
        marked.append({**message, "content": chr(MARK + index)})
    shown = template.attempt(marked, prompt=True)
    if not shown:  # it cannot print such texts: nothing can be said
        return set()
    lost = {message["role"] for message in marked if message["content"] not in shown}
    return lost - {"assistant"}


def stream(loaded: Loaded, ids: list[int], sampling: Sampling) -> Iterator[str]:
    """Pieces of the answer as they come, special tokens included; the last one is the end token, unless the answer is
    cut after `max_tokens`.
    """
    made: list[int] = []
    # The text of made[:given] was given. Some tokenizers drop a space at the start of what they decode, so the piece
    # before is decoded too: it begins at `start`. Both are at the border of a character.
    start = given = 0
    for token in tokens(loaded, ids, sampling):
        made.append(token)
        text = decoded(loaded, made[start:])
        if text.endswith(CUT):
            continue
        before = decoded(loaded, made[start:given])
        yield text[len(before) :]
        start, given = given, len(made)
    if given < len(made):
        before = decoded(loaded, made[start:given])
        yield decoded(loaded, made[start:])[len(before) :]


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
            if token.strip() in known:
                ends.add(known[token.strip()])
    return ends


def tokens(loaded: Loaded, ids: list[int], sampling: Sampling) -> Iterator[int]:
    """The answer's token ids, the one that ends it included."""
    yield from one_by_one(Counted(loaded.model), ids, row_key(sampling.seed), sampling, end_ids(loaded))


def one_by_one(model: Counted, ids: list[int], key: np.ndarray, sampling: Sampling, ends: set[int]) -> Iterator[int]:
    """The same, the plain way: this row alone, through the caches that the model makes for itself.

    key: [2], as `row_key` makes it.
    """
    limit = longest_alike(model.model)
    in_parts = limit is None or len(ids) <= limit  # else the first part would be rotated as a short row
    at_once = PREFILL if in_parts else len(ids)
    chooser = Chooser(sampling, [key], [ids])
    for ((_, token),) in decode(model, [ids], chooser, ends, sampling.max_tokens, own_caches(model), at_once=at_once):
        yield token


def decoded(loaded: Loaded, ids: list[int]) -> str:
    """The text of some tokens, special ones included."""
    text: str = loaded.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def reader_for(
    loaded: Loaded, messages: Messages, template_kwargs: dict[str, Any], day: str = "", tools: Any = None
) -> Reader | Plain:
    """What tells thought and answer apart in the model's answer to a conversation, whose prompt was made before."""
    ends = frozenset(decoded(loaded, [index]) for index in end_ids(loaded)) - {""}  # ids without a token
    template = template_for(loaded, template_kwargs, day)
    if template is None:
        return Plain(ends)
    return Reader(template, messages, tools, ends)


def answer(
    loaded: Loaded, messages: Messages, sampling: Sampling, template_kwargs: dict[str, Any], day: str = ""
) -> str:
    """The whole answer, its thought and special tokens included, without its end token."""
    made = list(tokens(loaded, prompt_ids(loaded, messages, template_kwargs, day), sampling))
    if made[-1] in end_ids(loaded):
        made.pop()
    return decoded(loaded, made)
