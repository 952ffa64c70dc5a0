"""The text for a proof where nothing was trained, so that no rows were held out: a few paragraphs that come with the
tool (prose, code, numbers, JSON, three languages), each with an equal share of the positions.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from mlxtune.data.chat.masking import Example, tokenized_texts
from mlxtune.data.template.template import Template

FILE = "sample.txt"


class Sample(list[Example]):
    """Examples of that text; a type of its own, so that a report can say what it was measured on."""


def read(tokenizer: Any, positions: int) -> Sample:
    """The paragraphs in tokens, every one of them a target. tokenizer: a fast Hugging Face tokenizer; positions: how
    many will be compared, of which each paragraph has its share.
    """
    text = (resources.files("mlxtune.ship") / FILE).read_text(encoding="utf-8")
    paragraphs = text.strip().split("\n\n")
    most = -(-positions // len(paragraphs)) + 1  # nothing predicts a paragraph's first token
    whole = tokenized_texts(Template(tokenizer), paragraphs)
    return Sample(Example(example.ids[:most], example.mask[:most]) for example in whole)
