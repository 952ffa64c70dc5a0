"""What is trained in small templates of our own writing, each in the manner of a family: exact prompts and targets.

An example is written by hand as its list of (text before the targets, targets).
"""

from __future__ import annotations

from typing import Any

import published
import pytest
from conversations import answer, call, result, user
from random_conversations import rendered
from targets import runs_of

Pairs = list[tuple[str, str]]


def trained(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None, **section: Any) -> list[Pairs]:
    """The examples, shortest first. The ids before targets are the tokenizer's own of the text before them."""
    out = []
    kwargs = section.pop("kwargs", {})
    for row in rendered(tokenizer, messages, tools, kwargs, **section):
        assert not row.dropped, row.dropped
        pairs = []
        for run in runs_of(row):
            prompt, target = tokenizer.decode(run.ids[: run.start]), tokenizer.decode(run.ids[run.start : run.end])
            if tokenizer.backend_tokenizer.normalizer is None:  # a text's ids decode to that text
                assert run.ids[: run.start] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
            pairs.append((prompt, target))
        out.append(pairs)
    return sorted(out, key=lambda pairs: len(pairs[-1][0]))


def chatml(header: str, prompt: str, thinks: bool = True) -> Any:
    """ChatML of which the answers are printed by `header`, a Jinja expression, and asked for with `prompt`."""
    text = (
        "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
        "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
        "{%- set thought = m.reasoning_content or '' %}{%- set recent = loop.index0 > ns.last %}"
        f"{{%- if m.role == 'assistant' %}}{{{{- {header} }}}}{{%- endif %}}"
        "{{- m.content }}{%- for c in m.tool_calls or [] %}{{- '<tool_call>' + c.function.name + '</tool_call>' }}"
        "{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\\n' + {prompt} }}}}{{%- endif %}}"
    )
    special = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
    return published.made(text, special, "<|im_end|>", thinks=thinks)


QWEN3 = "('<think>\\n' + thought + '\\n</think>\\n\\n') if recent and (loop.last or thought) else ''"
QWEN35 = "('<think>\\n' + thought + '\\n</think>\\n\\n') if recent else ''"
ALWAYS = "'<think>\\n' + thought + '\\n</think>\\n\\n'"
OPEN = "('<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking else '<think>\\n')"
CHAT = [user("Q one"), answer("A one"), user("Q two"), answer("A two")]
ASKED_1 = "<|im_start|>user\nQ one<|im_end|>\n<|im_start|>assistant\n"
ASKED_2 = ASKED_1 + "A one<|im_end|>\n<|im_start|>user\nQ two<|im_end|>\n<|im_start|>assistant\n"


def test_qwen3_learns_an_empty_thought_in_every_turn_that_has_none() -> None:
    assert trained(chatml(QWEN3, "''"), CHAT) == [
        [(ASKED_1, "<think>\n\n</think>\n\nA one<|im_end|>")],
        [(ASKED_2, "<think>\n\n</think>\n\nA two<|im_end|>")],
    ]


def test_qwen3_learns_each_thought_behind_a_prompt_without_the_earlier_ones() -> None:
    messages = [user("Q one"), answer("A one", "T one"), user("Q two"), answer("A two", "T two")]
    assert trained(chatml(QWEN3, "''"), messages) == [
        [(ASKED_1, "<think>\nT one\n</think>\n\nA one<|im_end|>")],
        [(ASKED_2, "<think>\nT two\n</think>\n\nA two<|im_end|>")],
    ]


def test_turns_of_one_question_share_an_example_where_their_thoughts_stay() -> None:
    messages = [user("Q one"), answer("", "T one", call(1)), result(1, "R"), answer("A one", "T two")]
    called = "<think>\nT one\n</think>\n\n<tool_call>look</tool_call><|im_end|>"
    later = ASKED_1 + called + "\n<|im_start|>tool\nR<|im_end|>\n<|im_start|>assistant\n"
    assert trained(chatml(QWEN3, "''"), messages) == [
        [(ASKED_1, called), (later, "<think>\nT two\n</think>\n\nA one<|im_end|>")]
    ]


