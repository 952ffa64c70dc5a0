"""Rows stay what people count in: caps, weights, held-out shares and notes, however many examples a row gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import masks
import numpy as np
import pytest
import tiny
from reading import ASKED, all_of, read, rows_of, shown

from mlxtune.config.schema import DataSection
from mlxtune.data.dataset import holdout, mixture
from mlxtune.data.dataset.examples import Examples
from mlxtune.data.rows import formats
from mlxtune.data.template.tokenizer import load_tokenizer
from mlxtune.errors import UserError


def conversation(name: str, turns: int) -> dict[str, Any]:
    """With `data.expand_turns=all` an example for each of its turns."""
    said = [[("user", f"{name} asks {turn}"), ("assistant", f"{name} says {turn}")] for turn in range(turns)]
    return {"messages": [{"role": role, "content": text} for pair in said for role, text in pair]}


def expanded(path: Path, tokenizer: Any, seed: int = 0, **options: Any) -> Examples:
    """All rows of a file, one example per turn."""
    return read(path, tokenizer, seed, True, **{"expand_turns": "all", **options})["train"]


def mixed(sources: list[dict[str, Any]], tokenizer: Any, **options: Any) -> dict[str, Examples]:
    section = DataSection(**{"sources": sources, "cache": "off", "expand_turns": "all", **options})
    return mixture.read(section, tokenizer, 2)


def turns_of(found: Examples) -> dict[int, int]:
    """How many examples each line of a file gave."""
    lines, counts = np.unique(found.column("row"), return_counts=True)
    return dict(zip(lines.tolist(), counts.tolist(), strict=True))


def test_examples_know_their_rows(tokenizer: Any, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [conversation(str(turns), turns) for turns in (2, 1, 3)])
    found = expanded(path, tokenizer)
    assert found.row_of.tolist() == [0, 0, 1, 2, 2, 2]
    assert (found.rows, len(found), found.also) == (3, 6, " (6 examples)")
    fewer = found.only(np.array([False, True, False, True, False, True]))
    assert (fewer.row_of.tolist(), fewer.rows) == ([0, 1, 1], 2)
    assert all_of(path, tokenizer).also == ""


def test_equal_rows_of_several_files_and_the_instances_of_one_line_are_rows_of_their_own(
    tokenizer: Any, tmp_path: Path
) -> None:
    instances = [{"input": "", "output": "A"}, {"input": "", "output": "A"}, {"input": "I", "output": "B"}]
    tiny.write_jsonl(tmp_path / "train-0.jsonl", [conversation("a", 2), conversation("a", 2)])
    tiny.write_jsonl(tmp_path / "train-1.jsonl", [{"instruction": "Q", "instances": instances}])
    tiny.write_jsonl(tmp_path / "train-2.jsonl", [conversation("a", 2)])
    tiny.write_jsonl(tmp_path / "valid.jsonl", [{"text": "v"}])
    found = read(tmp_path, tokenizer, expand_turns="all")["train"]
    assert found.row_of.tolist() == [0, 0, 1, 1, 2, 3, 4, 5, 5]


def test_rows_are_told_apart_however_few_are_tokenized_together(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [conversation("a", 2)] * 3 + [conversation("b", 2)] * 2)
    for size in (1, 2, 128):
        monkeypatch.setattr(formats, "CHUNK_ROWS", size)
        assert expanded(path, tokenizer).row_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_cap_counts_rows(tokenizer: Any, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [conversation(f"c{row}", 1 + row % 4) for row in range(20)])
    found = expanded(path, tokenizer, cap=6)
    assert found.rows == 6
    assert all(count == 1 + (line - 1) % 4 for line, count in turns_of(found).items())
    assert "train: 14 rows left out: beyond the cap of 6 of d.jsonl" in found.notes("train", 99)


@pytest.mark.parametrize("kind", ["exact", "near"])
def test_equal_rows_go_whole_and_are_counted_once(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = [conversation(name, 3) for name in ("alpha", "beta", "alpha")]
    found = expanded(tiny.write_jsonl(tmp_path / "d.jsonl", rows), tokenizer, dedup=kind)
    assert turns_of(found) == {1: 3, 2: 3}
    what = "duplicates" if kind == "exact" else "equal or near duplicates"
    assert f"train: 1 rows left out: {what}" in found.notes("train", 99)


def test_a_weight_draws_rows(tokenizer: Any, tmp_path: Path) -> None:
    """A source of 5 turns a row and one of 1 turn, drawn as often as each other: 5 examples of 6 are of the first."""
    long = tiny.write_jsonl(tmp_path / "long.jsonl", [conversation(f"long {row}", 5) for row in range(200)])
    short = tiny.write_jsonl(tmp_path / "short.jsonl", [conversation(f"short {row}", 1) for row in range(200)])
    found = mixed([{"path": str(long), "weight": 1}, {"path": str(short), "weight": 1}], tokenizer)["train"]
    source = found.sources[found.firsts]
    drawn = np.concatenate([source[found.epoch(np.random.default_rng(epoch))] for epoch in range(20)])
    assert len(drawn) == 20 * found.rows
    assert drawn.mean() == pytest.approx(0.5, abs=0.02)  # 7200 draws: a standard deviation of 0.006


def test_short_rows_first_goes_by_the_longest_example_of_each(tokenizer: Any, tmp_path: Path) -> None:
    rows = [conversation("c", 3), {"messages": ASKED}, conversation("a rather long name", 2), conversation("b", 2)]
    found = expanded(tiny.write_jsonl(tmp_path / "d.jsonl", rows), tokenizer, order="length")
    longest = [max(found.lengths[found.row_of == row]) for row in range(4)]
    assert found.epoch(np.random.default_rng(0)).tolist() == sorted(range(4), key=longest.__getitem__) == [1, 3, 0, 2]


def test_a_mixture_of_rows_with_one_example_each_stays_what_it_was(tokenizer: Any, tmp_path: Path) -> None:
    """Choices and orders as they were when a row was one example: runs of then can be resumed."""
    texts = [{"text": "word " * (1 + number * 7 % 11) + str(number), "hard": -number} for number in range(40)]
    a = tiny.write_jsonl(tmp_path / "a.jsonl", texts)
    b = tiny.write_jsonl(tmp_path / "b.jsonl", [{"text": f"other {number}", "hard": number} for number in range(15)])
    orders = {}
    for order in ("shuffled", "length", "hard"):
        found = mixed([{"path": str(a), "weight": 3, "cap": 30}, {"path": str(b), "weight": 1}], tokenizer, order=order)
        assert rows_of(found["valid"]) == [21, 27, 33, 34]
        assert found["train"].column("row")[:8].tolist() == [1, 2, 3, 6, 7, 8, 9, 10]
        orders[order] = found["train"].epoch(np.random.default_rng([2, 0])).tolist()
    assert {order: taken[:16] for order, taken in orders.items()} == {
        "shuffled": [24, 23, 7, 5, 32, 6, 33, 3, 9, 25, 12, 27, 10, 34, 14, 38],
        "length": [0, 32, 33, 9, 27, 34, 16, 28, 26, 38, 37, 39, 40, 6, 6, 23],
        "hard": [25, 24, 24, 23, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12],
    }
    capped = read(a, tokenizer, seed=2, cap=12)
    assert rows_of(capped["train"]) == [1, 6, 8, 9, 14, 17, 21, 22, 24, 33, 38]
    assert rows_of(capped["valid"]) == [34]


def test_shortened_and_dropped_turns_are_told_by_rows(tokenizer: Any, tmp_path: Path) -> None:
    """Turns 2 and 3 of the second row begin beyond the limit, and so do both of the fourth."""
    long, longer = conversation("long " * 12, 3), conversation("longer " * 40, 2)
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [conversation("a", 1), long, {"messages": ASKED[:1]}, longer])
    whole = expanded(path, tokenizer)
    limit = int(whole.lengths[1]) - 4  # in the end of the long row's first turn
    notes = expanded(path, tokenizer, max_tokens=limit).notes("train", limit)
    kept = int(whole.lengths[0]) + limit
    assert notes == [
        f"train: 2 conversations, 2 turns, 2 examples: {kept} tokens, 1.00 times those of the rows rendered once; "
        "data.expand_turns=none would train the same",
        f"train: 1 of 2 rows shortened to data.max_tokens {limit} (start kept)",
        "train: 1 of 4 rows dropped: no assistant turn (line 3)",
        f"train: 1 of 4 rows dropped: no supervised token in the first {limit} tokens (line 4)",
        "train: in d.jsonl, 5 x a turn that data.max_tokens cuts off, whole or its end (rows 2, 4)",
        f"train: 2 turns of 1 of 4 rows dropped: no supervised token in the first {limit} tokens",
    ]


REFUSING = (
    "{% for m in messages %}{% if 'refuse' in m['content'] %}{{ raise_exception('not this') }}{% endif %}{% endfor %}"
    + tiny.CHATML
)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [2, 7])
def test_a_row_that_can_be_used_is_held_out_whatever_is_refused(
    seed: int, count: int, tokenizer: Any, tmp_path: Path
) -> None:
    """Of 12 rows the template refuses some; a tenth of the others is one row, whole."""
    tokenizer.chat_template = REFUSING
    rows = [conversation(f"{'refuse' if row >= count else 'take'} {row}", 1 + row % 3) for row in range(12)]
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    found = read(path, tokenizer, seed, expand_turns="all")
    assert (found["train"].rows, found["valid"].rows) == (count - 1, 1)
    assert {**turns_of(found["train"]), **turns_of(found["valid"])} == {1 + row: 1 + row % 3 for row in range(count)}
    assert any(f"{12 - count} of 12 rows dropped: " in note for note in found["train"].notes("train", 99))


def test_rows_that_training_leaves_out_for_damage_are_not_held_out(tokenizer: Any, tmp_path: Path) -> None:
    """Eleven of thirteen rows hold a tool call that the template drops."""
    call = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {}}}
    calls = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "5"}
    rows = [{"messages": [{"role": "user", "content": f"Q{row}"}, calls, result, ASKED[1]]} for row in range(11)]
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [*rows, *tiny.conversations(2)])
    for seed in range(8):
        found = read(path, tokenizer, seed, on_damage="drop")
        assert sorted(rows_of(found["train"]) + rows_of(found["valid"])) == [12, 13]
    assert "train: 11 rows left out: damaged by the chat template" in found["train"].notes("train", 99)


def test_one_usable_row_is_too_few_and_the_refused_are_named(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = REFUSING
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [conversation(name, 1) for name in ("take", "refuse a", "refuse b")])
    with pytest.raises(
        UserError, match=r"fewer than two different rows, too few to hold any out \(dropped: .*not this"
    ):
        read(path, tokenizer)


@pytest.mark.parametrize(("fraction", "held"), [(0.01, 1), (0.5, 2), (0.6, 2), (0.99, 3)])
def test_some_rows_are_held_out_and_some_are_not(fraction: float, held: int) -> None:
    """Of four different rows, one of them twice."""
    hashes = np.array([11, 22, 33, 44, 11], np.uint64)
    limit = holdout.limit(hashes, fraction, seed=0)
    assert len(set(hashes[holdout.seeded(hashes, 0) <= limit].tolist())) == held


def test_a_source_loses_its_duplicates_then_what_is_beyond_its_cap_and_then_what_is_held_out(
    tokenizer: Any, tmp_path: Path
) -> None:
    """Twelve rows, three equal to others, and a cap of five, beside a folder of 20 and 4: as `mixture` shows."""
    chat = [conversation(f"c{row % 9}", 1) for row in range(12)]
    tiny.write_jsonl(tmp_path / "chat.jsonl", chat)
    (tmp_path / "texts").mkdir()
    for split, count in (("train", 20), ("valid", 4)):
        rows = [conversation(f"{split} {row}", 1) for row in range(count)]
        tiny.write_jsonl(tmp_path / "texts" / f"{split}.jsonl", rows)
    sources = [{"path": str(tmp_path / "chat.jsonl"), "cap": 5}, {"path": str(tmp_path / "texts")}]
    found = mixed(sources, tokenizer, dedup="exact")
    assert np.bincount(found["train"].sources).tolist() == [4, 20]
    assert [Path(store.facts.file).name for store in found["valid"].stores][:2] == ["valid.jsonl", "chat.jsonl"]
    assert found["valid"].rows == 5
    assert found["train"].left_out == {"duplicates": "3 rows", "beyond the cap of 5 of chat.jsonl": "4 rows"}


@pytest.mark.parametrize("hashes", [[], [7], [7, 7]])
def test_nothing_is_held_out_of_fewer_than_two_different_rows(hashes: list[int]) -> None:
    assert holdout.limit(np.array(hashes, np.uint64), 0.5, seed=0) is None


@pytest.mark.parametrize("seed", [0, 5])
def test_data_show_and_training_hold_out_the_same_of_the_rows_that_can_be_used(
    seed: int, tokenizer: Any, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Half of the rows have no answer: which of the others are held out depends on them in neither."""
    rows = [conversation(f"c{row}", 1 + row % 3) for row in range(30)]
    for row in rows[::2]:
        row["messages"] = row["messages"][:1]
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    found = read(path, tokenizer, seed, valid_fraction=0.2, expand_turns="all")
    assert (found["train"].rows, found["valid"].rows) == (12, 3)
    for split in ("train", "valid"):
        done = tiny.mlxtune(
            "data", "show", "--model", tokenizer_folder, "--data", path, "--split", split, "--json",
            *("--set", "data.valid_fraction=0.2", "--set", f"train.seed={seed}", "--set", "data.expand_turns=all"),
            *("--set", f"data.cache={tmp_path / 'cache'}"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told = list(map(json.loads, done.stdout.splitlines()))
        assert [row["row"] for row in told if "dropped" not in row] == rows_of(found[split])
    assert len(list((tmp_path / "cache").iterdir())) == 1  # made once, as training would have it


def test_data_show_splits_a_file_that_training_refuses(tokenizer_folder: Path, tmp_path: Path) -> None:
    """One with a row that cannot be read, one of such rows alone, and one without an answer: every other row is on one
    side.
    """
    answered, questions = (
        tiny.conversations(10),
        [{"messages": ASKED[:1]}, {"messages": [{**ASKED[0], "content": "R"}]}],
    )
    bad = [{"text": 7}, {"text": 8}]
    for rows, unreadable in (([*answered, bad[0]], 1), (bad, 2), (questions, 0)):
        path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
        seen: list[int] = []
        for split in ("train", "valid"):
            done = tiny.mlxtune("data", "show", "--model", tokenizer_folder, "--data", path, "--split", split, "--json")
            assert done.returncode == 0, done.stderr
            seen += [json.loads(line)["row"] for line in done.stdout.splitlines()]
        assert sorted(set(seen)) == list(range(1, len(rows) + 1))
        assert len(seen) == len(rows) + unreadable  # those that cannot be read are told of in both


def test_thinking_that_is_stripped_makes_examples_and_not_rows(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = masks.source("qwen")
    rows = [conversation(f"c{row}", 3) for row in range(10)]
    for row in rows[:5]:
        for message in row["messages"][1::2]:
            message["reasoning_content"] = "Hm."
    found = read(tiny.write_jsonl(tmp_path / "d.jsonl", rows), tokenizer, valid_fraction=0.3)
    assert (found["train"].rows + found["valid"].rows, found["valid"].rows) == (10, 3)
    assert len(found["train"]) + len(found["valid"]) == len(shown(found["train"], tokenizer)) + len(found["valid"])
    assert len(found["train"]) + len(found["valid"]) >= 5 * 3 + 5


def test_a_run_says_how_many_rows_and_how_many_examples(mlx_model: Path, tmp_path: Path) -> None:
    """Ten rows of three turns; three steps of four rows."""
    path = tiny.write_jsonl(tmp_path / "train.jsonl", [conversation(f"c{row}", 3) for row in range(10)])
    tiny.write_jsonl(tmp_path / "valid.jsonl", [conversation("v", 2), conversation("w", 1)])
    flags = (
        "--model",
        mlx_model,
        "--data",
        path.parent,
        "--set",
        "data.expand_turns=all",
        "--set",
        "train.batch_rows=4",
    )
    plan = tiny.mlxtune("train", *flags, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert "rows: 10 to train on (30 examples), 2 held out (3 examples)" in plan.stdout
    assert "optimizer steps: 3\n" in plan.stdout
    done = tiny.mlxtune("train", *flags, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "10 training rows (30 examples), 2 held out (3 examples), 3 steps" in done.stderr
    lines = map(json.loads, (tmp_path / "run/events.jsonl").read_text().splitlines())
    trained = [event["supervised_tokens"] for event in lines if event["kind"] == "train"]
    targets = all_of(path, load_tokenizer(mlx_model), expand_turns="all").column("targets")
    assert len(trained) == 3 and sum(trained) == targets.sum()


def test_data_check_counts_rows(mlx_model: Path, tmp_path: Path) -> None:
    """Nine rows of one to three turns and a question alone: steps of four rows, however many examples they have."""
    rows = [*(conversation(f"c{row}", 1 + row % 3) for row in range(9)), {"messages": ASKED[:1]}]
    path = tiny.write_jsonl(tmp_path / "train.jsonl", rows)
    done = tiny.mlxtune(
        "data", "check", "--model", mlx_model, "--data", path, "--json", "--set", "data.expand_turns=all"
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["splits"]["train"]
    assert (told["rows"], told["examples"], told["held_out"], told["steps_per_epoch"]) == (10, 18, 1, 2)
    assert told["outcomes"] == {"used": 9, "dropped: no assistant turn": 1}
