"""Tokenized rows on disk, and the rows held out: both independent of everything that should not matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import masks
import pytest
import tiny
from reading import ASKED, all_of, read, rows_of, shown

from mlxtune.data import examples, records, store
from mlxtune.errors import UserError
from mlxtune.sections import DataSection


def texts_file(folder: Path, count: int = 6) -> Path:
    return tiny.write_jsonl(folder / "d.jsonl", [{"text": f"row {number}"} for number in range(count)])


def test_the_second_read_tokenizes_nothing(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = texts_file(tmp_path), tmp_path / "cache"
    first = all_of(path, tokenizer, cache=str(cache))
    calls = []
    real = examples.Renderer.stream
    monkeypatch.setattr(examples.Renderer, "stream", lambda self, rows: calls.append(len(rows)) or real(self, rows))
    again = all_of(path, tokenizer, cache=str(cache))
    assert calls == []
    assert (shown(again, tokenizer), again.digest()) == (shown(first, tokenizer), first.digest())
    for change in ({"max_tokens": 9}, {"columns": {"text": "text"}}, {"order": "length"}, {"dedup": "near"}):
        before = len(calls)
        all_of(path, tokenizer, cache=str(cache), **change)
        assert len(calls) > before, change
    texts_file(tmp_path, 7)
    assert len(all_of(path, tokenizer, cache=str(cache))) == 7
    before = len(calls)
    tokenizer.chat_template = masks.source("qwen")
    all_of(path, tokenizer, cache=str(cache))
    assert len(calls) > before


def test_the_cache_changes_with_the_day_only_where_the_template_prints_it(tokenizer: Any, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"messages": ASKED}])
    cache = tmp_path / "cache"
    for template, stores in ((tiny.CHATML, 1), ("{{ strftime_now('%d %b') }}" + tiny.CHATML, 3)):
        tokenizer.chat_template = template
        found = [
            all_of(path, tokenizer, cache=str(cache), date=day)[0].ids.tolist() for day in ("2024-01-02", "2025-03-04")
        ]
        assert len(list(cache.iterdir())) == stores
        assert (found[0] == found[1]) == (stores == 1)


def test_no_cache_leaves_nothing_and_an_unwritable_one_is_no_error(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = texts_file(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    found = all_of(path, tokenizer)
    assert len(found) == 6
    del found
    assert not (tmp_path / "xdg").exists()
    assert list((tmp_path / "temporary").iterdir()) == []
    assert len(all_of(path, tokenizer, cache=str(path / "below-a-file"))) == 6
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    assert len(all_of(path, tokenizer, cache="auto")) == 6


def test_a_failed_read_leaves_no_half_store(tokenizer: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(UserError):
        all_of(tiny.write_jsonl(tmp_path / "d.jsonl", [{"text": "a"}, {"text": 7}]), tokenizer, cache=str(cache))
    assert list(cache.iterdir()) == []


def mixed_rows() -> list[dict[str, Any]]:
    """Sixty rows, each content twice; every fifth has no answer and is dropped."""
    rows = []
    for number in range(60):
        messages = [{"role": "user", "content": f"Q{number % 30}"}, {"role": "assistant", "content": "A"}]
        rows.append({"messages": messages[:1] if number % 5 == 0 else messages})
    return rows


def test_equal_rows_are_held_out_together_whatever_the_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    rows = mixed_rows()
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    found = read(path, tokenizer, valid_fraction=0.2)
    contents = [{json.dumps(rows[number - 1]) for number in rows_of(found[name])} for name in ("train", "valid")]
    assert contents[0].isdisjoint(contents[1])
    assert len(rows_of(found["train"])) + len(rows_of(found["valid"])) == 48
    other = masks.with_template(masks.piece_tokenizer(["<s>", "</s>"]), masks.source("bare"), "</s>")
    assert rows_of(read(path, other, valid_fraction=0.2)["valid"]) == rows_of(found["valid"])


@pytest.mark.parametrize("seed", [0, 3])
def test_data_show_splits_as_training_does(seed: int, tokenizer: Any, tokenizer_folder: Path, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", mixed_rows())
    found = read(path, tokenizer, seed, valid_fraction=0.2)
    for split in ("train", "valid"):
        done = tiny.mlxtune(
            "data", "show", "--model", tokenizer_folder, "--data", path, "--split", split, "--json",
            "--set", "data.valid_fraction=0.2", "--set", f"train.seed={seed}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows = list(map(json.loads, done.stdout.splitlines()))
        assert [row["row"] for row in rows if "dropped" not in row] == rows_of(found[split])


def test_the_store_keeps_what_the_renderer_made(tokenizer: Any, tmp_path: Path) -> None:
    rows = [*tiny.conversations(5), {"messages": ASKED[:1]}]
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    section = DataSection(path=str(path), cache=str(tmp_path / "cache"))
    made = [row.example for row in examples.Renderer(tokenizer, section).rows(list(records.read(path)))]
    found = all_of(path, tokenizer, cache=section.cache)
    for own, kept in zip([example for example in made if example], found, strict=True):
        assert list(own.ids) == kept.ids.tolist()
        assert list(own.mask) == kept.mask.tolist()
    assert found.highest == max(max(example.ids) for example in found)
    assert found.lengths.tolist() == [len(example.ids) for example in found]
    assert store.cache_folder(section) == tmp_path / "cache"
