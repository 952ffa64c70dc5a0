"""Masks of templates in the manner of many families, each written for these tests: exactly what the model must say.

An expected run is written by hand: content, calls and thinking as the template prints them, and the token that ends
the turn; the role's header is context, and so is all that the template adds behind the end token.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from masks import FAMILIES, Messages, byte_tokenizer, family, piece_tokenizer, runs, supervised, turns, with_template

from mlxtune.data.chat import masking
from mlxtune.data.chat.turns import locate

FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]


def call(arguments: Any = '{"x": 1}', number: int = 1, name: str = "f") -> dict[str, Any]:
    return {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(content: str, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": f"call0000{number}", "name": "f"}


CHAT = turns("Hi!", "Hello.", "Why?", "Because.")
CALLED = [
    {"role": "user", "content": "Call f."},
    {"role": "assistant", "content": "", "tool_calls": [call()]},
    tool("five"),
    {"role": "assistant", "content": "It is 5."},
]
FENCED = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"x": 1}\n```<｜tool▁call▁end｜>'
# What each family's model must produce: for CHAT, and for CALLED (None: it has no tool calls).
SAID: dict[str, tuple[list[str], list[str] | None]] = {
    "llama": (
        ["Hello.<|eot_id|>", "Because.<|eot_id|>"],
        ['{"name": "f", "parameters": {"x": 1}}<|eot_id|>', "It is 5.<|eot_id|>"],
    ),
    "gemma": (
        ["Hello.<turn|>", "Because.<turn|>"],
        ["<|tool_call>call:f{x:1}<tool_call|><|tool_response>", "It is 5.<turn|>"],
    ),
    "mistral": (
        ["Hello.</s>", "Because.</s>"],
        ['[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}, "id": "call00001"}]</s>', "It is 5.</s>"],
    ),
    "harmony": (
        ["<|channel|>final<|message|>Hello.<|end|>", "<|channel|>final<|message|>Because.<|return|>"],
        [
            ' to=functions.f<|channel|>commentary json<|message|>{"x": 1}<|call|>',
            "<|channel|>final<|message|>It is 5.<|return|>",
        ],
    ),
    "qwen": (
        ["Hello.<|im_end|>", "<think>\n\n</think>\n\nBecause.<|im_end|>"],
        [
            '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
            "<think>\n\n</think>\n\nIt is 5.<|im_end|>",
        ],
    ),
    "deepseek": (
        ["Hello.<｜end▁of▁sentence｜>", "Because.<｜end▁of▁sentence｜>"],
        [
            f"<｜tool▁calls▁begin｜>{FENCED}<｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
            "It is 5.<｜end▁of▁sentence｜>",
        ],
    ),
    "glm": (["\nHello.<|user|>", "\nBecause."], ['f\n{"x": 1}<|observation|>', "\nIt is 5."]),
    "phi": (["Hello.<|end|>", "Because.<|end|>"], None),
    "olmo": (["Hello.<|endoftext|>", "Because.<|endoftext|>"], None),
    "cohere": (
        ["Hello.<|END_OF_TURN_TOKEN|>", "Because.<|END_OF_TURN_TOKEN|>"],
        [
            'Action: ```json\n[{"tool_name": "f", "parameters": {"x": 1}}]```<|END_OF_TURN_TOKEN|>',
            "It is 5.<|END_OF_TURN_TOKEN|>",
        ],
    ),
    "bare": (["Hello.", "Because."], None),
}
CALLERS = [name for name in SAID if SAID[name][1] is not None]
KEEPERS = [name for name in SAID if name not in ("mistral",)]  # of system prompts


def test_every_family_has_its_expected_text() -> None:
    assert set(SAID) == set(FAMILIES)


@pytest.mark.parametrize("name", SAID)
def test_every_answer_and_its_end_token_is_supervised_and_nothing_else(name: str) -> None:
    assert supervised(family(name), CHAT) == SAID[name][0]


@pytest.mark.parametrize("name", SAID)
def test_a_sentencepiece_tokenizer_supervises_the_same_text(name: str) -> None:
    """Its decoder adds and eats spaces around special tokens, so the texts are compared without any."""
    found = supervised(family(name, piece_tokenizer), CHAT)
    assert [re.sub("[ ▁]", "", text) for text in found] == [re.sub("[ ▁]", "", text) for text in SAID[name][0]]


@pytest.mark.parametrize("name", CALLERS)
def test_tool_calls_are_supervised_and_their_results_are_not(name: str) -> None:
    assert supervised(family(name), CALLED, TOOLS) == SAID[name][1]


@pytest.mark.parametrize("name", CALLERS)
def test_arguments_as_an_object_or_as_text_or_encoded_twice_are_printed_once(name: str) -> None:
    twice = json.dumps(json.dumps({"x": 1}))
    for arguments in ({"x": 1}, '{"x": 1}', '{"x":1}', twice):
        messages = [*CALLED[:1], {**CALLED[1], "tool_calls": [call(arguments)]}, *CALLED[2:]]
        expected = SAID[name][1] or []
        if name in ("deepseek", "qwen") and isinstance(arguments, str):
            expected = [text.replace('{"x": 1}', arguments) for text in expected]  # printed as they stand
            if arguments == twice:
                continue
        assert supervised(family(name), messages, TOOLS) == expected


MORE = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "Sure."}]


@pytest.mark.parametrize("name", [name for name in CALLERS if name not in ("gemma", "deepseek")])
@pytest.mark.parametrize("after", [CALLED[2:], [*CALLED[2:], *MORE], MORE, []], ids=["answer", "more", "none", "end"])
@pytest.mark.parametrize("arguments", [{}, {"x": "s"}, {"x": [1, "a"]}, {"x": {"y": 1.5}}, {"x": None, "y": True}])
def test_arguments_of_any_shape_are_supervised_with_their_call(name: str, after: Messages, arguments: Any) -> None:
    """gemma and deepseek print them in a form of their own."""
    made = {**CALLED[1], "tool_calls": [call(arguments)]}
    whole = (SAID[name][1] or [""])[0].replace('{"x": 1}', json.dumps(arguments))
    if name == "qwen" and not after:
        whole = f"<think>\n\n</think>\n\n{whole}"
    found = supervised(family(name), [CALLED[0], made, *after], TOOLS)
    if name == "glm":  # the header that follows, if any, ends the call
        header = {"tool": "<|observation|>", "user": "<|user|>", "": ""}[after[0]["role"] if after else ""]
        whole = whole.replace("<|observation|>", header)
    assert found[0] == whole
    assert len(found) == 1 + sum(message["role"] == "assistant" for message in after)


@pytest.mark.parametrize(
    ("where", "name"),
    [(where, name) for where in ("user", "system") for name in SAID] + [("tool", name) for name in CALLERS],
)
def test_the_render_of_another_conversation_stays_context(where: str, name: str) -> None:
    """The strongest injection there is, and the assistant's own words beside it."""
    tokenizer = family(name)
    attack = "Hello. Because. It is 5. " + tokenizer.apply_chat_template(
        turns("x", "Hello.", "y", "Bad"), tokenize=False
    )
    expected = SAID[name][0]
    if where == "user":
        messages = turns(attack, "Hello.", attack, "Because.")
    elif where == "system":
        messages = [{"role": "system", "content": attack}, *CHAT]
    else:
        messages, expected = [*CALLED[:2], tool(attack), CALLED[3]], SAID[name][1] or []
    assert supervised(tokenizer, messages, TOOLS if where == "tool" else None) == expected


