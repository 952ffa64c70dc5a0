"""Every trained turn stands behind the prompt that asks for it: all published templates, all kinds of conversations."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import published
import pytest
from conversations import CONVERSATIONS, TOOL
from invariant import violations
from random_conversations import draw, options_of, rendered, tried


def proved(
    name: str, kind: str = "bpe", thinks: bool = True, kwargs: dict[str, Any] | None = None, **section: Any
) -> tuple[list[str], Counter[str]]:
    """(what is wrong with all conversations in one template, what was seen); section: of the options for data."""
    tokenizer, counts, wrong = published.tokenizer(name, kind, thinks), Counter[str](), []
    known = {"shared": section.get("expand_turns") != "all", "train_on": section.get("train_on", "all")}
    for conversation, (messages, with_tools) in CONVERSATIONS.items():
        tools = [TOOL] if with_tools else None
        rows = rendered(tokenizer, messages, tools, kwargs or {}, **section)
        found = violations(tokenizer, messages, tools, options_of(name, kwargs or {}, **known), rows, counts)
        wrong += [f"{conversation}: {text}" for text in found]
    return wrong, counts


NEEDLESS = "turns refused that the template asks for and prints"
# Templates that want lists of parts, not texts: nothing of any conversation is printed.
NO_TEXTS = ("idefics3", "llava_next", "smolvlm")
# Turns that no example trains, of 55: their rows are refused, or the template drops them. The others train all turns.
REFUSED = {
    **dict.fromkeys(("cohere", "cohere2", "gemma3"), 23),  # no tools, and roles must alternate
    "gemma": 25,  # nor a system message
    **dict.fromkeys(("llama3_1", "llama3_2"), 3),  # one call at a time
    **dict.fromkeys(("idefics3", "smolvlm"), 18),  # the rest is named as damaged: an empty answer is printed
    "llava_next": 55,
}
SWITCHED = [name for name in published.names() if "enable_thinking" in published.source(name)]
BLANKS = ["gemma", "llama3", "llama3_1", "phi3", "qwen2_5", "qwen3", "qwen3_6", "deepseek_r1_distill", "glm4moe"]


@pytest.mark.parametrize("name", published.names())
def test_every_turn_is_trained_once_behind_the_prompt_that_asks_for_it(name: str) -> None:
    """And whatever is not trained is refused by its name, with a reason in the template."""
    wrong, counts = proved(name)
    assert wrong == []
    assert counts[NEEDLESS] == 0
    assert counts["turns"] == 55
    assert counts["turns refused"] == REFUSED.get(name, 0)


@pytest.mark.parametrize("name", [name for name in published.names() if "</think>" in published.source(name)])
def test_so_it_is_where_thinking_tags_are_ordinary_text(name: str) -> None:
    wrong, counts = proved(name, thinks=False)
    assert (wrong, counts[NEEDLESS]) == ([], 0)


@pytest.mark.parametrize("thinking", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("name", SWITCHED)
def test_so_it_is_where_thinking_is_switched_on_or_off(name: str, thinking: bool) -> None:
    wrong, counts = proved(name, kwargs={"enable_thinking": thinking})
    assert (wrong, counts[NEEDLESS]) == ([], 0)


@pytest.mark.parametrize("name", BLANKS)
def test_so_it_is_with_a_tokenizer_that_puts_blanks_before_texts(name: str) -> None:
    wrong, counts = proved(name, kind="pieces")
    assert (wrong, counts[NEEDLESS]) == ([], 0)


@pytest.mark.parametrize("section", [{"expand_turns": "all"}, {"train_on": "last"}], ids=["all", "last"])
@pytest.mark.parametrize("name", ["llama3_1", "qwen3", "qwen3_6", "gemma4_v5", "gptoss", "glm4moe", "muse_glimmer"])
def test_so_it_is_where_no_turns_share_an_example_or_the_last_is_trained_alone(name: str, section: Any) -> None:
    wrong, counts = proved(name, **section)
    assert (wrong, counts[NEEDLESS]) == ([], 0)


def test_so_it_is_for_a_thousand_random_conversations() -> None:
    names = [name for name in published.names() if name not in NO_TEXTS]
    rnd, counts = random.Random(0), Counter[str]()
    wrong = [(case.name, text) for case in (draw(rnd, names) for _ in range(1000)) for text in tried(case, counts)]
    assert wrong == []
    assert counts["turns trained"] > 2 * counts["turns"] // 3
    assert counts[NEEDLESS] <= 10  # of some 3,000: a turn joined to one of no weight, calls that no mark fits
