"""The predicted peak against MLX's own count, and a run made to fit its memory."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import peaks
import pytest
import tiny
from peaks import examples
from ways import batch, make

from mlxtune.compute import fit_memory, proof
from mlxtune.compute.fit_memory import Given
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.compute.prefix import forest_of_batch
from mlxtune.compute.smaller_settings import smaller_settings
from mlxtune.config import resolve as configuration
from mlxtune.config.resolve import TrainSection
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import Plan, collate
from mlxtune.data.dataset.measured import ListedExamples
from mlxtune.errors import UserError
from mlxtune.train import preparation
from mlxtune.train.run_data import read_data

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
HEAD_OF_ITS_OWN = {"tie_word_embeddings": False, "vocab_size": 16384}
CAPPED = {
    "vocab_size": 16384,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 32,
    "hidden_activation": "gelu_pytorch_tanh",
}
SETTINGS: list[tuple[str, dict[str, Any], tuple[str, ...], int]] = [
    ("llama", {}, ("train.batch_rows=4",), 0),
    ("llama", {}, ("train.batch_rows=8", "train.checkpoint_layers=all"), 0),
    ("llama", {"tie_word_embeddings": False}, ("train.batch_tokens=1024", "fast.prefix=off", "lora.rank=64"), 0),
    ("llama", {}, ("train.batch_rows=8",), 4),
    ("qwen2", {"vocab_size": 16384}, ("train.batch_rows=4", "train.checkpoint_layers=2"), 0),
    ("qwen3", {}, ("train.batch_rows=2", "fast.head=off", "fast.prefix=off"), 0),
    ("gemma3_text", {"hidden_activation": "gelu", "sliding_window_pattern": 2, "sliding_window": 64}, (), 0),
    ("llama", {}, ("lora.dropout=0.1", "train.batch_rows=4"), 4),
    # With the last block's end left out too, the peak is the way forward through a frozen block, which is predicted up
    # to a quarter too high: how far MLX's threads lag behind there is not known.
    ("llama", {}, ("lora.layers=1", "train.batch_rows=4", "fast.last_block=off"), 0),
    ("llama", {}, ("lora.layers=2", "train.batch_rows=4", "train.epochs=2", "fast.prefix=off"), 0),
    # Of a trained head the chunks' gradients wait; of a capped one the logits are there more often.
    ("llama", HEAD_OF_ITS_OWN, ("train.batch_rows=8", "lora.train_also=[head]"), 0),
    ("llama", HEAD_OF_ITS_OWN, ("train.batch_rows=8", "lora.train_also=[head]", "train.checkpoint_layers=all"), 0),
    ("gemma2", CAPPED, ("train.batch_rows=4",), 0),
]


@pytest.mark.parametrize(("kind", "changes", "settings", "bits"), SETTINGS)
def test_the_predicted_peak_is_within_15_percent_of_the_measured_one(
    kind: str, changes: dict[str, Any], settings: tuple[str, ...], bits: int
) -> None:
    sizes = {"model_type": kind, **SIZES, **changes}
    predicted, measured = peaks.of_step(sizes, settings, examples(), bits)
    assert predicted.total == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("settings", [(), ("train.checkpoint_layers=all",)], ids=str)
def test_the_peak_of_trunks_and_branches_is_within_15_percent_too(settings: tuple[str, ...]) -> None:
    rows = peaks.conversation()
    assert forest_of_batch(collate(rows, range(len(rows))), 0).computed < 0.5 * sum(len(row.ids) for row in rows)
    predicted, measured = peaks.of_step({"model_type": "llama", **SIZES}, ("train.batch_rows=8", *settings), rows)
    assert predicted.total == pytest.approx(measured, rel=0.15)


def test_the_peak_with_every_second_block_checkpointed_is_not_predicted_too_low() -> None:
    settings = ("train.batch_rows=8", "train.checkpoint_layers=2")
    predicted, measured = peaks.of_step({"model_type": "llama", **SIZES}, settings, examples())
    assert 0.97 * measured < predicted.total < 1.25 * measured


def test_no_mask_waits_for_python_to_collect_cycles() -> None:
    """This family computes its masks: of the whole row and of each piece, again in every step."""
    model = make("gemma2")
    way, found = Way(Split(model, "model", 320), queries=128, recompute=1, tokens=128), batch(0, [512])
    proof.sums_of(model, way, found)
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        proof.sums_of(model, way, found)
        assert mx.get_active_memory() - before < 128 * 128  # bytes of the smallest one
    finally:
        gc.enable()


def tiny_run(mlx_model: Path, data: Path, *settings: str) -> configuration.Config:
    flags = {"model.path": str(mlx_model), "data.path": str(data)}
    return configuration.load(None, ("train.batch_rows=4", *settings), flags)


def test_a_run_is_made_to_fit_by_checkpointing_and_then_by_smaller_micro_batches(mlx_model: Path, data: Path) -> None:
    """The optimizer step keeps its rows: half the rows, twice the micro-batches."""
    resolved = tiny_run(mlx_model, data)
    found, _ = read_data(resolved)
    asked = preparation.plan(resolved, found)
    assert (asked.config, asked.notes) == (resolved, ["exports of llama: hf, peft, gguf, gguf-lora"])
    smaller = ("train.batch_rows=2", "train.accumulate=2", "train.checkpoint_layers=all")
    allowed = preparation.plan(tiny_run(mlx_model, data, *smaller), found).memory.total
    planned = preparation.plan(tiny_run(mlx_model, data, f"train.memory_limit={allowed}"), found)
    section = planned.config.train
    assert planned.memory.total <= allowed
    assert section.checkpoint_layers == "all"
    assert section.batch_rows * section.accumulate == 4 > section.batch_rows
    assert planned.plan.section == section
    assert "train.checkpoint_layers=all" in planned.notes[-1]
    anything = preparation.plan(tiny_run(mlx_model, data, "train.memory_limit=off"), found)
    assert anything.config.train.batch_rows == 4


def test_a_budget_of_tokens_is_halved_too() -> None:
    sections = list(smaller_settings(TrainSection(batch_tokens=100, accumulate=3), widest=20))
    assert [(section.batch_tokens, section.accumulate) for section in sections] == [
        (100, 3),
        (100, 3),
        (50, 6),
        (25, 12),
    ]
    assert len(list(smaller_settings(TrainSection(batch_tokens=100), widest=60))) == 2  # a row is not cut in two
    assert [section.batch_rows for section in smaller_settings(TrainSection(batch_rows=6), 60)] == [
        6,
        6,
        3,
        1,
    ]


class Rows(ListedExamples):
    """Examples of rows that give several."""

    row_of: np.ndarray = np.zeros(0)  # [N] the row of each


def rows_of_turns(count: int, turns: int, tokens: int) -> Rows:
    found = Rows([Example([7] * tokens, [0] * (tokens - 1) + [1]) for _ in range(count * turns)])
    found.row_of = np.repeat(np.arange(count), turns)
    return found


@pytest.mark.parametrize(
    ("settings", "least", "expected"),
    [
        # Rows of 6 x 60 tokens, which fill the budget alone before and after it is halved: still four in a step.
        ({"batch_tokens": 256, "accumulate": 4}, 128, {"batch_tokens": 128, "accumulate": 4}),
        # Two of them fit into 720 tokens, one into 360.
        ({"batch_tokens": 720, "accumulate": 2}, 360, {"batch_tokens": 360, "accumulate": 4}),
        ({"batch_rows": 4, "accumulate": 1}, 60, {"batch_rows": 1, "accumulate": 4}),
    ],
)
def test_a_step_keeps_its_rows_where_micro_batches_are_made_smaller(
    settings: dict[str, int], least: int, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Needed:
        def __init__(self, *known: Any) -> None:
            self.total = max(count * width for count, width, _ in known[-1].shapes())

    monkeypatch.setattr(fit_memory, "predict_run", Needed)
    config = configuration.Config(train=TrainSection(epochs=1, **settings))
    before = Plan(rows_of_turns(24, 6, 60), config.train)
    found = fit_memory.fit(Given(None, {}, mx.float32, least), Way(), config, before)  # type: ignore[arg-type]
    fitted, after = found.config, found.rows
    assert {key: getattr(fitted.train, key) for key in expected} == expected
    assert {len(plan.rows_of_step(step)) for plan in (before, after) for step in (1, 2, 3)} == {4}
    assert fitted.train == after.section


def test_memory_too_small_for_one_example_of_a_row_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_memory, "predict_run", lambda *known: SimpleNamespace(total=99))
    config = configuration.Config(train=TrainSection(epochs=1, batch_rows=4))
    with pytest.raises(UserError, match="even with one example at a time and checkpointing"):
        fit_memory.fit(Given(None, {}, mx.float32, 59), Way(), config, Plan(rows_of_turns(4, 3, 60), config.train))  # type: ignore[arg-type]


@pytest.mark.parametrize(("model", "smaller"), [({}, "smaller or a 4-bit"), ({"quantization": {}}, "smaller")])
def test_a_4_bit_model_is_not_told_to_be_one(
    model: dict[str, Any], smaller: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_memory, "predict_run", lambda *known: SimpleNamespace(total=99))
    config = configuration.Config(train=TrainSection(epochs=1, batch_rows=4))
    with pytest.raises(UserError) as told:
        fit_memory.fit(Given(None, model, mx.float32, 59), Way(), config, Plan(rows_of_turns(4, 3, 60), config.train))  # type: ignore[arg-type]
    assert f"take a {smaller} model, or set train.memory_limit: off." in (told.value.hint or "")


def test_a_run_that_cannot_fit_is_refused_before_it_begins(mlx_model: Path, data: Path, tmp_path: Path) -> None:
    settings = ("--set", "train.memory_limit=100000")
    said = tiny.refused(
        tmp_path / "run",
        "train",
        "--model",
        mlx_model,
        "--data",
        data,
        "--out",
        tmp_path / "run",
        *settings,
        expected=("training needs", "even with one row at a time and checkpointing", "Lower data.max_tokens"),
    )
    assert "train.memory_limit" in said


def test_a_dry_run_prints_the_memory_plan(mlx_model: Path, data: Path) -> None:
    result = tiny.mlxtune("train", "--model", mlx_model, "--data", data, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert re.search(r"memory: [\d.]+ [kMG]B predicted at the peak", result.stdout)
    for part in ("weights", "adapter", "optimizer", "activations", "head chunk", "dense copies"):
        assert part in result.stdout


def test_the_widths_of_a_plan_are_those_of_its_batches() -> None:
    plan = Plan(examples(), TrainSection(epochs=1, batch_rows=4))
    batches = [batch for step in range(1, plan.steps + 1) for batch in plan.step(step)]
    assert plan.shapes() == [(*batch.ids.shape, batch.targets) for batch in batches]


@pytest.mark.parametrize("limit", ["0", "yes", "lots"])
def test_a_memory_limit_is_auto_off_or_bytes(limit: str) -> None:
    with pytest.raises(UserError, match=r"train\.memory_limit"):
        configuration.load(None, (f"train.memory_limit={limit}",))