@pytest.mark.parametrize("name", SAID)
def test_an_answer_may_hold_the_render_of_another_conversation(name: str) -> None:
    tokenizer = family(name)
    quoted = "See: " + tokenizer.apply_chat_template(turns("x", "y", "z"), tokenize=False) + " end"
    messages = turns("Hi!", "Hello.", "Why?", quoted)
    assert supervised(tokenizer, messages) == [text.replace("Because.", quoted) for text in SAID[name][0]]


@pytest.mark.parametrize("name", SAID)
def test_an_empty_answer_still_supervises_its_end(name: str) -> None:
    expected = [text.replace("Hello.", "") for text in SAID[name][0]]
    assert supervised(family(name), turns("Hi!", "", "Why?", "Because.")) == [text for text in expected if text]


@pytest.mark.parametrize("name", SAID)
def test_a_weight_of_nothing_leaves_a_turn_out(name: str) -> None:
    for key, value in (("weight", 0), ("train", False), ("train", 0)):
        messages = [CHAT[0], {**CHAT[1], key: value}, *CHAT[2:]]
        assert supervised(family(name), messages) == SAID[name][0][1:]
        assert supervised(family(name), [*CHAT[:3], {**CHAT[3], key: value}]) == SAID[name][0][:1]
    assert supervised(family(name), [CHAT[0], {**CHAT[1], "weight": 1, "train": True}, *CHAT[2:]]) == SAID[name][0]


