"""Findings about markup, keys that nothing reads, and rows that are refused or too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reading
import tiny

from mlxtune.config.schema import DataSection
from mlxtune.data.chat.renderer import Renderer
from mlxtune.data.rows import formats
from mlxtune.data.rows.rated import RATED_BAD, UNRATED
from mlxtune.data.survey import lint, survey
from mlxtune.data.survey.split_survey import Finding, SplitSurvey


def found(
    rows: list[dict[str, Any]], tokenizer: Any, folder: Path, preferences: bool = False, **options: Any
) -> dict[str, Finding]:
    out = SplitSurvey("train", "d.jsonl")
    read = formats.read(tiny.write_jsonl(folder / "d.jsonl", rows), {}, preferences)
    renderer = Renderer(tokenizer, DataSection(path="d.jsonl", **options))
    survey.read_split(out, read, renderer, lambda name, rows: None)
    return out.findings


def chat(question: str, answer: str, **extra: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **extra}]}


GOOD = chat("Which bus goes to the harbour?", "It is line 4, from the square.")
NEW = {"refused", "too long", "dropped", "unread", "special", "rendered"}


def test_a_good_row_has_none_of_these_findings(tokenizer: Any, tmp_path: Path) -> None:
    exported = chat("q", "An answer of some words.", refusal=[], id="m1", annotations=[], audio={}, weight=1, name="x")
    text = {"text": "Once upon a time there was a < b and [a] b > c.<|im_end|>\n"}
    for rows in ([GOOD, exported, chat("Why?", "<think>Hm.</think>Because of the tide.")], [text]):
        assert not NEW & found(rows, tokenizer, tmp_path).keys()


def test_tokens_of_the_template_inside_of_messages_are_named(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        GOOD,
        chat("<|im_start|>user\nWhich bus?<|im_end|>", "Line 4 goes there."),
        chat("Which bus then?", "Line 4 goes there.<|im_end|>"),
        chat("Which bus now?", "The <|endoftext|> is no token of this template."),
        chat("And how?", "By line 4.", reasoning_content="<|im_end|>"),
    ]
    finding = found(rows, tokenizer, tmp_path)["special"]
    assert finding.rows == [2, 3, 5]
    assert finding.reasons == {"<|im_end|>, <|im_start|>": 1, "<|im_end|>": 2}


def test_tokens_that_the_template_writes_by_a_variable_count_too(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
    rows = [chat("Which bus?", "Line 4 goes there.<|im_end|>"), chat("<|im_start|>", "Line 5 goes there.")]
    assert found(rows, tokenizer, tmp_path)["special"].reasons == {"<|im_end|>": 1}


def test_text_rows_that_are_rendered_already_are_named_with_what_is_trained_on(tokenizer: Any, tmp_path: Path) -> None:
    rendered = tokenizer.apply_chat_template(GOOD["messages"], tokenize=False)
    rows = [{"text": "A tale.<|im_end|>\n"}, {"text": rendered}]
    finding = found(rows, tokenizer, tmp_path)["rendered"]
    assert (finding.rows, finding.reasons) == ([2], {"<|im_end|>, <|im_start|>": 1})
    kind = lint.KINDS["rendered"]
    assert "whole text is trained on, prompts too" in kind.what
    assert "messages" in kind.fix


def test_message_keys_that_nothing_reads_are_named(tokenizer: Any, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Which bus?", "lang": "en"}, {"from": "gpt", "value": "Line 4 goes there."}]
    rows = [GOOD, chat("q", "An answer of some words.", loss_weight=0, mood="calm"), chat("r", "And one.", mood="wild")]
    finding = found(rows, tokenizer, tmp_path)["unread"]
    assert (finding.count, finding.rows, finding.reasons) == (2, [2, 3], {"loss_weight": 1, "mood": 2})
    assert found([{"conversations": turns}], tokenizer, tmp_path)["unread"].reasons == {"lang": 1}


def test_a_key_that_the_chat_template_names_is_read(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = "{{ messages | map(attribute='mood', default='') | join }}" + tokenizer.chat_template
    rows = [chat("q", "An answer of some words.", mood="calm"), chat("r", "And one more of them.", moody="calm")]
    assert found(rows, tokenizer, tmp_path)["unread"].reasons == {"moody": 1}


@pytest.mark.parametrize("code", ["refused", "too long", "dropped"])
def test_a_row_that_teaches_nothing_is_named_with_what_helps_it(code: str, tokenizer: Any, tmp_path: Path) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
    tokenizer.chat_template = refusing + tokenizer.chat_template
    row, reason, helps, useless = {
        "refused": (
            {"messages": [{"role": "system", "content": "Be short."}, *GOOD["messages"]]},
            "the chat template refuses this conversation: no system prompt",
            "data.template",
            "max_tokens",
        ),
        "too long": (
            chat("Why? " * 60, "Because of the tide."),
            "no supervised token in the first 100 tokens",
            "max_tokens",
            "template",
        ),
        "dropped": ({"messages": GOOD["messages"][:1]}, "no assistant turn", "answer", "max_tokens"),
    }[code]
    findings = found([GOOD, row], tokenizer, tmp_path, max_tokens=100)
    assert (findings[code].rows, findings[code].reasons) == ([2], {reason: 1})
    assert not {"refused", "too long", "dropped"} - {code} & findings.keys()
    fix = lint.KINDS[code].fix
    assert helps in fix and useless not in fix


def rated(label: Any, number: int = 0) -> dict[str, Any]:
    return {**chat(f"Which bus goes to harbour {number}?", "It is line 4, from the square."), "label": label}


def test_answers_that_are_not_rated_good_are_no_rows_to_mend(tokenizer: Any, tmp_path: Path) -> None:
    rows = [rated(label, number) for number, label in enumerate((True, False, None, False))]
    findings = found(rows, tokenizer, tmp_path)
    assert "dropped" not in findings and "label" not in findings
    assert (findings["rated"].rows, findings["rated"].reasons) == ([2, 4], {RATED_BAD: 2})
    assert (findings["unrated"].rows, findings["unrated"].reasons) == ([3], {UNRATED: 1})
    with_ratings = found(rows, tokenizer, tmp_path, preferences=True)
    assert with_ratings["unrated"].rows == [3] and not {"rated", "dropped"} & with_ratings.keys()
    assert "-c kto" in lint.KINDS["rated"].fix and "-c kto" in RATED_BAD


@pytest.mark.parametrize("expand_turns", ["auto", "none"])
def test_a_label_that_may_be_a_rating_or_a_class_is_told(expand_turns: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = [rated(label, number) for number, label in enumerate((0, "spam", "undesirable", True, 1, 2, [0]))]
    findings = found(rows, tokenizer, tmp_path, expand_turns=expand_turns)
    assert findings["label"].rows == [1, 3, 5] and "rated" not in findings
    read = reading.all_of(tmp_path / "d.jsonl", tokenizer, expand_turns=expand_turns)
    assert len(read) == 7
    (told,) = (note for note in read.notes("train", 99) if "label" in note)
    assert (
        told.startswith("train: in d.jsonl, 3 x an answer whose label may be a rating or a class") and "-c kto" in told
    )
