"""mlxtune init and what is set by hand: the rest is searched around it; and rows that no settings can train."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
from test_init import FEW, given

from mlxtune.config import resolve
from mlxtune.presets import rules


def test_what_is_set_by_hand_goes_into_the_search_and_what_follows_from_it_follows(
    mlx_model: Path, tmp_path: Path
) -> None:
    words = ("--data", given(tmp_path, "alpaca"), "--model", mlx_model, "--yes", "--memory", "8")
    peaks = {}
    for rank in (8, 256):
        out = tmp_path / f"rank {rank}"
        said = tiny.done("init", out, *words, "--set", f"lora.rank={rank}", "--set", "train.steps=7")
        config = resolve.load(out / "mlxtune.yaml")
        assert (config.lora.rank, config.lora.alpha) == (rank, rules.SCALE * rank)
        text = (out / "mlxtune.yaml").read_text()
        (peaks[rank],) = re.findall(r"Memory: ([^ ]+ .B) predicted at the peak", said.stderr)
        assert f"The fastest that fits: {peaks[rank]} predicted" in " ".join(text.replace("#", " ").split())
        assert config.train.warmup_steps == 1 and config.train.patience == 0 and "epochs:" not in text
    assert peaks[8] != peaks[256]
    tiny.done("init", tmp_path / "own", *words, "--set", "lora.rank=8", "--set", "lora.alpha=4")
    assert resolve.load(tmp_path / "own" / "mlxtune.yaml").lora.alpha == 4
    limit = ("--set", "train.memory_limit=10000000", "--set", "lora.rank=4096")
    refused = tiny.mlxtune("init", tmp_path / "never", *words, *limit)
    tiny.one_clear_line(refused, "does not fit with lora.rank, train.memory_limit as set", "Leave out --set of them")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    "setting",
    [
        "train.batch_rows=3",
        "train.batch_tokens=600",
        "train.checkpoint_layers=3",
        "train.accumulate=2",
        "train.epochs=0.5",
        "data.max_tokens=64",
        "train.patience=0",
    ],
)
def test_any_setting_by_hand_is_kept_with_its_memory_told(setting: str, mlx_model: Path, tmp_path: Path) -> None:
    words = ("--data", given(tmp_path, "alpaca"), "--model", mlx_model, "--yes", "--memory", "8")
    said = tiny.done("init", tmp_path / "out", *words, "--set", setting)
    assert "predicted at the peak" in said.stderr
    key, _, value = setting.partition("=")
    section, _, name = key.partition(".")
    kept = getattr(getattr(resolve.load(tmp_path / "out" / "mlxtune.yaml"), section), name)
    assert kept == float(value)


@pytest.mark.parametrize(
    ("damaged", "settings", "said"),
    [
        (None, (), ("none of 16 train rows can be used: dropped: no assistant turn (16)", "mlxtune data show")),
        (20, (), ("damages 16 of 16 train rows", "data.on_damage=keep")),
        (5, (), ("train rows, and train stops at them", "data.on_damage=drop")),
        (20, ("--set", "data.on_damage=drop"), ("none of 16 train rows can be used: damaged by the chat template",)),
        (20, ("--set", "data.on_damage=keep"), ()),
        (5, ("--set", "data.on_damage=drop"), ()),
    ],
)
def test_rows_that_train_stops_at_make_no_project(
    damaged: int | None, settings: tuple[str, ...], said: tuple[str, ...], mlx_model: Path, tmp_path: Path
) -> None:
    rows = tiny.conversations(20)
    for row in rows[:damaged] if damaged else rows:
        if damaged is None:
            row["messages"].pop()
        else:
            row["tools"] = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    words = ("init", tmp_path / "out", "--data", file, "--model", mlx_model, "--yes", *FEW, *settings)
    if said:
        tiny.one_clear_line(tiny.mlxtune(*words), *said)
        assert not (tmp_path / "out").exists()
    else:
        tiny.done(*words)
        tiny.done("train", "-c", tmp_path / "out" / "mlxtune.yaml", "--data", tmp_path / "out" / "data", "--dry-run")
