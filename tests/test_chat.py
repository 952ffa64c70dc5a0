"""Masks: what is trained on is what the model must produce, for several templates, whatever the text contains."""

from __future__ import annotations

from typing import Any

import pytest
from masks import byte_tokenizer, supervised, turns, with_template
from tokenizers import processors

from mlxtune.data.chat import masking
from mlxtune.data.template.template import Template, TemplateError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Strips every message, puts a blank line after the header, and has no newline after the end token (as Llama 3).
LLAMA = (
    "{{ '<bos>' }}{% for m in messages %}"
    "{{ '<h>' + m['role'] + '</h>\\n\\n' + m['content'] | trim + '<eot>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<h>assistant</h>\\n\\n' }}{% endif %}"
)
# The system prompt goes into the first user turn; answers end with </s> (as Mistral).
MISTRAL = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}{{ '<bos>' }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + (system + '\\n\\n' if loop.first else '') }}"
    "{{ m['content'] + '[/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}{% endif %}"
    "{% endfor %}"
)
# Renames the assistant, forbids system prompts, ends turns with a newline before nothing (as Gemma).
GEMMA = (
    "{{ '<bos>' }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<sot>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}"
    "{{ m['content'] | trim + '<eot>\\n' }}{% endfor %}"
)
# Prints an empty thought before every answer (as MiniMind and Qwen 3 do).
THINK = CHATML.replace(
    "m['role'] + '\\n' + m['content']",
    "m['role'] + '\\n' + ('<think>\\n\\n</think>\\n\\n' if m['role'] == 'assistant' else '') + m['content']",
)
# The same, and the empty thought is also in the generation prompt.
THOUGHT = THINK.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}")
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
TEMPLATES = {
    "chatml": CHATML,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "think": THINK,
    "thought": THOUGHT,
    "plain": PLAIN,
}
OPEN = {"think": "<think>\n\n</think>\n\n"}  # what the model must produce before its answer
END = {
    "chatml": "<|im_end|>",
    "llama": "<eot>",
    "mistral": "</s>",
    "gemma": "<eot>",
    "think": "<|im_end|>",
    "thought": "<|im_end|>",
    "plain": "",
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<bos>", "<eot>", "<h>", "</h>", "</s>", "<sot>"]


def make(template: str, merges: tuple[tuple[str, str], ...] = ()) -> Any:
    return with_template(byte_tokenizer(SPECIAL, merges), template, "</s>")


def opened(name: str, answer: str) -> str:
    return OPEN.get(name, "") + answer + END[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_and_its_end_token_is_supervised_and_nothing_else(name: str) -> None:
    tokenizer = make(TEMPLATES[name])
    messages = turns("Hi!", "Hello.", "Why?", "Because: the reason.")
    assert supervised(tokenizer, messages) == [opened(name, "Hello."), opened(name, "Because: the reason.")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_markers_inside_user_text_stay_context(name: str) -> None:
    """The whole render of another conversation as a user message: the strongest injection there is."""
    tokenizer = make(TEMPLATES[name])
    attack = tokenizer.apply_chat_template(turns("x", "I am injected", "y", "me too"), tokenize=False)
    assert supervised(tokenizer, turns(attack, "No.", "ok", "Yes.")) == [opened(name, "No."), opened(name, "Yes.")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_user_who_says_what_the_assistant_says_stays_context(name: str) -> None:
    assert supervised(make(TEMPLATES[name]), turns("yes", "yes", "assistant", "yes")) == [opened(name, "yes")] * 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_empty_answer_still_supervises_its_end_token(name: str) -> None:
    found = supervised(make(TEMPLATES[name]), turns("Say nothing.", "", "Now hi.", "hi"))
    assert found == [text for text in (opened(name, ""), opened(name, "hi")) if text]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_that_ends_with_the_user_supervises_the_answers_before(name: str) -> None:
    assert supervised(make(TEMPLATES[name]), turns("Hi", "Hello", "And now?")) == [opened(name, "Hello")]


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_template_that_strips_answers_supervises_what_it_prints(name: str) -> None:
    found = supervised(make(TEMPLATES[name]), turns("q", "\n\n  indented\n\tanswer \n", "q", "   "))
    assert found == [f"indented\n\tanswer{END[name]}", END[name]]


@pytest.mark.parametrize("name", ["chatml", "mistral", "plain"])
def test_a_template_that_keeps_whitespace_supervises_it(name: str) -> None:
    assert supervised(make(TEMPLATES[name]), turns("q", "\n  a \n")) == [f"\n  a \n{END[name]}"]


def test_a_token_that_straddles_the_border_belongs_to_the_answer() -> None:
    """With a merge of two newlines, the header's newline and the answer's first one are one token."""
    tokenizer = make(CHATML, merges=(("Ċ", "Ċ"),))
    example = masking.render(tokenizer, turns("q", "\nok"))
    first = list(example.mask).index(1)
    assert tokenizer.decode([example.ids[first]]) == "\n\n"
    assert tokenizer.decode(example.ids[first + 1 :], clean_up_tokenization_spaces=False) == "ok<|im_end|>\n"
    assert list(example.mask[first:]) == [1, 1, 1, 1, 0]


def test_offsets_that_leave_out_spaces_lose_no_token() -> None:
    """Llama 3's tokenizer trims them: a token of spaces then covers no character at all."""
    tokenizer = make(CHATML)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert (0, 0) in [
        (0, end - start) for start, end in tokenizer("a b", return_offsets_mapping=True)["offset_mapping"]
    ]
    assert supervised(tokenizer, turns("q", "  a  b ")) == ["  a  b <|im_end|>"]


def test_text_of_many_bytes_per_letter_is_covered_whole() -> None:
    text = "Bonjour 🌍! «naïve» 日本語 👨\u200d💻 e\u0301"
    assert supervised(make(CHATML), turns("Ü 你好 👋🏽", text)) == [text + "<|im_end|>"]


def test_an_end_token_inside_an_answer_is_part_of_the_answer() -> None:
    text = "the token <|im_end|> ends a turn"
    assert supervised(make(CHATML), turns("how?", text)) == [text + "<|im_end|>"]


def test_the_system_prompt_is_context() -> None:
    messages = [{"role": "system", "content": "Hello. Be brief."}, *turns("Hi", "Hello. Be brief.")]
    assert supervised(make(CHATML), messages) == ["Hello. Be brief.<|im_end|>"]
    assert supervised(make(MISTRAL), messages) == ["Hello. Be brief.</s>"]


def test_consecutive_assistant_turns_are_both_supervised() -> None:
    messages = [*turns("q", "one"), {"role": "assistant", "content": "two"}]
    assert supervised(make(CHATML), messages) == ["one<|im_end|>", "two<|im_end|>"]


def test_a_refusing_template_says_why() -> None:
    with pytest.raises(TemplateError, match="no system"):
        masking.render(make(GEMMA), [{"role": "system", "content": "s"}, *turns("q", "a")])


def test_a_template_that_takes_no_other_texts_than_these_is_refused_by_name() -> None:
    """Where each text stands is shown by marks in its place; a template that refuses them shows nothing."""
    refusing = "{% if messages | length > 3 and messages[0]['content'] != 'Hi' %}{{ raise_exception('no') }}{% endif %}"
    with pytest.raises(TemplateError, match="message 2 so that its place is not certain"):
        masking.render(make(refusing + CHATML), turns("Hi", "one", "q", "two"))


def test_template_variables_reach_the_template() -> None:
    tokenizer = make("{{ mood }}" + CHATML)
    assert supervised(tokenizer, turns("q", "calm"), mood="calm") == ["calm<|im_end|>"]


def test_private_use_characters_in_the_data_are_no_stand_ins() -> None:
    """The conversation holds the very character that would have stood in for an answer."""
    assert supervised(make(CHATML), turns("\ue000\ue001", "\ue000 ok \ue002")) == ["\ue000 ok \ue002<|im_end|>"]


def test_plain_text_is_supervised_whole_and_ends() -> None:
    tokenizer = make(CHATML)
    (example,) = masking.tokenized_texts(Template(tokenizer), ["abc"])
    assert tokenizer.decode(example.ids) == "abc</s>"
    assert list(example.mask) == [1, 1, 1, 1]
