"""Generated text -> message: by hand for each way to think, and back and forth through every template."""

from __future__ import annotations

from typing import Any

import masks
import pytest
import talk

from mlxtune.data.template.answers import Reader, parse
from mlxtune.data.template.template import Template

ASK = [{"role": "user", "content": "Why?"}]
NEXT = {"role": "user", "content": "And then?"}
T, C = "Because.\nI think so.", "So:\n\n- it is."

# name of the template, generated text, (key of the thought, thought), content
CASES = [
    (
        "harmony",
        f"<|channel|>analysis<|message|>{T}<|end|><|start|>assistant<|channel|>final<|message|>{C}<|return|>",
        {"thinking": T},
        C,
    ),
    ("harmony", f"<|channel|>final<|message|>{C}<|return|>", {}, C),
    ("harmony", f"<|channel|>final<|message|>{C}", {}, C),
    ("harmony", f"<|channel|>analysis<|message|>{T}", {"thinking": T}, ""),
    (
        "harmony",
        f"<|channel|>analysis<|message|>{T}<|end|><|start|>assistant<|channel|>analysis<|message|>More.<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{C}<|return|>",
        {"thinking": f"{T}\n\nMore."},
        C,
    ),
    (
        "harmony",
        f"<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant<|channel|>final<|message|>{C}<|return|>",
        {"thinking": "commentary Wait.  assistant"},
        C,
    ),
    ("opened", f"{T}\n</think>\n\n{C}<|im_end|>", {"reasoning_content": T}, C),
    ("opened", f"\n</think>\n\n{C}<|im_end|>", {}, C),
    ("opened", f"{T}</think>{C}<|im_end|>", {"reasoning_content": T}, C),
    ("opened", T, {"reasoning_content": T}, ""),
    ("opened", f"{T}<|im_end|>", {"reasoning_content": T}, ""),
    ("qwen", f"<think>\n{T}\n</think>\n\n{C}<|im_end|>", {"reasoning_content": T}, C),
    ("qwen", f"<think>\n\n</think>\n\n{C}<|im_end|>\n", {}, C),
    ("qwen", f"<think>{T}</think>{C}", {"reasoning_content": T}, C),
    ("qwen", f"<think>\n{T}", {"reasoning_content": T}, ""),
    ("qwen", f"{C}<|im_end|>", {}, C),
    ("deepseek", f"{T}\n</think>\n\n{C}<｜end▁of▁sentence｜>", {"reasoning_content": T}, C),
    ("deepseek", T, {"reasoning_content": T}, ""),
    ("deepseek", f"{C}<｜end▁of▁sentence｜>", {}, C),
    ("channel", f"<|channel>thought\n{T}\n<channel|>{C}<turn|>", {"reasoning": T}, C),
    ("channel", f"<|channel>thought\n{T}", {"reasoning": T}, ""),
    ("channel", f"{C}<turn|>", {}, C),
    ("gemma", f"{C}<turn|>", {}, C),
    ("strict", f"{C}<end_of_turn>\n", {}, C),
    ("mistral", f" {C}</s>", {}, C),
    ("glm", f"{C}<|user|>", {}, C),
    # The template keeps tags in the content, so they stay there.
    ("llama", f"<think>\n{T}\n</think>\n\n{C}<|eot_id|>", {}, f"<think>\n{T}\n</think>\n\n{C}"),
]


@pytest.mark.parametrize(("name", "text", "thought", "content"), CASES)
def test_a_generated_text_becomes_the_message_of_a_server(
    name: str, text: str, thought: dict[str, str], content: str
) -> None:
    message = parse(Template(talk.tokenizer_for(name)), ASK, None, text)
    assert message == {"role": "assistant", "content": content, **thought}


@pytest.mark.parametrize("name", [*masks.FAMILIES, *talk.OWN])
@pytest.mark.parametrize("before", [ASK, masks.turns("Hi", "Hello.", "Why?")], ids=["first", "later"])
@pytest.mark.parametrize("thought", ["", T])
def test_what_the_template_prints_for_an_answer_is_read_as_that_answer(
    name: str, before: list[dict[str, Any]], thought: str
) -> None:
    """The next prompt is the one of the original message, whichever field its thought was in."""
    template = Template(talk.tokenizer_for(name))
    asked = template.text(before, prompt=True)
    seen = 0
    for key in ("reasoning_content", "reasoning", "thinking"):
        original = {"role": "assistant", "content": C, **({key: thought} if thought else {})}
        whole = template.text([*before, original])
        if whole.startswith(asked):
            seen += 1
            text = whole[len(asked) :]
            message = parse(template, before, None, text)
            own = template.text([*before, original, NEXT], prompt=True)
            assert template.text([*before, message, NEXT], prompt=True) == own
            assert message["content"] == C
            assert (thought in message.values()) == (thought in text) or not thought
    assert seen or name in ("deepseek", "gemma")  # their prompts say more than their answers repeat


# Left out: a remark that looks like the answer until one comes, and a thought that turns out to be the answer.
@pytest.mark.parametrize(("name", "text", "thought", "content"), [c for i, c in enumerate(CASES) if i not in (5, 18)])
def test_what_is_said_while_an_answer_comes_is_never_taken_back(
    name: str, text: str, thought: dict[str, str], content: str
) -> None:
    """Character by character; what is shown early is a part of the whole, without the template's text."""
    reader = Reader(Template(talk.tokenizer_for(name)), ASK)
    final = reader.said(text)
    for end in range(len(text)):
        thought_so_far, content_so_far = reader.so_far(text[:end])
        assert final.thought.startswith(thought_so_far) or not thought_so_far.strip(), (text[:end], thought_so_far)
        assert final.content.startswith(content_so_far), (text[:end], content_so_far)
    assert "".join(final) != ""


def test_what_the_template_refuses_loses_its_special_tokens() -> None:
    """Harmony's refusal of channels in a content; by a text that has none of its forms."""
    tokenizer = talk.tokenizer_for("harmony")
    refusal = "{%- for m in messages if '<|channel|>' in m.content %}{{- raise_exception('no') }}{% endfor %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    message = parse(Template(tokenizer), ASK, None, "<|channel|>odd<|message|>words<|return|>")
    assert message == {"role": "assistant", "content": "oddwords"}


def test_private_characters_of_a_conversation_are_not_taken_for_marks() -> None:
    ask = [{"role": "user", "content": "\ue000 and \ue001"}]
    text = f"<think>\n{T}\n</think>\n\n\ue000<|im_end|>"
    message = parse(Template(talk.tokenizer_for("qwen")), ask, None, text)
    assert message == {"role": "assistant", "content": "\ue000", "reasoning_content": T}
