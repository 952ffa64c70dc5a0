"""Every trained turn stands behind the prompt that asks for it: all published templates, all kinds of conversations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import published
import pytest
from conversations import CONVERSATIONS, TOOL
from invariant import Options, violations

from mlxtune.data.examples import Renderer, Row
from mlxtune.data.records import Record
from mlxtune.sections import DataSection

Messages = list[dict[str, Any]]


def options_of(name: str, **kwargs: Any) -> Options:
    """What is known of a published template. GLM alone prints no token that ends its last turn."""
    stops = ("<|user|>", "<|observation|>") if name.startswith("glm") else ()
    return Options(published.ends_of(name), stops, kwargs)


def rendered(tokenizer: Any, messages: Messages, tools: Any, kwargs: dict[str, Any], **section: Any) -> list[Row]:
    chosen = DataSection(max_tokens=1 << 20, template_kwargs=kwargs, **section)
    return Renderer(tokenizer, chosen).rows([Record("file.jsonl", 1, "messages", messages, tools, None, {})])


def proved(name: str, conversation: str, kind: str, thinks: bool, **kwargs: Any) -> tuple[list[str], Counter[str]]:
    """(what is wrong with one conversation in one template, what was seen)."""
    tokenizer = published.tokenizer(name, kind, thinks)
    messages, with_tools = CONVERSATIONS[conversation]
    tools = [TOOL] if with_tools else None
    counts: Counter[str] = Counter()
    rows = rendered(tokenizer, messages, tools, kwargs)
    return violations(tokenizer, messages, tools, options_of(name, **kwargs), rows, counts), counts


@pytest.mark.parametrize("name", published.names())
def test_every_turn_of_every_published_template_is_trained_behind_the_prompt_that_asks_for_it(name: str) -> None:
    wrong = []
    for conversation in CONVERSATIONS:
        wrong += [f"{conversation}: {text}" for text in proved(name, conversation, "bpe", True)[0]]
    assert wrong == []
