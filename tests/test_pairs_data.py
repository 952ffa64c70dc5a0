"""Pairs and rated answers as examples: whole, masked as ordinary rows are, held out, chosen and dealt by rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import masks
import numpy as np
import published
import pytest
import tiny
from conversations import TOOL, answer, call, result, system, user
from reading import all_of, read, rows_of

from mlxtune.config.schema import DataSection
from mlxtune.data.chat.renderer import Renderer
from mlxtune.data.dataset import holdout, mixture, sources
from mlxtune.data.dataset.batches import collate
from mlxtune.data.dataset.examples import Examples
from mlxtune.data.rows.sides import Side
from mlxtune.errors import UserError

C, R, G, B = Side.CHOSEN, Side.REJECTED, Side.GOOD, Side.BAD


def pairs_of(count: int, long: int = 0) -> list[dict[str, Any]]:
    """Each with a prompt of its own."""
    rows = []
    for number in range(count):
        question = f"Question {number}? {'word ' * long}"
        rows.append({"prompt": question, "chosen": f"Yes, {number}.", "rejected": f"No {'no ' * (number % 4)}"})
    return rows


def of(folder: Path, rows: list[Any], tokenizer: Any, **options: Any) -> Examples:
    return all_of(tiny.write_jsonl(folder / "d.jsonl", rows), tokenizer, preferences=True, **options)


def test_a_pair_is_one_row_of_two_examples_and_its_sides_are_known(tokenizer: Any, tmp_path: Path) -> None:
    found = of(tmp_path, pairs_of(3), tokenizer)
    assert (len(found), found.rows, found.kind) == (6, 3, "pairs")
    assert found.sides.tolist() == [C, R] * 3
    assert found.row_of.tolist() == [0, 0, 1, 1, 2, 2]
    assert [found.place(index) for index in (0, 1, 5)] == ["line 1 chosen", "line 1 rejected", "line 3 rejected"]
    trained = [masks.runs(tokenizer, example) for example in found[:2]]
    assert trained == [["Yes, 0.<|im_end|>"], ["No <|im_end|>"]]
    assert "3 pairs, 6 turns, 6 examples" in found.expansion.line()


TOOL_TALK = [user("Look?"), answer("", "", call(1, x="sky")), result(1, "blue"), answer("It is blue."), user("Sure?")]
THOUGHT = [user("Hi"), answer("Hello.", "A greeting."), user("Sky?")]
USES_TOOL = [answer("", "", call(2, x="sea")), result(2, "grey"), answer("No.")]
TEMPLATES: dict[str, tuple[Any, list[Any], list[Any], list[Any], bool]] = {  # tokenizer, prompt, sides, with tools
    "chatml": (lambda: published.tokenizer("qwen2_5"), THOUGHT, [answer("Blue.")], [answer("Red!")], False),
    "qwen3, thoughts": (
        lambda: published.tokenizer("qwen3"),
        THOUGHT,
        [answer("Blue.", "Look up.")],
        [answer("Red!")],
        False,
    ),
    "qwen3, tools": (lambda: published.tokenizer("qwen3"), TOOL_TALK, USES_TOOL, [answer("Yes.")], True),
    "qwen3, several turns": (
        lambda: published.tokenizer("qwen3"),
        THOUGHT,
        [answer("Blue.", "Look up."), user("Sure?"), answer("Yes.", "I am.")],
        [answer("Red!"), user("Sure?"), answer("No.", "Hm.")],
        False,
    ),
    "llama 3": (lambda: masks.family("llama"), [system("S"), *THOUGHT], [answer("Blue.")], [answer("Red!")], False),
    "gemma": (lambda: published.tokenizer("gemma"), THOUGHT, [answer("Blue.")], [answer(" Red!")], False),
    "mistral, tools": (lambda: masks.family("mistral"), TOOL_TALK, USES_TOOL, [answer("Yes.")], True),
    "deepseek": (lambda: masks.family("deepseek"), THOUGHT, [answer("Blue.", "Up.")], [answer("Red!")], False),
    "gpt-oss": (lambda: published.tokenizer("gptoss"), THOUGHT, [answer("Blue.", "Up.")], [answer("Red!")], False),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_both_sides_are_trained_as_an_ordinary_row_would_be(name: str, tmp_path: Path) -> None:
    """Its prompt's answers without weight."""
    make, prompt, chosen, rejected, with_tools = TEMPLATES[name]
    tokenizer = make()
    beside = {"tools": [TOOL]} if with_tools else {}
    found = of(tmp_path, [{"prompt": prompt, "chosen": chosen, "rejected": rejected, **beside}], tokenizer)
    context = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in prompt]
    for side, own in ((C, chosen), (R, rejected)):
        ordinary = all_of(
            tiny.write_jsonl(tmp_path / "sft.jsonl", [{"messages": [*context, *own], **beside}]), tokenizer
        )
        of_side = np.flatnonzero(found.sides == side).tolist()
        assert len(of_side) == len(ordinary)
        for index, wanted in zip(of_side, ordinary, strict=True):
            assert found[index].ids.tolist() == wanted.ids.tolist()
            assert found[index].mask.tolist() == wanted.mask.tolist()
    if name == "qwen3, several turns":  # its template drops the first thought behind a second question
        assert found.sides.tolist() == [C, C, R, R]
        assert collate(found, range(4)).answer_of.tolist() == [0, 0, 1, 1]
    assert {"Hello", "It is blue"}.isdisjoint(" ".join(masks.runs(tokenizer, found[0])).split("."))


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma", "phi3", "glm4moe"])
def test_sides_are_the_tokens_that_transformers_prints_behind_the_prompt_that_it_asks_with(
    name: str, tmp_path: Path
) -> None:
    """The first target is the first token after the prompt, as other trainers of preferences have it; what the template
    prints behind the end of the turn is none.
    """
    tokenizer = published.tokenizer(name)
    prompt, sides = [user("Hi"), answer("Hello."), user("Sky?")], ([answer("Blue.")], [answer("Red or so!")])
    found = of(tmp_path, [{"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}], tokenizer)
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    for example, side in zip(found, sides, strict=True):
        whole = tokenizer.apply_chat_template([*prompt, *side], return_dict=False)
        ids = example.ids.tolist()
        assert ids[: len(whole)] == whole[: len(ids)]
        assert int(example.mask.argmax()) == len(asked)
        behind = ids[int(np.flatnonzero(example.mask)[-1]) + 1 :]
        assert not tokenizer.decode(behind).replace(tokenizer.eos_token, "").strip()


def test_rated_answers_are_trained_both_and_only_where_preferences_are_asked_for(
    tokenizer: Any, tmp_path: Path
) -> None:
    labels = (True, False, None)
    rows = [{"prompt": "Q", "completion": f"A{label}", "label": label} for label in labels]
    found = of(tmp_path, rows, tokenizer)
    assert (found.kind, found.sides.tolist()) == ("rated", [G, B])
    assert [masks.runs(tokenizer, example) for example in found] == [["ATrue<|im_end|>"], ["AFalse<|im_end|>"]]
    assert "1 of 3 rows dropped: nobody rated it (label is null) (line 3)" in found.notes("train", 99)[1]
    ordinary = all_of(tmp_path / "d.jsonl", tokenizer)
    assert (ordinary.kind, len(ordinary), ordinary.sides.tolist()) == ("supervised", 1, [0])


def test_a_pair_is_used_whole_or_not_at_all_and_why_is_said(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        *pairs_of(2),
        {"prompt": "Q", "chosen": "A", "rejected": "A " * 50},
        {"prompt": "Q" * 90, "chosen": "A", "rejected": "B"},
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        {"prompt": "Q", "chosen": "A" * 99, "rejected": "B" * 99},
    ]
    found = of(tmp_path, rows, tokenizer, max_tokens=80)
    assert rows_of(found) == [1, 1, 2, 2]
    assert found.stores[0].facts.rows == 6
    notes = "\n".join(found.notes("train", 80))
    assert "cuts off" not in notes
    for reason in (
        "rejected: the answer ends after data.max_tokens 80, and no answer of a preference is cut (line 3)",
        "no supervised token in the first 80 tokens (line 4)",
        "chosen and rejected are the same (line 5)",
        "1 of 6 rows dropped: the answer ends after data.max_tokens 80, and no answer of a preference is cut (line 6)",
    ):
        assert reason in notes


def test_an_answer_that_ends_where_the_limit_is_stays(tokenizer: Any, tmp_path: Path) -> None:
    """What the template prints behind its end token is not trained, so it may be cut."""
    whole = of(tmp_path, pairs_of(1), tokenizer)
    limit = int(whole.lengths.max())
    assert whole[int(whole.lengths.argmax())].mask[-1] == 0
    found = of(tmp_path, pairs_of(1), tokenizer, max_tokens=limit - 1)
    assert len(found) == 2 and "shortened" not in " ".join(found.notes("train", limit - 1))
    with pytest.raises(
        UserError, match=rf"none of 1 rows can be used; line 1: .* ends after data.max_tokens {limit - 2}"
    ):
        of(tmp_path, pairs_of(1), tokenizer, max_tokens=limit - 2)


def test_answers_that_the_template_prints_alike_are_no_pair(tmp_path: Path) -> None:
    tokenizer = published.tokenizer("gemma")  # which strips what a turn says
    rows = [*pairs_of(1), {"prompt": "Q", "chosen": "A", "rejected": " A "}]
    found = of(tmp_path, rows, tokenizer)
    assert found.rows == 1
    assert "the chat template prints the same for chosen and rejected (line 2)" in " ".join(found.notes("train", 99))


# What chooses among rows.


def test_all_pairs_of_one_prompt_are_held_out_together(tokenizer: Any, tmp_path: Path) -> None:
    rows = []
    for number in range(40):
        rows.append({"prompt": f"Question {number % 10}?", "chosen": f"A{number}", "rejected": "B"})
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    found = read(path, tokenizer, preferences=True, valid_fraction=0.3)
    asked = [{(row - 1) % 10 for row in rows_of(found[split])} for split in ("train", "valid")]
    assert asked[0].isdisjoint(asked[1])
    assert [len(one) for one in asked] == [7, 3]
    assert [found[split].rows for split in ("train", "valid")] == [28, 12]
    assert found["valid"].kind == "pairs"
    section = DataSection(path=str(path), cache="off", valid_fraction=0.3)
    for split, own in found.items():
        shown = holdout.rows_of_split(
            section, 0, split, Renderer(tokenizer, section), lambda *_: None, preferences=True
        )
        assert [row.row for row in shown] == rows_of(own)
    same = tiny.write_jsonl(tmp_path / "same.jsonl", [{**row, "prompt": "Q"} for row in rows])
    with pytest.raises(UserError, match="fewer than two different prompts"):
        read(same, tokenizer, preferences=True)


def test_pairs_are_equal_where_the_prompt_and_both_answers_are(tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    rows = [row, {**row, "rejected": "C"}, {**row, "prompt": "P"}, row, {**row, "chosen": "B", "rejected": "A"}]
    assert rows_of(of(tmp_path, rows, tokenizer, dedup="exact"))[::2] == [1, 2, 3, 5]
    rated = [{"prompt": "Q", "completion": "A", "label": label} for label in (True, False, True)]
    assert rows_of(of(tmp_path, rated, tokenizer, dedup="exact")) == [1, 2]
    words = " ".join(f"word{number}" for number in range(60))
    near = [{**row, "chosen": text} for text in (words, f"{words} more", words.replace("word", "other"))]
    near.append({**row, "chosen": "B", "rejected": words})
    assert rows_of(of(tmp_path, near, tokenizer, dedup="near"))[::2] == [1, 3, 4]


def test_caps_order_and_weights_count_pairs(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{**row, "rank": -number} for number, row in enumerate(pairs_of(12))]
    assert of(tmp_path, rows, tokenizer, cap=5).rows == 5
    draw = np.random.default_rng(0)
    by_rank = of(tmp_path, rows, tokenizer, order="rank").epoch(draw).tolist()
    assert by_rank == list(range(12))[::-1]
    found = of(tmp_path, rows, tokenizer, order="length")
    longest = np.maximum.reduceat(found.lengths, found.firsts)
    assert np.all(np.diff(longest[found.epoch(draw)]) >= 0)
    other = tiny.write_jsonl(tmp_path / "e.jsonl", [{**row, "prompt": f"{row['prompt']}!"} for row in rows])
    given = [{"path": str(tmp_path / "d.jsonl"), "weight": 3}, {"path": str(other), "weight": 1}]
    mixed = mixture.read(DataSection.model_validate({"sources": given, "cache": "off"}), tokenizer, 0, preferences=True)
    train = mixed["train"]
    drawn = np.concatenate([train.sources[train.firsts][train.epoch(draw)] for _ in range(30)])
    assert 0.6 < np.mean(drawn == 0) < 0.9


def test_only_the_last_turn_of_each_side_is_trained_where_that_is_asked_for(tokenizer: Any, tmp_path: Path) -> None:
    row = {"chosen": [user("Q"), answer("A"), user("R"), answer("S")], "rejected": [user("Q"), answer("B")]}
    found = of(tmp_path, [row], tokenizer)
    assert [masks.runs(tokenizer, example) for example in found] == [["A<|im_end|>", "S<|im_end|>"], ["B<|im_end|>"]]
    found = of(tmp_path, [row], tokenizer, train_on="last")
    assert [masks.runs(tokenizer, example) for example in found] == [["S<|im_end|>"], ["B<|im_end|>"]]


def test_sides_are_rendered_once_where_that_is_asked_for(tmp_path: Path) -> None:
    row = {"prompt": "Sky?", "chosen": [answer("Blue.", "Up.")], "rejected": [answer("Red!")]}
    tokenizer = masks.family("qwen")
    found = of(tmp_path, [row], tokenizer, expand_turns="none")
    assert found.sides.tolist() == [C, R]
    ends = [masks.runs(tokenizer, example)[-1] for example in found]
    assert [end.partition("<|im_end|>")[0][-5:] for end in ends] == ["Blue.", "\nRed!"]


def test_turns_of_their_own_examples_are_of_one_answer(tokenizer: Any, tmp_path: Path) -> None:
    talk = [user("Q"), answer("A"), user("R"), answer("S")]
    found = of(tmp_path, [{"chosen": talk, "rejected": [user("Q"), answer("B")]}], tokenizer, expand_turns="all")
    assert found.sides.tolist() == [C, C, R]
    batch = collate(found, range(3))
    assert (batch.answer_of.tolist(), batch.answers, batch.pairs) == ([0, 0, 1], 2, 1)
    assert batch.answer_tokens.tolist() == [4, 2]
    assert batch.whole_parts == [slice(0, 3)]


def test_a_pair_with_one_damaged_side_is_left_out_whole(tokenizer: Any, tmp_path: Path) -> None:
    damaged = {"prompt": "Q", "chosen": [answer("A", "A thought.")], "rejected": "B"}  # ChatML prints no thoughts
    with pytest.raises(UserError, match="the chat template damages 1 of 3 rows: line 3"):
        of(tmp_path, [*pairs_of(2), damaged], tokenizer)
    assert rows_of(of(tmp_path, [*pairs_of(2), damaged], tokenizer, on_damage="drop")) == [1, 1, 2, 2]


def test_files_of_different_kinds_are_not_mixed(tokenizer: Any, tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "one.jsonl", pairs_of(4))
    rated = [{"prompt": f"Q{number}", "completion": "A", "label": True} for number in range(4)]
    tiny.write_jsonl(tmp_path / "two.jsonl", rated)
    given = [{"path": str(tmp_path / f"{name}.jsonl")} for name in ("one", "two")]
    found = mixture.read(DataSection.model_validate({"sources": given, "cache": "off"}), tokenizer, 0, preferences=True)
    with pytest.raises(UserError, match=r"one.jsonl has pairs of .*, but .*two.jsonl has answers rated"):
        _ = found["train"].kind


def test_what_is_cached_depends_on_how_rows_are_read_and_the_digest_on_their_sides(
    tokenizer: Any, tmp_path: Path
) -> None:
    labels = [True, False, True]
    rows = [{"prompt": f"Q{number}", "completion": "A", "label": label} for number, label in enumerate(labels)]
    cache = str(tmp_path / "cache")
    assert of(tmp_path, rows, tokenizer, cache=cache).sides.tolist() == [G, B, G]
    assert all_of(tmp_path / "d.jsonl", tokenizer, cache=cache).sides.tolist() == [0, 0]
    first = of(tmp_path, rows, tokenizer, cache=cache)
    assert first.sides.tolist() == [G, B, G]
    rows[0]["label"] = False
    assert of(tmp_path, rows, tokenizer).digest() != first.digest()
    section = DataSection(path=str(tmp_path / "d.jsonl"))
    tiny.write_jsonl(tmp_path / "d.jsonl", [*rows, {**rows[0], "label": "spam"}])
    sources.require_readable(section, all_rows=True)
    with pytest.raises(UserError, match="label is 'spam'"):
        sources.require_readable(section, all_rows=True, preferences=True)