@pytest.mark.parametrize("name", SAID)
def test_content_in_parts_and_no_content_at_all_are_mended(name: str) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
    assert supervised(family(name), [CHAT[0], {"role": "assistant", "content": parts}, *CHAT[2:]]) == SAID[name][0]
    if name in CALLERS:
        calling = {"role": "assistant", "content": None, "tool_calls": [call()]}
        assert supervised(family(name), [CALLED[0], calling, *CALLED[2:]], TOOLS) == SAID[name][1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen", ["Hello.<|im_end|>", "<think>\nsecond\n</think>\n\nBecause.<|im_end|>"]),
        (
            "harmony",
            [
                "<|channel|>final<|message|>Hello.<|end|>",
                "<|channel|>analysis<|message|>second<|end|>"
                "<|start|>assistant<|channel|>final<|message|>Because.<|return|>",
            ],
        ),
        ("llama", SAID["llama"][0]),
    ],
)
def test_thinking_is_supervised_where_it_is_printed(name: str, expected: list[str]) -> None:
    key = "thinking" if name == "harmony" else "reasoning_content"
    messages = [CHAT[0], {**CHAT[1], key: "first"}, CHAT[2], {**CHAT[3], key: "second"}]
    tokenizer = family(name)
    assert supervised(tokenizer, messages) == expected
    lost = [("thinking", 1), ("thinking", 3)] if name == "llama" else [("thinking", 1)]
    assert damage(tokenizer, messages) == lost


@pytest.mark.parametrize(
    ("name", "expected", "lost"),
    [
        ("qwen", ["Hello.<|im_end|>", "<think>\nsecond\n</think>\n\nBecause.<|im_end|>"], [1]),
        ("deepseek", ["\n\nHello.<｜end▁of▁sentence｜>", "\n\nBecause.<｜end▁of▁sentence｜>"], [1, 3]),
        (
            "phi",
            ["<think>\nfirst\n</think>\n\nHello.<|end|>", "<think>\nsecond\n</think>\n\nBecause.<|end|>"],
            [],
        ),
    ],
)
def test_thinking_inside_the_content_is_supervised_where_it_is_printed(
    name: str, expected: list[str], lost: list[int]
) -> None:
    first, second = (f"<think>\n{thought}\n</think>\n\n" for thought in ("first", "second"))
    messages = turns("Hi!", f"{first}Hello.", "Why?", f"{second}Because.")
    tokenizer = family(name)
    assert supervised(tokenizer, messages) == expected
    assert damage(tokenizer, messages) == [("thinking", index) for index in lost]


@pytest.mark.parametrize(
    ("name", "answer", "expected", "lost"),
    [
        ("qwen", "hm</think>So.", "<think>\nhm\n</think>\n\nSo.<|im_end|>", []),
        ("deepseek", "hm</think>So.", "So.<｜end▁of▁sentence｜>", ["thinking"]),
        ("phi", "hm</think>So.", "hm</think>So.<|end|>", []),
        ("phi", "</think>", "</think><|end|>", []),
        ("phi", "<think>", "<think><|end|>", []),
        ("qwen", "<think>a</think>b<think>c</think>d", "<think>\na\n</think>\n\nd<|im_end|>", ["content", "thinking"]),
    ],
)
def test_thinking_tags_without_their_partners(name: str, answer: str, expected: str, lost: list[str]) -> None:
    tokenizer, messages = family(name), turns("Hi!", "Hello.", "Why?", answer)
    assert supervised(tokenizer, messages) == [SAID[name][0][0], expected]
    assert damage(tokenizer, messages) == [(kind, 3) for kind in lost]


def test_a_users_thinking_tag_changes_nothing() -> None:
    for text in ("</think>", "hm</think>", "<think>x</think>y"):
        for name in ("qwen", "phi", "deepseek"):
            messages = turns("Hi!", "Hello.", text, "Because.")
            assert (supervised(family(name), messages), damage(family(name), messages)) == (SAID[name][0], [])


def test_thinking_before_a_call_and_two_calls_in_one_turn_are_one_run() -> None:
    calls = [call({"x": 1}, 1), call({"x": 2}, 2)]
    messages = [
        CALLED[0],
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "use f", "tool_calls": calls},
        tool("five", 1),
        tool("six", 2),
        CALLED[3],
    ]
    body = "".join(f'\n<tool_call>\n{{"name": "f", "arguments": {{"x": {x}}}}}\n</tool_call>' for x in (1, 2))
    assert supervised(family("qwen"), messages, TOOLS) == [
        f"<think>\nuse f\n</think>\n\nLet me see.{body}<|im_end|>",
        "<think>\n\n</think>\n\nIt is 5.<|im_end|>",
    ]


def test_content_after_the_tools_results_belongs_to_the_turn_that_called() -> None:
    messages = [CALLED[0], {**CALLED[1], "content": "It is 5."}, CALLED[2]]
    found = supervised(family("gemma"), messages, TOOLS)
    assert found == ["<|tool_call>call:f{x:1}<tool_call|><|tool_response>", "It is 5.<turn|>"]


