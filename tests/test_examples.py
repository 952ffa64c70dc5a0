"""From rows to examples: duplicates, caps, order, expanded turns, damage, and templates for base models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import masks
import pytest
import tiny
from reading import ASKED, all_of, read, shown

from mlxtune.data.template.tokenizer import load_tokenizer
from mlxtune.errors import UserError


def test_equal_rows_are_left_out_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": text, "id": number} for number, text in enumerate(["a", "b", "a", "c", "b", "a"])]
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    found = all_of(path, tokenizer, dedup="exact")
    assert shown(found, tokenizer) == ["a", "b", "c"]
    assert "train: 3 rows left out: duplicates" in found.notes("train", 99)
    assert len(all_of(path, tokenizer)) == 6


def test_nearly_equal_rows_are_left_out_where_asked(tokenizer: Any, tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(80)]
    near = [*words[:40], "changed", *words[41:]]
    rows = [{"text": " ".join(text)} for text in (words, near, words[::-1], words)]
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    assert [len(all_of(path, tokenizer, dedup=kind)) for kind in ("none", "exact", "near")] == [4, 3, 2]
    kept = all_of(path, tokenizer, dedup="near")
    assert [kept.place(at) for at in range(2)] == ["line 1", "line 3"]


def test_a_cap_chooses_rows_by_the_seed(tokenizer: Any, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"text": f"t{number}"} for number in range(30)])
    chosen = [shown(read(path, tokenizer, seed, True, cap=7)["train"], tokenizer) for seed in (0, 0, 1)]
    assert [len(set(rows)) for rows in chosen] == [7, 7, 7]
    assert chosen[0] == chosen[1] != chosen[2]
    assert "train: 23 rows left out: beyond the cap of 7 of d.jsonl" in all_of(path, tokenizer, cap=7).notes(
        "train", 99
    )


def test_the_column_to_go_up_by_is_kept_and_must_hold_numbers(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "a", "hard": 3}, {"text": "b", "hard": 1.5}, {"text": "c", "hard": "2"}]
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    assert all_of(path, tokenizer, order="hard").column("key").tolist() == [3, 1.5, 2]
    for value in (None, "much", float("nan"), 10**400):
        tiny.write_jsonl(path, [*rows, {"text": "d", "hard": value}])
        with pytest.raises(UserError, match=r"line 4: no number in the column hard, by which data.order goes"):
            all_of(path, tokenizer, order="hard")
    with pytest.raises(UserError, match="line 1: no number in the column soft"):
        all_of(path, tokenizer, order="soft")


def thoughtful(tokenizer: Any) -> Any:
    tokenizer.chat_template = masks.source("qwen")
    return tokenizer


def answered(index: int, **extra: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"Q{index}"}, {"role": "assistant", "content": f"A{index}", **extra}]


THOUGHTFUL = [message for index in (1, 2, 3) for message in answered(index, reasoning_content=f"R{index}")]


@pytest.mark.parametrize(
    ("messages", "choice", "expected"),
    [
        (THOUGHTFUL, "auto", [f"<think>\nR{index}\n</think>\n\nA{index}<|im_end|>" for index in (1, 2, 3)]),
        ([*answered(1), *answered(2)], "auto", [f"<think>\n\n</think>\n\nA{index}<|im_end|>" for index in (1, 2)]),
        ([*answered(1), *answered(2)], "all", [f"<think>\n\n</think>\n\nA{index}<|im_end|>" for index in (1, 2)]),
        (
            [*answered(1), *answered(2), ASKED[0]],
            "all",
            [f"<think>\n\n</think>\n\nA{index}<|im_end|>" for index in (1, 2)],
        ),
    ],
    ids=["thinking stripped", "an empty thought in the last turn alone", "always", "a question at the end"],
)
def test_each_expanded_turn_is_what_inference_would_see(
    messages: list[Any], choice: str, expected: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer = thoughtful(tokenizer)
    found = all_of(tiny.write_jsonl(tmp_path / "d.jsonl", [{"messages": messages}]), tokenizer, expand_turns=choice)
    assert ["".join(masks.runs(tokenizer, example)) for example in found] == expected
    if len(expected) > 1:
        assert [found.place(at) for at in range(len(found))] == [f"line 1 turn {at + 1}" for at in range(len(found))]
        ends = [place + 1 for place, message in enumerate(messages) if message["role"] == "assistant"]
        for example, end in zip(found, ends, strict=True):
            own = tokenizer.apply_chat_template(messages[:end], tokenize=True, return_dict=False)
            assert example.ids.tolist() == own


def test_a_conversation_that_is_not_expanded_loses_its_earlier_thinking(tokenizer: Any, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"messages": THOUGHTFUL}])
    with pytest.raises(UserError, match=r"damages 1 of 1 rows: line 1: .*thinking of message 2.* message 4"):
        all_of(path, thoughtful(tokenizer), expand_turns="none")
    (example,) = all_of(path, thoughtful(tokenizer), expand_turns="none", on_damage="keep")
    expected = ["A1<|im_end|>", "A2<|im_end|>", "<think>\nR3\n</think>\n\nA3<|im_end|>"]
    assert masks.runs(tokenizer, example) == expected


def calling(*after: dict[str, Any]) -> dict[str, Any]:
    call = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {}}}
    return {"messages": [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [call]}, *after]}


def test_damaged_rows_stop_are_left_out_or_are_kept(tokenizer: Any, tokenizer_folder: Path, tmp_path: Path) -> None:
    damaged = calling({"role": "tool", "tool_call_id": "c1", "content": "5"}, ASKED[1])
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"messages": ASKED}, damaged, {"messages": ASKED}])
    with pytest.raises(UserError, match="damages 1 of 3 rows: line 2: the template drops the tool calls of message 2"):
        all_of(path, tokenizer)
    dropped = all_of(path, tokenizer, on_damage="drop")
    assert [dropped.place(at) for at in range(len(dropped))] == ["line 1", "line 3"]
    assert "train: 1 rows left out: damaged by the chat template" in dropped.notes("train", 99)
    assert len(all_of(path, tokenizer, on_damage="keep")) == 3
    done = tiny.mlxtune("data", "show", "--model", tokenizer_folder, "--data", path)
    assert "damage: the template drops the tool calls of message 2" in done.stdout


def test_a_row_of_which_damage_leaves_nothing_is_damaged_too(tokenizer: Any, tmp_path: Path) -> None:
    """Its only answer is a call that the template drops."""
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"messages": ASKED}, calling(), {"messages": ASKED}])
    with pytest.raises(UserError, match="line 2: the template drops the tool calls of message 2"):
        all_of(path, tokenizer)
    assert len(all_of(path, tokenizer, on_damage="drop")) == 2


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.make_tokenizer(tmp_path / "base", chat=False)
    return tmp_path / "base"


def test_a_tokenizer_without_a_template_asks_for_a_choice(base: Path, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"messages": ASKED}])
    with pytest.raises(UserError, match="has no chat template") as caught:
        all_of(path, load_tokenizer(base))
    assert "data.template=alpaca" in str(caught.value.hint)
    texts = tiny.write_jsonl(tmp_path / "t.jsonl", [{"text": "plain text needs none"}])
    assert len(all_of(texts, load_tokenizer(base))) == 1


def test_chosen_templates_supervise_the_answer_and_its_end(base: Path, tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [row])
    tokenizer = load_tokenizer(base)
    (example,) = all_of(path, tokenizer, template="alpaca")
    assert masks.runs(tokenizer, example) == ["3<|im_end|>"]
    assert tokenizer.decode(example.ids) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3<|im_end|>"
    )
    tokenizer = load_tokenizer(base)
    (example,) = all_of(path, tokenizer, template="chatml")
    assert masks.runs(tokenizer, example) == ["3<|im_end|>"]
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m.role + '> ' + m.content + '<|endoftext|>' }}{% endfor %}")
    tokenizer = load_tokenizer(base)
    (example,) = all_of(path, tokenizer, template=str(mine))
    assert masks.runs(tokenizer, example) == ["3<|endoftext|>"]
    assert tokenizer.eos_token == "<|endoftext|>"


def test_templates_that_need_new_tokens_or_are_not_there_are_refused(base: Path, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"messages": ASKED}])
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ '<|start_of_role|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}")
    for template, reason in (
        (str(mine), r"needs tokens that the vocabulary does not have: <\|start_of_role\|>"),
        ("missing.jinja", "no file missing.jinja"),
        ("llama3", "no file llama3"),
    ):
        with pytest.raises(UserError, match=reason):
            all_of(path, load_tokenizer(base), template=template)
