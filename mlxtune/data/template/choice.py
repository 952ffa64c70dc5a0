"""The template that a run chooses for a model: one of our own, or a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mlxtune.data.template.template import Template
from mlxtune.errors import UserError

# Templates for base models that have none of their own. ChatML: OpenAI's chat markup. Alpaca: the prompts of Stanford
# Alpaca (Taori et al. 2023), later turns continuing with the same headings.
BUILT_IN = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "alpaca": (
        "{% set system = messages[0]['role'] in ['system', 'developer'] %}"
        "{% set paired = messages | selectattr('input') | list %}"
        "{% if system %}{{ messages[0]['content'] }}{% elif paired %}"
        "{{ 'Below is an instruction that describes a task, paired with an input that provides further context. ' }}"
        "{% else %}{{ 'Below is an instruction that describes a task. ' }}{% endif %}"
        "{% if not system %}{{ 'Write a response that appropriately completes the request.' }}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '\n\n### Instruction:\n' + (m['instruction'] if m['input'] else m['content']) }}"
        "{% if m['input'] %}{{ '\n\n### Input:\n' + m['input'] }}{% endif %}"
        "{% elif m['role'] == 'assistant' %}{{ '\n\n### Response:\n' + m['content'] + eos_token }}"
        "{% elif not loop.first %}{{ raise_exception('alpaca has no ' + m['role'] + ' turns here') }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}"
    ),
}
MARKERS = re.compile(r"<\|[^|<>{}\s]+\|>|<｜[^｜<>{}\s]+｜>|<(?:start|end)_of_turn>|\[/?INST\]")


def source(choice: str) -> str:
    """The text of a chosen template: chatml, alpaca, or a file. Raises UserError when there is no such file."""
    if choice in BUILT_IN:
        return BUILT_IN[choice]
    path = Path(choice).expanduser()
    if not path.is_file():
        raise UserError(f"data.template: no file {choice}", f"Allowed: {', '.join(BUILT_IN)}, or a Jinja file.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data.template: {path} is not text (invalid UTF-8 at byte {error.start})") from error


def missing(tokenizer: Any, choice: str) -> list[str]:
    """The tokens that a chosen template writes and the vocabulary does not have."""
    known = tokenizer.get_vocab()
    return sorted({marker for marker in MARKERS.findall(source(choice)) if marker not in known})


def set_template(tokenizer: Any, folder: Path, choice: str, hint: str = "") -> None:
    """Give the tokenizer the chosen template: chatml, alpaca, or a file; "" leaves it its own, or none.

    folder: where the tokenizer is from, for messages; hint: what to do when tokens are missing. Raises UserError for a
    template that is broken, or that needs tokens that the vocabulary does not have: a model has no embedding for them.
    """
    from jinja2.exceptions import TemplateError as JinjaError
    from jinja2.exceptions import TemplateSyntaxError

    if not choice:
        return
    text = source(choice)
    lacking = missing(tokenizer, choice)
    if lacking:
        raise UserError(
            f"{folder}: the template {choice} needs tokens that the vocabulary does not have: {', '.join(lacking)}",
            hint or "Train them: lora.train_also=[embeddings], and head where it is not tied to them; or take alpaca.",
        )
    if choice in BUILT_IN and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = "{{ bos_token }}" + text
    if choice == "alpaca" and tokenizer.eos_token is None:
        raise UserError(f"{folder}: the tokenizer has no end token, which the template alpaca ends answers with")
    tokenizer.chat_template = text
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(f"data.template: {choice} line {error.lineno}: not valid Jinja ({error.message})") from error
    except (JinjaError, TypeError, KeyError, ValueError, AttributeError, IndexError):
        pass  # it wants more of a conversation than that
    end = Template(tokenizer).end_of_turn.strip()
    if end in tokenizer.get_vocab():
        tokenizer.eos_token = end  # answers end where the template ends them


def require_template(tokenizer: Any) -> None:
    """Raise UserError when the tokenizer has no template, so that no conversation can be rendered."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template, so conversations cannot be rendered",
            "Choose one: --set data.template=alpaca (needs no new tokens), chatml, or a Jinja file; "
            "or use the model's instruct version.",
        )
