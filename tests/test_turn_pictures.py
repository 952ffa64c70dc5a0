"""The pictures at the heads of the modules of `data.chat`, and of `answer_forms`, are what happens."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from masks import byte_tokenizer, family, turns, with_template

from mlxtune.config.schema import DataSection
from mlxtune.data.chat import masking, single_replacement
from mlxtune.data.chat.borders import Borders
from mlxtune.data.chat.conversation import Conversation
from mlxtune.data.chat.marks import CONTENT, THINKING
from mlxtune.data.chat.pieces import cut_at_marks
from mlxtune.data.chat.renderer import Renderer
from mlxtune.data.chat.turns import RenderedConversation, locate
from mlxtune.data.template.answer_forms import Form, Probe
from mlxtune.data.template.template import Template

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Prints another header before an answer with a comma.
REWRITES = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content + '\n' }}"
    "{% else %}{{ ('List: ' if ',' in m.content else 'A: ') + m.content + '<end>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)


def chatml() -> Any:
    return with_template(byte_tokenizer(["<|im_start|>", "<|im_end|>"]), CHATML, "<|im_end|>")


def learned(tokenizer: Any, messages: Any, tools: Any = None) -> list[str]:
    found = locate(Template(tokenizer), messages, tools)
    return [found.text[start:end] for _, start, end in found.spans]


def test_a_marked_rendering_is_cut_at_its_marks() -> None:
    template = Template(chatml())
    messages = turns("hello there", "hi")
    conversation = Conversation(template, messages)
    user, assistant = cut_at_marks(conversation.marked_whole(2), conversation.owners)
    assert (user.index, user.kinds, user.before) == (0, {CONTENT}, "<|im_start|>user\n")
    assert user.after == assistant.before == "<|im_end|>\n<|im_start|>assistant\n"
    assert (assistant.index, assistant.kinds, assistant.after) == (1, {CONTENT}, "<|im_end|>\n")
    assert template.request == "<|im_start|>assistant\n"
    assert learned(template.tokenizer, messages) == ["hi<|im_end|>"]


def test_a_thought_and_its_content_are_one_piece() -> None:
    template = Template(family("qwen"))
    messages = [turns("q")[0], {"role": "assistant", "content": "hi", "reasoning_content": "why"}]
    conversation = Conversation(template, messages)
    _, piece = cut_at_marks(conversation.marked_whole(2), conversation.owners)
    assert piece.kinds == {CONTENT, THINKING}
    assert piece.before.endswith("<|im_start|>assistant\n<think>\n") and piece.after == "<|im_end|>\n"
    assert learned(template.tokenizer, messages) == ["<think>\nwhy\n</think>\n\nhi<|im_end|>"]


def test_the_quote_signs_around_a_calls_mark_are_dropped() -> None:
    template = Template(family("qwen"))
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [turns("q")[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    conversation = RenderedConversation(template, messages, None)
    question, piece = cut_at_marks(conversation.marked_whole(2), conversation.owners)
    assert piece.before.endswith('{"x": "') and piece.after.startswith('"}}')
    assert question.optional_tail == piece.tolerance > 0 == question.tolerance
    start, end = conversation.walk([question, piece])[-1]
    assert conversation.text[start:end] == "1" and piece.dropped_quotes == 1
    assert learned(template.tokenizer, messages)[0].endswith('{"x": 1}}\n</tool_call><|im_end|>')


def test_a_turn_that_the_template_rewrites_is_found_by_replacing_it_alone() -> None:
    tokenizer = with_template(byte_tokenizer(["<end>"]), REWRITES, "<end>")
    messages = turns("which?", "one, two", "why?", "because")
    conversation = RenderedConversation(Template(tokenizer), messages, None)
    assert conversation.text == "Q: which?\nList: one, two<end>Q: why?\nA: because<end>"
    assert conversation.walk(cut_at_marks(conversation.marked_whole(4), conversation.owners)) == []
    start, end = single_replacement.span_of(conversation, conversation.text, 1)
    assert conversation.text[start:end] == "List: one, two<end>"
    assert learned(tokenizer, messages) == ["List: one, two<end>", "because<end>"]


def test_a_prompt_that_has_other_tokens_inside_of_its_example_is_not_placed() -> None:
    """The tokenizer joins two newlines; the prompt ends with one, and the target begins with another."""
    tokenizer = with_template(byte_tokenizer(["<think>", "<end>"], (("Ċ", "Ċ"),)), CHATML, "<end>")
    borders = Borders(tokenizer, Template(tokenizer))
    for target, expected in (("\nx", None), ("x", 3)):
        prompt = "q<think>\n"
        (found,) = borders.tokens([prompt + target])
        assert borders.place(found, borders.cuts(prompt + target), len(prompt)) == expected


def test_the_form_of_an_answer_is_learnt_from_marks() -> None:
    probe = Probe(Template(family("qwen")), turns("Why?"), None)
    assert probe.form() == Form("<think>\n", "\n</think>\n\n", "reasoning_content")


def test_what_was_learnt_of_a_template_goes_with_who_holds_it() -> None:
    def learnt_by_renderer() -> weakref.ref[Template]:
        renderer = Renderer(chatml(), DataSection(path="d.jsonl"))
        template = renderer.template
        assert renderer.uncut().template is template is renderer.template
        return weakref.ref(template)

    def learnt_by_rendering() -> weakref.ref[Template]:
        tokenizer = chatml()
        masking.render(tokenizer, turns("q", "a"))
        template = masking.template_of(tokenizer, {})
        assert template is masking.template_of(tokenizer, {})
        return weakref.ref(template)

    held, last = learnt_by_renderer(), learnt_by_rendering()
    gc.collect()
    assert held() is None and last() is not None
    masking.render(chatml(), turns("q", "a"))  # another tokenizer
    gc.collect()
    assert last() is None