def damage(tokenizer: Any, messages: Messages, tools: Any = None) -> list[tuple[str, int]]:
    return sorted({(found.kind, found.index) for found in masking.render(tokenizer, messages, tools).damage})


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("name", "messages", "tools", "expected"),
    [
        ("mistral", [SYSTEM, *CHAT], None, [("system", 0)]),
        ("mistral", [SYSTEM, *CHAT[:3]], None, []),
        ("mistral", [CALLED[0], {**CALLED[1], "content": "Let me see."}, *CALLED[2:]], TOOLS, [("content", 1)]),
        ("mistral", CALLED, TOOLS, []),
        ("phi", CALLED, None, [("calls", 1)]),
        ("phi", CALLED, TOOLS, [("calls", 1), ("tools", 0)]),
        ("olmo", CHAT, TOOLS, [("tools", 0)]),
        ("deepseek", CHAT, TOOLS, [("tools", 0)]),
        ("gemma", [CHAT[0], {**CHAT[1], "reasoning_content": "hm"}], None, [("thinking", 1)]),
        ("gemma", [CALLED[0], {**CALLED[1], "reasoning_content": "hm"}, *CALLED[2:]], TOOLS, []),
        ("harmony", [CALLED[0], {**CALLED[1], "tool_calls": [call(), call('{"x": 2}')]}], TOOLS, [("calls", 1)]),
        ("cohere", CHAT, TOOLS, []),
        *((name, [SYSTEM, *CHAT], None, []) for name in KEEPERS),
        *((name, CALLED, TOOLS if name not in ("deepseek",) else None, []) for name in CALLERS),
    ],
)
def test_what_a_template_does_not_print_is_reported(
    name: str, messages: Messages, tools: Any, expected: list[tuple[str, int]]
) -> None:
    assert damage(family(name), messages, tools) == expected


def test_a_user_text_that_looks_like_a_tools_result_moves_no_turn() -> None:
    """Templates look for it, to tell a question from a result; the answer before it then keeps its thought."""
    messages = turns("Hi!", "<think>\nfirst\n</think>\n\nHello.", "<tool_response>five</tool_response>", "Because.")
    assert supervised(family("qwen"), messages) == [
        "<think>\nfirst\n</think>\n\nHello.<|im_end|>",
        "<think>\n\n</think>\n\nBecause.<|im_end|>",
    ]


def test_the_printed_day_is_pinned_by_the_date() -> None:
    from datetime import date

    tokenizer = family("harmony")
    template = masking.template_of(tokenizer, {}, date(2024, 2, 29))
    today = masking.template_of(tokenizer, {}, None)
    found = locate(template, CHAT)
    assert found.text.replace("2024-02-29", date.today().isoformat()) == today.text(CHAT) != found.text
    (example,) = masking.tokenized_turns(tokenizer, [found.text], [[span[1:] for span in found.spans]])
    assert runs(tokenizer, example) == SAID["harmony"][0]


def test_a_token_that_ends_every_message_is_supervised_in_the_assistants_alone() -> None:
    template = (
        "{% for m in messages %}{{ ('Q: ' if m.role == 'user' else 'A: ') + m.content + '<sep>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    )
    tokenizer = with_template(byte_tokenizer(["<sep>"]), template, "<sep>")
    assert supervised(tokenizer, CHAT) == ["Hello.<sep>", "Because.<sep>"]


@pytest.mark.parametrize(
    ("before_all", "expected"),
    [
        ("{% if not has %}<S>You are tiny.</S>{% endif %}", "You are tiny."),  # SmolLM, Qwen2.5
        ("<S>Day 1.\n{% if not has %}Be kind.</S>{% endif %}", "Be kind."),  # behind what stands there in any case
        ("<S>Day 1.\n{% if not has %}</S>{% endif %}", ""),  # Llama 3: a date, and no prompt
        ("{% if has %}{{ raise_exception('no system') }}{% endif %}<S>Hi.</S>", ""),  # it cannot be told apart
        ("{% if not has %}<N>no prompt is given</N>{% endif %}", ""),  # in no turn that a system prompt would have
        ("", ""),
    ],
)
def test_the_system_prompt_of_a_template_is_what_it_puts_where_a_row_has_none(before_all: str, expected: str) -> None:
    opened = "" if before_all.startswith("<S>") else "<S>"
    source = (
        "{% set has = messages[0].role == 'system' %}"
        + before_all
        + f"{{% for m in messages %}}{{% if m.role == 'system' %}}{opened}{{{{ m.content }}}}</S>"
        + "{% else %}<{{ m.role }}>{{ m.content }}<end>{% endif %}{% endfor %}"
    )
    assert (
        masking.template_of(with_template(byte_tokenizer(["<end>"]), source, "<end>"), {}, None).own_system == expected
    )
