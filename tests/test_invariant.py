"""The oracle itself: it accepts examples made as the rule says, and finds each fault planted in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import published
import pytest
from conversations import CONVERSATIONS, TOOL
from invariant import violations
from random_conversations import options_of

Messages = list[dict[str, Any]]


@dataclass
class Made:
    """An example, and a row that holds one, as the oracle looks at them."""

    ids: list[int]
    mask: list[int]


@dataclass
class Row:
    example: Made | None
    dropped: str = ""
    damage: tuple[Any, ...] = ()
    kinds: tuple[tuple[str, int], ...] = field(default=())


def put_together(tokenizer: Any, parts: list[str]) -> Made:
    """Prompt, targets and what follows, each tokenized alone."""
    made = Made([], [])
    for number, part in enumerate(parts):
        ids = tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
        made.ids += ids
        made.mask += [number % 2] * len(ids)
    return made


def by_the_rule(name: str, messages: Messages, tools: Any) -> list[Row]:
    """One example for each turn: the prompt that asks for it, and the rest of the text that has it last."""
    tokenizer, out = published.tokenizer(name), []
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = tokenizer.apply_chat_template(messages[:at], tools, tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(messages[: at + 1], tools, tokenize=False)
            assert whole.startswith(asked)
            end = max(whole.rfind(token) + len(token) for token in published.ends_of(name) if token in whole)
            parts = [asked, whole[len(asked) : end], whole[end:]]
            out.append(Row(put_together(tokenizer, parts)))
    return out


CASES = [("qwen3", "several turns"), ("qwen3_6", "thinking everywhere"), ("llama3_1", "tools, one round")]
CASES += [("qwen3", "thinking with tools"), ("gemma4_v4", "text beside a call"), ("phi3", "newlines and digits first")]


def proved(name: str, conversation: str, fault: Callable[[list[Row]], Any] = lambda rows: None) -> str:
    messages, with_tools = CONVERSATIONS[conversation]
    tools = [TOOL] if with_tools else None
    rows = by_the_rule(name, messages, tools)
    fault(rows)
    known = options_of(name, {}, shared=False)
    return "\n".join(violations(published.tokenizer(name), messages, tools, known, rows))


@pytest.mark.parametrize(("name", "conversation"), CASES)
def test_examples_made_by_the_rule_are_accepted(name: str, conversation: str) -> None:
    assert proved(name, conversation) == ""


def masked(row: Row, change: Callable[[list[int], int, int], Any]) -> None:
    """Change the mask at its first target (inclusive) and its last one's end (exclusive)."""
    assert row.example is not None
    mask = row.example.mask
    change(mask, mask.index(1), len(mask) - mask[::-1].index(1))


def earlier(mask: list[int], start: int, end: int) -> None:
    mask[start - 1] = 1


def later(mask: list[int], start: int, end: int) -> None:
    mask[start] = 0


def endless(mask: list[int], start: int, end: int) -> None:
    mask[end - 1] = 0


def behind(mask: list[int], start: int, end: int) -> None:
    mask[end] = 1


def context(mask: list[int], start: int, end: int) -> None:
    mask[2] = mask[3] = 1


def hole(mask: list[int], start: int, end: int) -> None:
    mask[start + 2] = 0


@pytest.mark.parametrize("change", [earlier, later, endless, behind, context, hole])
@pytest.mark.parametrize(("name", "conversation"), [("qwen3", "several turns"), ("gemma4_v4", "thinking everywhere")])
def test_a_mask_that_is_wrong_by_one_token_is_found(
    name: str, conversation: str, change: Callable[[list[int], int, int], Any]
) -> None:
    assert proved(name, conversation, lambda rows: masked(rows[1], change)) != ""


def test_a_turn_left_out_is_found() -> None:
    assert "turn 3 has no targets" in proved("qwen3", "several turns", lambda rows: rows.pop(1))


def test_a_turn_trained_twice_is_found() -> None:
    assert "turn 3 is trained 2 times" in proved("qwen3", "several turns", lambda rows: rows.append(rows[1]))


def test_a_turn_behind_another_prompt_is_found() -> None:
    def shorter(rows: list[Row]) -> None:
        assert rows[1].example is not None
        del rows[1].example.ids[0], rows[1].example.mask[0]

    assert "asked by nothing" in proved("qwen3", "several turns", shorter)


def test_targets_of_other_tokens_that_say_more_are_found() -> None:
    def twice(rows: list[Row]) -> None:
        made = rows[0].example
        assert made is not None
        start = made.mask.index(1)
        made.ids.insert(start, made.ids[start])
        made.mask.insert(start, 1)

    assert "has the targets" in proved("qwen3", "several turns", twice)


R1 = ("<｜begin▁of▁sentence｜><｜User｜>USR0<｜Assistant｜><think>\n", "<｜end▁of▁sentence｜>")
NEMOTRON = (
    "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nUSR0<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "<|im_end|>",
)


@pytest.mark.parametrize(
    ("name", "thought", "text", "wrong"),
    [
        ("deepseek_r1_distill", "", "\n</think>\n\nANS1", ""),
        ("deepseek_r1_distill", "THK1", "THK1\n</think>\n\nANS1", ""),
        ("deepseek_r1_distill", "THK1", "\n</think>\n\nANS1", "does not train THK1"),
        ("deepseek_r1_distill", "", "ANS1", "never closes the thought"),
        ("deepseek_r1_distill", "THK1", "ANS1\n</think>\n\nTHK1", "thought behind its text"),
        ("deepseek_r1_distill", "", "\n</think>\n\n<｜Assistant｜>ANS1", "trains a header"),
        ("nemotron_3_nano", "", "</think>ANS1", ""),
        ("nemotron_3_nano", "", "</think>ANS1</think>", "ends with"),
        ("nemotron_3_nano", "", "x</think>ANS1", "has the thought"),
    ],
)
def test_a_turn_that_the_template_prints_otherwise_is_judged_by_what_it_says(
    name: str, thought: str, text: str, wrong: str
) -> None:
    prompt, end = R1 if name.startswith("deepseek") else NEMOTRON
    messages = [{"role": "user", "content": "USR0"}, {"role": "assistant", "content": "ANS1"}]
    if thought:
        messages[1]["reasoning_content"] = thought
    tokenizer = published.tokenizer(name)
    rows = [Row(put_together(tokenizer, [prompt, text + end]))]
    found = "\n".join(violations(tokenizer, messages, None, options_of(name, {}), rows))
    assert wrong in found
    assert bool(wrong) == bool(found)


def test_a_refusal_is_counted_and_not_wrong() -> None:
    def refused(rows: list[Row]) -> None:
        rows[:] = [Row(None, "the chat template refuses this conversation")]

    assert proved("qwen3", "several turns", refused) == ""
