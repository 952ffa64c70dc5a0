"""Rows of plain text: each begins and ends once, however it was written."""

from __future__ import annotations

from typing import Any

import pytest
from masks import byte_tokenizer, with_template
from tokenizers import processors

from mlxtune.data.chat import masking
from mlxtune.data.template.template import Template

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<sop>"]


def make(around: str, template: str | None = None, eos: str = "</s>") -> Any:
    """A tokenizer that puts tokens around a text ($A)."""
    inner = byte_tokenizer(SPECIAL)
    used = [(token, SPECIAL.index(token)) for token in SPECIAL if token in around]
    inner.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    return with_template(inner, template or "", eos, "<s>")


def whole(tokenizer: Any, text: str) -> str:
    (example,) = masking.tokenized_texts(Template(tokenizer), [text])
    assert example.mask.tolist() == [1] * len(example.ids)
    return str(tokenizer.decode(example.ids))


@pytest.mark.parametrize("around", ["<s> $A", "<s> $A </s>", "$A </s>", "$A"])
@pytest.mark.parametrize("text", ["once upon", " a time\n", "", "<sop>x"])
def test_a_text_gets_what_the_tokenizer_adds_and_one_end_token(around: str, text: str) -> None:
    begin = "<s>" if around.startswith("<s>") else ""
    assert whole(make(around), text) == f"{begin}{text}</s>"


@pytest.mark.parametrize("around", ["<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("end", ["</s>", "</s>\n", "</s> \n\n"])
def test_a_rendered_text_is_not_begun_or_ended_twice(around: str, end: str) -> None:
    text = f"<s>[INST] Which bus?[/INST] Line 4.{end}"
    assert whole(make(around), text) == text
    assert whole(make(around), text.removeprefix("<s>")) == text
    assert whole(make(around), text.removesuffix(end)) == text.removesuffix(end) + "</s>"


def test_all_tokens_that_a_tokenizer_begins_with_are_looked_for() -> None:
    tokenizer = make("<s> <sop> $A")
    assert whole(tokenizer, "<s><sop>x") == whole(tokenizer, "x") == "<s><sop>x</s>"


def test_a_token_that_ends_a_turn_of_the_template_ends_a_text_too() -> None:
    """The tokenizer's own end token is another one, as Gemma's <eos> beside <end_of_turn>."""
    tokenizer = make("$A", CHATML)
    text = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    assert whole(tokenizer, text) == text
    assert whole(tokenizer, "A tale.") == "A tale.</s>"
    assert whole(tokenizer, "<|im_end|> in the middle") == "<|im_end|> in the middle</s>"


def test_rows_of_text_are_the_same_whatever_stands_beside_them() -> None:
    tokenizer = make("<s> $A")
    texts = ["a", "<s>b</s>", "c</s>\n"]
    found = masking.tokenized_texts(Template(tokenizer), texts)
    assert [tokenizer.decode(example.ids) for example in found] == ["<s>a</s>", "<s>b</s>", "<s>c</s>\n"]