@pytest.mark.parametrize("thinks", [True, False])
def test_qwen35_closes_the_thought_that_its_prompt_opens_apart_from_the_prompts_tokens(thinks: bool) -> None:
    """Whole, the two newlines are one token (with `>` before them, where tags are no tokens)."""
    tokenizer = chatml(QWEN35, OPEN, thinks)
    whole = tokenizer(ASKED_1 + "<think>\n\n</think>", add_special_tokens=False)["input_ids"]
    asked = tokenizer(ASKED_1 + "<think>\n", add_special_tokens=False)["input_ids"]
    assert whole[: len(asked)] != asked
    assert trained(tokenizer, CHAT) == [
        [(ASKED_1 + "<think>\n", "\n</think>\n\nA one<|im_end|>")],
        [(ASKED_2 + "<think>\n", "\n</think>\n\nA two<|im_end|>")],
    ]


def test_a_turn_whose_border_is_no_tokens_is_not_shared_with_prompts_of_other_tokens() -> None:
    """The template keeps every thought, so the text would do; the second prompt has the newlines as one token."""
    first = "<think>\n\n</think>\n\nA one<|im_end|>"
    later = ASKED_1 + first + "\n<|im_start|>user\nQ two<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert trained(chatml(ALWAYS, OPEN), CHAT) == [
        [(ASKED_1 + "<think>\n", "\n</think>\n\nA one<|im_end|>")],
        [(later, "\n</think>\n\nA two<|im_end|>")],
    ]


def test_turns_whose_borders_are_tokens_share_an_example() -> None:
    messages = [user("Q one"), answer("A one", "T one"), user("Q two"), answer("A two", "T two")]
    first = "T one\n</think>\n\nA one<|im_end|>"
    later = f"{ASKED_1}<think>\n{first}\n<|im_start|>user\nQ two<|im_end|>\n<|im_start|>assistant\n<think>\n"
    one_each = [[(ASKED_1 + "<think>\n", first)], [(later, "T two\n</think>\n\nA two<|im_end|>")]]
    assert trained(chatml(ALWAYS, OPEN), messages) == [[*one_each[0], *one_each[1]]]
    assert trained(chatml(ALWAYS, OPEN), messages, expand_turns="all") == one_each


def test_a_thought_is_damage_where_the_prompt_has_closed_it() -> None:
    tokenizer, kwargs = chatml(QWEN35, OPEN), {"enable_thinking": False}
    messages = [user("Q one"), answer("A one", "T one")]
    (row,) = rendered(tokenizer, messages, None, kwargs, on_damage="keep")
    assert [(damage.kind, damage.index) for damage in row.damage] == [("thinking", 1)]
    asked = ASKED_1 + "<think>\n\n</think>\n\n"
    assert trained(tokenizer, messages, kwargs=kwargs, on_damage="keep") == [[(asked, "A one<|im_end|>")]]


def test_a_header_with_a_special_token_stays_prompt_where_the_template_has_no_asking_form() -> None:
    text = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    tokenizer = published.made(text, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    assert trained(tokenizer, CHAT) == [[(ASKED_1, "A one<|im_end|>"), (ASKED_2, "A two<|im_end|>")]]
    (row,) = rendered(tokenizer, CHAT, None, {})
    assert {kind for kind, _ in row.kinds} == {"no request"}


R1 = (
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}"
    "{%- else %}{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<eos>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"
)


@pytest.mark.parametrize(
    ("turn", "target"),
    [
        (answer("A one"), "\n</think>\n\nA one<eos>"),
        (answer("A one", "T one"), "T one\n</think>\n\nA one<eos>"),
        (answer("<think>\nT one\n</think>\nA one"), "T one\n</think>\nA one<eos>"),
    ],
)
def test_r1_learns_to_close_the_thought_that_its_prompt_opens(turn: dict[str, Any], target: str) -> None:
    tokenizer = published.made(R1, ["<eos>", "<think>", "</think>"], "<eos>")
    messages = [user("Q one"), turn, user("Q two"), answer("A two")]
    assert trained(tokenizer, messages) == [
        [("<｜User｜>Q one<｜Assistant｜><think>\n", target)],
        [
            (
                "<｜User｜>Q one<｜Assistant｜>" + ("\n" if "</think>" in turn["content"] else "") + "A one<eos>"
                "<｜User｜>Q two<｜Assistant｜><think>\n",
                "\n</think>\n\nA two<eos>",
            )
        ],
    ]
    assert not any(row.damage for row in rendered(tokenizer, messages, None, {}))


