"""Tokenized rows on disk, and the rows held out: both independent of everything that should not matter."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import masks
import numpy as np
import pytest
import tiny
from reading import ASKED, all_of, read, rows_of, shown

from mlxtune.config.schema import DataSection
from mlxtune.data.chat import renderer
from mlxtune.data.dataset import row_cache, store
from mlxtune.data.rows import formats
from mlxtune.data.template.tokenizer import load_tokenizer
from mlxtune.errors import UserError


def texts_file(folder: Path, count: int = 6) -> Path:
    return tiny.write_jsonl(folder / "d.jsonl", [{"text": f"row {number}"} for number in range(count)])


def test_the_second_read_tokenizes_nothing(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = texts_file(tmp_path), tmp_path / "cache"
    first = all_of(path, tokenizer, cache=str(cache))
    calls = []
    real = renderer.Renderer.stream
    monkeypatch.setattr(renderer.Renderer, "stream", lambda self, rows: calls.append(len(rows)) or real(self, rows))
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


def test_what_data_show_tokenizes_with_a_chosen_template_is_what_training_would(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    path, cache = tiny.write_jsonl(tmp_path / "d.jsonl", mixed_rows()), tmp_path / "cache"
    settings = ("--set", "data.template=alpaca", "--set", f"data.cache={cache}")
    tiny.done("data", "show", "--model", tokenizer_folder, "--data", path, "--split", "valid", *settings)
    assert len(list(cache.iterdir())) == 1
    all_of(path, load_tokenizer(tokenizer_folder), cache=str(cache), template="alpaca")
    assert len(list(cache.iterdir())) == 1


def test_the_store_keeps_what_the_renderer_made(tokenizer: Any, tmp_path: Path) -> None:
    rows = [*tiny.conversations(5), {"messages": ASKED[:1]}]
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    section = DataSection(path=str(path), cache=str(tmp_path / "cache"))
    made = [row.example for row in renderer.Renderer(tokenizer, section).rows(list(formats.read(path)))]
    found = all_of(path, tokenizer, cache=section.cache)
    for own, kept in zip([example for example in made if example], found, strict=True):
        assert list(own.ids) == kept.ids.tolist()
        assert list(own.mask) == kept.mask.tolist()
    assert found.highest == max(max(example.ids) for example in found)
    assert found.lengths.tolist() == [len(example.ids) for example in found]
    assert row_cache.cache_folder(section) == tmp_path / "cache"


def signed(folder: Path, **facts: Any) -> None:
    """Change facts.json so, and make its digest of the columns and of itself right again."""
    found = json.loads((folder / "facts.json").read_text()) | facts
    found["beside"] = store.digest_beside(folder, found)
    (folder / "facts.json").write_text(json.dumps(found))


def changed_ids(folder: Path) -> None:
    """Other tokens of the model: nothing but the digest can tell."""
    ids = np.fromfile(folder / "ids.bin", np.int32)
    ids[:] = 77
    ids.tofile(folder / "ids.bin")


def ids_of_no_model(folder: Path) -> None:
    """facts.json still calls a small number the highest: an embedding would be read far outside of its matrix."""
    np.full(len(np.fromfile(folder / "ids.bin", np.int32)), 2_000_000_000, np.int32).tofile(folder / "ids.bin")


def highest_of_facts(folder: Path) -> None:
    signed(folder, highest=3)


def facts_of_another_type(folder: Path) -> None:
    facts = json.loads((folder / "facts.json").read_text())
    (folder / "facts.json").write_text(json.dumps(facts | {"counts": []}))


def other_targets(folder: Path) -> None:
    columns = np.fromfile(folder / "columns.bin", store.COLUMNS)
    columns["targets"] += 1
    columns.tofile(folder / "columns.bin")


def pipe(folder: Path) -> None:
    (folder / "signature.bin").unlink()
    os.mkfifo(folder / "signature.bin")


def cut(name: str, by: int) -> tiny.Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-by])


def lengths_below_zero(folder: Path) -> None:
    columns = np.fromfile(folder / "columns.bin", store.COLUMNS)
    columns["length"][:2] += [-1000, 1000]
    columns.tofile(folder / "columns.bin")
    signed(folder)


@pytest.mark.parametrize(
    "change",
    [
        changed_ids,
        ids_of_no_model,
        highest_of_facts,
        lengths_below_zero,
        facts_of_another_type,
        other_targets,
        pipe,
        cut("ids.bin", 1),
        cut("ids.bin", 8),
        cut("mask.bin", 1),
        cut("columns.bin", 5),
        cut("columns.bin", store.COLUMNS.itemsize),
        cut("facts.json", 9),
        lambda folder: (folder / "facts.json").write_text("[" * 100_000),
        lambda folder: (folder / "facts.json").write_text("{}"),
        tiny.remove("mask.bin"),
    ],
)
def test_a_store_that_does_not_hold_what_was_written_is_made_again(
    change: tiny.Change, tokenizer: Any, tmp_path: Path
) -> None:
    path, cache = texts_file(tmp_path), tmp_path / "cache"
    first = all_of(path, tokenizer, cache=str(cache))
    wanted, targets = shown(first, tokenizer), first.column("targets").tolist()
    (folder,) = cache.iterdir()
    change(folder)
    again = all_of(path, tokenizer, cache=str(cache))
    assert shown(again, tokenizer) == wanted and again.highest < 320
    assert again.column("targets").tolist() == targets
    assert store.is_as_written(folder, store.open_store(folder))


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_cache_that_others_may_write_to_is_not_used(mode: int, tokenizer: Any, tmp_path: Path) -> None:
    path, cache = texts_file(tmp_path), tmp_path / "cache"
    cache.mkdir()
    cache.chmod(mode)
    assert len(all_of(path, tokenizer, cache=str(cache))) == 6
    assert list(cache.iterdir()) == []


def test_a_cache_is_made_for_its_owner_alone(tokenizer: Any, tmp_path: Path) -> None:
    all_of(texts_file(tmp_path), tokenizer, cache=str(tmp_path / "cache"))
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_only_stores_of_ours_are_removed_from_a_cache_when_they_are_old(tokenizer: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    all_of(texts_file(tmp_path), tokenizer, cache=str(cache))
    (old,) = cache.iterdir()
    others = {
        "thesis": ("facts.json", "chapter1.doc"),
        "0" * 32: ("facts.json", "notes.txt"),
        "1" * 32: ("facts.json",),
        "2" * 31: ("facts.json", "ids.bin", "mask.bin", "columns.bin", "signature.bin"),
    }
    for name, inside in others.items():
        (cache / name).mkdir()
        for file in inside:
            (cache / name / file).write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (cache / ("3" * 32)).symlink_to(tmp_path / "elsewhere")
    for folder in cache.iterdir():
        os.utime(folder, (0, 0))
    all_of(texts_file(tmp_path, 7), tokenizer, cache=str(cache))
    assert not old.exists()
    left = {path.name for path in cache.iterdir()}
    assert {*others, "3" * 32} < left and len(left) == len(others) + 2
