"""A benchmark's texts as token ids, as lm_eval's own models make them."""

from __future__ import annotations

from typing import Any

from mlxtune.evaluate.benchmarks.parts import Pair


def prefix_token(tokenizer: Any) -> int:
    """What stands before a text that has no context."""
    begin: int | None = tokenizer.bos_token_id
    return tokenizer.eos_token_id if begin is None else begin


def encoded(tokenizer: Any, text: str, special: bool | None = None) -> list[int]:
    """special: with the tokens that the tokenizer puts around a text; None: with them, but for a text that begins with
    the first of them already, which would else stand there twice.
    """
    if special is None and text.startswith(tokenizer.decode([prefix_token(tokenizer)])):
        special = False
    if special is None:
        special = True
    ids: list[int] = tokenizer.encode(text, add_special_tokens=special)
    return ids


def pair(tokenizer: Any, context: str, text: str, longest: int | None) -> Pair:
    """A text behind its context.

    Both are encoded as one, and cut where the context alone ends; spaces at its end belong to the text. longest: tokens
    that the model takes; of a longer context the beginning is left out. None: any number.
    """
    if context == "":
        ids = encoded(tokenizer, text, special=False)
        before = prefix_token(tokenizer)
        if ids[:1] == [before] and len(ids) > 1:
            ids = ids[1:]
        return cut([before], ids, longest)
    spaces = len(context) - len(context.rstrip())
    if spaces:
        text = context[-spaces:] + text
        context = context[:-spaces]
    whole = encoded(tokenizer, context + text)
    at = len(encoded(tokenizer, context))
    at = max(1, min(at, len(whole) - 1))  # a token that spans the join would leave one of both empty
    return cut(whole[:at], whole[at:], longest)


def cut(context: list[int], text: list[int], longest: int | None) -> Pair:
    """A pair whose inputs have `longest` tokens at most: the beginning of the context goes.

    A text that is longer by itself keeps one token before it: rolling texts are cut into windows beforehand.
    """
    room = len(context) if longest is None else max(1, longest + 1 - len(text))
    return Pair(tuple(context[-room:]), tuple(text))