HARMONY = (
    "{%- for m in messages %}{%- set later = namespace(final=false) %}{%- for n in messages[loop.index:] %}"
    "{%- if n.role == 'assistant' and not n.tool_calls %}{%- set later.final = true %}{%- endif %}{%- endfor %}"
    "{%- if m.role == 'assistant' %}"
    "{%- if m.thinking and not later.final and (m.tool_calls or (loop.last and not add_generation_prompt)) %}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}"
    "{%- for c in m.tool_calls or [] %}{{- '<|start|>assistant to=' + c.function.name + '<|message|>' }}"
    "{{- c.function.arguments | tojson + '<|call|>' }}{%- endfor %}"
    "{%- if not m.tool_calls %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{%- endif %}"
    "{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)


def harmony() -> Any:
    return published.made(HARMONY, ["<|start|>", "<|end|>", "<|return|>", "<|call|>"], "<|return|>")


def test_harmony_ends_every_final_answer_with_the_token_that_ends_generation() -> None:
    asked = "<|start|>user<|message|>Q one<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>A "
    assert trained(harmony(), CHAT) == [
        [(asked, final + "one<|return|>")],
        [(asked + final + "one<|end|><|start|>user<|message|>Q two<|end|><|start|>assistant", final + "two<|return|>")],
    ]


def test_harmony_learns_a_final_answer_behind_the_analysis_that_is_dropped_once_it_is_there() -> None:
    called = {"role": "assistant", "content": "", "thinking": "T one", "tool_calls": [call(1, x="x")]}
    messages = [user("Q one"), called, result(1, "R"), {**answer("A one"), "thinking": "T two"}]
    analysis = "<|channel|>analysis<|message|>T "
    asked = "<|start|>user<|message|>Q one<|end|><|start|>assistant"
    calls = analysis + 'one<|end|><|start|>assistant to=look<|message|>{"x": "x"}<|call|>'
    found = trained(harmony(), messages)
    assert sorted({pair for pairs in found for pair in pairs}) == sorted(
        [
            (asked, calls),
            (
                asked + calls + "<|start|>tool<|message|>R<|end|><|start|>assistant",
                analysis + "two<|end|><|start|>assistant<|channel|>final<|message|>A one<|return|>",
            ),
        ]
    )
    assert sum(map(len, found)) == 2


GEMMA4 = (
    "{%- set ns = namespace(before='') %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{{- '<|turn>user\\n' + m.content + '<turn|>\\n' }}{%- set ns.before = '' %}{%- elif m.role == 'assistant' %}"
    "{%- if not ns.before %}{{- '<|turn>model\\n' }}{%- endif %}{%- set follower = loop.nextitem or {} %}"
    "{%- for c in m.tool_calls or [] %}{{- '<|tool_call>' + c.function.name + '<tool_call|>' }}{%- endfor %}"
    "{%- if m.tool_calls and follower.role == 'tool' %}"
    "{{- '<|tool_response>' + follower.content + '<tool_response|>' }}{%- endif %}{{- m.content }}"
    "{%- set ns.before = 'model' %}{%- if m.tool_calls %}{%- if follower.role != 'tool' %}{{- '<|tool_response>' }}"
    "{%- endif %}{%- elif follower.role != 'assistant' %}{{- '<turn|>\\n' }}{%- endif %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt and (messages | last).role != 'tool' %}{{- '<|turn>model\\n' }}{%- endif %}"
)


def gemma4() -> Any:
    special = ["<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"]
    return published.made(GEMMA4, special, "<turn|>")


def test_gemma4_never_learns_a_tools_result_inside_its_own_turn() -> None:
    asked = "<|turn>user\nQ one<turn|>\n<|turn>model\n"
    messages = [user("Q one"), answer("", "", call(1)), result(1, "R"), answer("A one")]
    assert trained(gemma4(), messages) == [
        [
            (asked, "<|tool_call>look<tool_call|><|tool_response>"),
            (asked + "<|tool_call>look<tool_call|><|tool_response>R<tool_response|>", "A one<turn|>"),
        ]
    ]


def test_gemma4_learns_text_beside_a_call_where_it_stands_before_the_tool_answers() -> None:
    asked = "<|turn>user\nQ one<turn|>\n<|turn>model\n"
    messages = [user("Q one"), answer("A none", "", call(1)), result(1, "R"), answer("A one")]
    assert trained(gemma4(), messages) == [
        [(asked, "<|tool_call>look<tool_call|>A none<|tool_response>")],
        [(asked + "<|tool_call>look<tool_call|><|tool_response>R<tool_response|>A none", "A one<turn|>")],
    ]


def test_answers_that_the_template_joins_are_one_turn() -> None:
    messages = [user("Q one"), answer("A one. "), answer("A two"), user("Q two"), answer("A three")]
    asked = "<|turn>user\nQ one<turn|>\n<|turn>model\n"
    joined = "A one. A two<turn|>"
    later = asked + joined + "\n<|turn>user\nQ two<turn|>\n<|turn>model\n"
    assert trained(gemma4(), messages) == [[(asked, joined), (later, "A three<turn|>")]]
    (row,) = rendered(gemma4(), messages, None, {})
    assert ("joined", 2) in row.kinds


GLM = (
    "{{- '[gMASK]' }}{%- for m in messages %}"
    "{%- if m.role == 'tool' %}{{- '<|observation|>\\n' + m.content }}"
    "{%- else %}{{- '<|' + m.role + '|>\\n' + m.content }}"
    "{%- for c in m.tool_calls or [] %}{{- '<tool_call>' + c.function.name }}"
    "{{- c.function.arguments | tojson + '</tool_call>' }}{%- endfor %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def test_glm_learns_the_next_header_as_its_stop_even_where_no_turn_follows() -> None:
    special = ["[gMASK]", "<|user|>", "<|assistant|>", "<|observation|>", "<tool_call>", "</tool_call>", "<eos>"]
    tokenizer = published.made(GLM, special, "<eos>")
    first = "[gMASK]<|user|>\nQ one<|assistant|>"
    later = first + "\nA one<|user|>\nQ two<|assistant|>"
    assert trained(tokenizer, CHAT) == [[(first, "\nA one<|user|>"), (later, "\nA two<|user|>")]]
    called = [user("Q one"), answer("", "", call(1, x="y"))]
    assert trained(tokenizer, called) == [[(first, '\n<tool_call>look{"x": "y"}</tool_call><|observation|>')]]
    (row,) = rendered(tokenizer, called, None, {})
    assert ("stop added", 1) in row.kinds


def test_llama3_learns_nothing_of_the_request_that_its_template_always_prints() -> None:
    text = (
        "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
        "{{ m.content + '<|eot_id|>' }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    )
    tokenizer = published.made(text, ["<|eot_id|>"], "<|eot_id|>")
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    first = "<|start_header_id|>user<|end_header_id|>\n\nQ one<|eot_id|>" + header
    later = first + "A one<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ two<|eot_id|>" + header
    assert trained(tokenizer, CHAT) == [[(first, "A one<|eot_id|>"), (later, "A two<|eot_id|>")]]


MISTRAL = (
    "{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}{{- '<s>' }}{%- for m in rest %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' }}{%- if loop.last and messages[0].role == 'system' %}"
    "{{- messages[0].content + '\\n\\n' }}{%- endif %}{{- m.content + '[/INST]' }}"
    "{%- else %}{{- ' ' + m.content + '</s>' }}{%- endif %}{%- endfor %}"
)


@pytest.mark.parametrize("kind", ["bpe", "pieces"])
def test_mistral_learns_each_answer_behind_the_system_message_that_only_prompts_print(kind: str) -> None:
    tokenizer = published.made(MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>", kind=kind)
    messages = [{"role": "system", "content": "Be."}, user("one"), answer("1"), user("two"), answer("22")]
    found = trained(tokenizer, messages)
    shown = [(prompt.replace(" ", ""), target.strip()) for pairs in found for prompt, target in pairs]
    assert shown == [
        ("<s>[INST]Be.\n\none[/INST]", "1</s>"),
        ("<s>[INST]one[/INST]1</s>[INST]Be.\n\ntwo[/INST]", "22</s>"),
    ]
    if kind == "bpe":
        assert found[0] == [("<s>[INST] Be.\n\none[/INST]", " 1</s>")]


def test_mistrals_lone_blank_before_digits_belongs_to_the_turn() -> None:
    tokenizer = published.made(MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>")
    assert trained(tokenizer, [user("one"), answer("1"), user("two"), answer("22")]) == [
        [("<s>[INST] one[/INST]", " 1</s>"), ("<s>[INST] one[/INST] 1</s>[INST] two[/INST]", " 22</s>")]
    ]


def test_phi3_ends_with_the_token_of_its_turns_not_with_the_texts() -> None:
    text = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{{ '<|assistant|>\\n' if add_generation_prompt else '<|endoftext|>' }}"
    )
    tokenizer = published.made(text, ["<|user|>", "<|assistant|>"], "<|endoftext|>")
    first = "<|user|>\nQ one<|end|>\n<|assistant|>\n"
    later = first + "A one<|end|>\n<|user|>\nQ two<|end|>\n<|assistant|>\n"
    assert trained(tokenizer, CHAT) == [[(first, "A one<|end|>"), (later, "A two<|end|>")]]
