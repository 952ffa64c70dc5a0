"""Presets: the fastest settings whose predicted peak fits, and what is said where none do."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mlxtune.cli.console import console
from mlxtune.compute.fit_memory import SHARE
from mlxtune.compute.memory.prediction import Memory
from mlxtune.config import resolve
from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.machine.backend import GIB, Machine, mac
from mlxtune.presets import models, rules, search, table
from mlxtune.presets.peaks import PASSES, Peaks, Settings
from mlxtune.presets.search import DoesNotFit, Preset
from mlxtune.presets.wanted import Wanted, typical
from mlxtune.train import preparation
from mlxtune.train.run_data import read_data

# Billions of parameters as the models' cards name them: of Qwen 2.5 0.49, 1.54, 14.7, 32.5; of Qwen 3 4.0 and 8.2; of
# Llama 3 3.21, 8.03, 70.6; of SmolLM2 0.135.
CARDS = {
    "SmolLM2-135M-Instruct": 0.135,
    "Qwen2.5-0.5B-Instruct": 0.49,
    "Qwen2.5-1.5B-Instruct": 1.54,
    "Llama-3.2-3B-Instruct": 3.21,
    "Qwen3-4B-Instruct-2507": 4.0,
    "Llama-3.1-8B-Instruct": 8.03,
    "Qwen3-8B": 8.2,
    "Qwen2.5-14B-Instruct": 14.7,
    "Qwen2.5-32B-Instruct": 32.5,
    "Llama-3.3-70B-Instruct": 70.6,
}
SMALL = {
    **models.KNOWN[0].config,
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
ROWS = Wanted("chat", 600, [60 + 3 * number for number in range(100)])


def machine(budget: int, kind: str = "metal") -> Machine:
    """One on which so many bytes may be used."""
    return Machine(kind, 2 * budget, int(budget / SHARE) + 1)


@pytest.fixture(scope="module")
def small() -> Peaks:
    return Peaks(SMALL, "metal", ROWS)


@pytest.mark.parametrize("known", models.KNOWN, ids=lambda known: known.name)
def test_a_known_model_has_the_parameters_that_its_card_names(known: models.Known) -> None:
    assert known.parameters / 1e9 == pytest.approx(CARDS[known.name], rel=0.012)


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B-Instruct", "Qwen3-8B"])
def test_the_bytes_of_a_known_model_are_those_of_the_model_that_is_built_of_its_shape(name: str) -> None:
    known = next(one for one in models.KNOWN if one.name == name)
    peaks = Peaks(known.config, "metal", ROWS)
    adapter = 12 * 10_000_000  # of rank 1, in float32
    assert peaks.weights(4) == pytest.approx(known.weights(4), abs=adapter)
    assert peaks.parameters() == pytest.approx(known.parameters, rel=1e-3)


@pytest.mark.parametrize(("gib", "mib"), [(8, 5461), (16, 10922), (24, 16384), (32, 21845), (36, 27648), (64, 49152)])
def test_a_mac_may_use_what_macos_recommends(gib: int, mib: int) -> None:
    """As llama.cpp prints it: recommendedMaxWorkingSetSize of Macs with so much memory, in MiB."""
    assert mac(gib * GIB).working_set / 2**20 == pytest.approx(mib, abs=1)


def test_plans_for_another_machine_end_where_they_began() -> None:
    own = backend.here()
    with pytest.raises(ZeroDivisionError), backend.planned_for(Machine("metal", 7, 5)):
        assert backend.here() == Machine("metal", 7, 5)
        assert backend.policy().compiled and backend.policy().tile == 64
        assert 1 / 0
    assert backend.here() == own


def everything(peaks: Peaks, rank: int) -> list[Settings]:
    tokens = peaks.wanted.covering(0.99)
    ways = [way for way in PASSES if way not in search.LONG]
    return [Settings(4, rank, tokens, rows, 16, way) for way, rows in product(ways, search.BATCH_ROWS)]


def test_the_fastest_settings_that_fit_are_taken(small: Peaks) -> None:
    """All settings are tried here, for budgets from one that none fits to one that all do."""
    rank = rules.advice(ROWS, small.parameters()).settings["lora.rank"]
    peaks = {settings: small.memory(settings) for settings in everything(small, rank)}
    totals = {settings: memory.total for settings, memory in peaks.items() if isinstance(memory, Memory)}
    assert len(totals) == len(peaks)
    chosen = set()
    for budget in (min(totals.values()), *sorted(totals.values())[1::3], 2 * max(totals.values())):
        found = search.search(small, machine(budget), (4,))
        assert isinstance(found, Preset) and found.peak_bytes is not None
        fit = [settings for settings, total in totals.items() if total <= budget]
        fastest = min(fit, key=small.work)
        assert found.settings["train.batch_rows"] == fastest.batch_rows
        assert found.settings.get("train.checkpoint_layers", "none") == fastest.checkpoint
        assert found.settings["train.batch_rows"] * found.settings["train.accumulate"] == 16
        assert found.peak_bytes == totals[fastest] <= budget
        chosen.add((fastest.batch_rows, fastest.checkpoint))
    assert len(chosen) >= 4


def test_a_model_that_does_not_fit_says_what_it_needs_and_which_one_does(
    small: Peaks, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = models.KNOWN[0]
    listed = [
        replace(known, name=f"{count} blocks", config={**SMALL, "num_hidden_layers": count}) for count in (2, 4, 9)
    ]
    monkeypatch.setattr(models, "KNOWN", listed)
    least = small.memory(Settings(4, rules.LEAST_RANK, ROWS.covering(0.95), 1, 16, "all"))
    assert isinstance(least, Memory)
    found = search.find(listed[2].config, machine(least.total), ROWS, name="9 blocks")
    assert isinstance(found, DoesNotFit)
    assert found.needed > found.budget and found.largest == "4 blocks in 4 bits"
    assert "the largest that does: 4 blocks in 4 bits" in str(found)
    none = search.find(listed[2].config, machine(10_000), ROWS)
    assert "the largest that does: no known model" in str(none)


def test_rows_are_cut_and_ranks_lowered_only_where_nothing_else_fits(small: Peaks) -> None:
    long = Wanted("code", 6_000, [200] * 97 + [1500] * 2 + [4000])
    peaks = Peaks(SMALL, "metal", long)
    whole = search.search(peaks, machine(10**12), (4,))
    assert isinstance(whole, Preset)
    assert whole.settings["data.max_tokens"] == 1536 and whole.settings["lora.rank"] == 64
    assert "keeps its start" in whole.why["data.max_tokens"]
    least = peaks.memory(Settings(4, rules.LEAST_RANK, 1536, 1, 16, "nested"))
    assert isinstance(least, Memory)
    lower = search.search(peaks, machine(least.total), (4,))
    assert isinstance(lower, Preset)
    assert lower.settings["data.max_tokens"] == 1536 and lower.settings["lora.rank"] == rules.LEAST_RANK
    assert "does not fit" in lower.why["lora.rank"]
    cut = search.search(peaks, machine(least.total - 1), (4,))
    assert isinstance(cut, Preset)
    assert cut.settings["data.max_tokens"] == 256 and cut.tokens_covered < 0.9
    assert any("3% of the rows" in warning for warning in cut.warnings)


def test_a_model_on_which_nothing_can_train_is_refused_in_true_words() -> None:
    """BitNet's weights are ternary codes in a layer of mlx-lm's own."""
    with pytest.raises(UserError, match="no layer that an adapter can be put on") as refused:
        search.find({**SMALL, "model_type": "bitnet"}, machine(10**12), ROWS)
    assert "lora.train_also" in refused.value.hint


def test_a_model_takes_no_more_tokens_than_it_was_made_for() -> None:
    peaks = Peaks({**SMALL, "max_position_embeddings": 128}, "metal", ROWS)
    found = search.search(peaks, machine(10**12), (4,))
    assert isinstance(found, Preset) and found.settings["data.max_tokens"] == 128
    assert found.warnings
    stored = {**SMALL, "quantization": {"bits": 4, "group_size": 64}}
    as_it_is = search.find(stored, machine(10**12), ROWS)
    assert isinstance(as_it_is, Preset) and as_it_is.bits is None


def test_a_small_model_has_8_bits_where_they_cost_nothing_and_a_large_one_4(
    small: Peaks, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = search.search(small, machine(10**12), search.BITS)
    assert isinstance(found, Preset) and found.bits == 8
    as_it_is = search.search(small, machine(10**12), (None, *search.BITS))
    assert isinstance(as_it_is, Preset) and as_it_is.bits is None
    monkeypatch.setattr(search, "SMALL", 1_000)
    large = search.search(small, machine(10**12), search.BITS)
    assert isinstance(large, Preset) and large.bits == 4


def test_a_run_takes_a_preset_as_it_is_and_predicts_the_same_peak(mlx_model: Path, data: Path) -> None:
    flags = {"model.path": str(mlx_model), "data.path": str(data)}
    rows, config = read_data(resolve.load(None, ("fast.prefix=off",), flags))
    supervised = rows.train.targets.sum() / rows.train.lengths.sum()
    wanted = Wanted("format", rows.train.rows, rows.train.lengths.tolist(), float(supervised))
    peaks = Peaks(mlx_model, "cpu", wanted)
    least = peaks.memory(Settings(None, 8, wanted.covering(0.99), 1, 4, "all"))
    assert isinstance(least, Memory)
    for budget in (10**10, int(1.05 * least.total)):
        preset = search.find(mlx_model, machine(budget, "cpu"), wanted)
        assert isinstance(preset, Preset) and preset.bits is None
        assert preset.why.keys() <= preset.settings.keys()
        assert any("A step has 4 rows" in text for text in preset.why.values())
        allowed = {**flags, **preset.settings, "fast.prefix": "off", "train.memory_limit": preset.budget_bytes}
        config = resolve.load(None, (), allowed)
        planned = preparation.plan(config, rows)
        assert planned.config == config, planned.notes  # nothing was made smaller
        assert planned.memory is not None
        # Which tokens of a row are supervised is not known, only how many of all are.
        assert preset.peak_bytes == pytest.approx(planned.memory.total, rel=0.1)
        assert planned.memory.total <= preset.budget_bytes
    assert preset.settings["train.batch_rows"] < 4


def test_a_model_whose_memory_cannot_be_told_gets_what_needs_least_and_a_word_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlxtune.compute.memory.prediction.sizes_of", lambda config: None)
    found = search.find(SMALL, mac(16 * GIB), ROWS)
    assert isinstance(found, Preset) and found.peak_bytes is None
    assert found.settings["train.batch_rows"] == 1 and found.settings["train.checkpoint_layers"] == "all"
    assert any("not predicted" in reason for reason in found.reasons)
    resolve.load(None, (), found.settings)


@pytest.mark.parametrize(
    ("rows", "goal", "parameters", "expected"),
    [
        (100, "style", 0.5e9, {"train.lr": 5e-4}),
        (
            100,
            "format",
            1e9,
            {"train.lr": 2e-4, "train.epochs": 3, "lora.rank": 8, "lora.alpha": 16, "train.patience": 3},
        ),
        (499, "code", 1e9, {"train.epochs": 3, "lora.rank": 16, "train.patience": 3}),
        (500, "chat", 8e9, {"train.epochs": 2, "lora.rank": 16, "train.lr": 2e-4}),
        (5_000, "chat", 32.5e9, {"train.epochs": 2, "train.lr": 1e-4}),
        (5_001, "documents", 1e9, {"train.epochs": 1, "lora.rank": 64, "lora.alpha": 128}),
    ],
)
def test_epochs_rank_and_rate_follow_from_the_rows_the_goal_and_the_size(
    rows: int, goal: Any, parameters: float, expected: dict[str, Any]
) -> None:
    found = rules.advice(Wanted(goal, rows, [100]), int(parameters))
    assert {key: found.settings[key] for key in expected} == expected
    assert ("train.patience" in found.settings) == (rows < 500)
    assert any("overfitting" in warning for warning in found.warnings) == (rows < 500)
    in_full = rules.advice(Wanted(goal, rows, [100]), int(parameters), in_full=True)
    assert in_full.settings["train.lr"] == pytest.approx(found.settings["train.lr"] / 10)
    resolve.load(None, (), found.settings)


def test_a_run_of_few_rows_still_has_steps_and_evaluations() -> None:
    found = rules.advice(Wanted("format", 40, [100]), 10**9)
    assert found.step_rows == 4 and "train.accumulate" in found.why
    assert found.settings["train.warmup_steps"] == 3 and found.settings["train.eval_every"] == 5
    assert "very few" in found.warnings[0]
    usual = rules.advice(Wanted("chat", 4_000, [100]), 10**9)
    assert usual.step_rows == 16 and "train.eval_every" not in usual.settings


def test_lengths_say_which_limit_keeps_how_many_rows_whole() -> None:
    wanted = Wanted("chat", 100, list(range(1, 101)))
    assert (wanted.covering(0.99), wanted.covering(0.5), wanted.covering(1.0)) == (128, 64, 128)
    assert wanted.share_whole(64) == 0.64
    assert wanted.share_of_tokens(64) == (sum(range(65)) + 36 * 64) / 5050
    lengths = typical().lengths
    assert sorted(lengths)[len(lengths) // 2] == pytest.approx(350, abs=1)


MEMORIES, SIZES = (8, 512), ("0.5B", "8B")


@pytest.fixture(scope="module")
def cells() -> list[table.Cell]:
    return table.table(MEMORIES, SIZES, replace(typical(), lengths=typical().lengths[::10]))


def test_every_cell_fits_80_percent_or_says_the_largest_that_does(cells: list[table.Cell]) -> None:
    assert [(cell.memory_gib, cell.size) for cell in cells] == list(product(MEMORIES, SIZES))
    for cell in cells:
        allowed = 0.8 * mac(cell.memory_gib * GIB).working_set
        if cell.settings:
            assert cell.peak_bytes is not None and cell.peak_bytes <= allowed
            resolve.load(None, (), cell.settings)
        else:
            assert cell.needed_bytes is not None and cell.needed_bytes > allowed
            assert f"does not fit; the largest that does: {cell.largest}" in cell.line()
    shown = {(cell.memory_gib, cell.size): cell for cell in cells}
    assert not shown[8, "8B"].settings and shown[8, "8B"].largest == "0.5B"
    assert shown[512, "8B"].bits == 4 and shown[512, "0.5B"].bits == 8


def drawn(cells: list[table.Cell], width: int, soft_wrap: bool = False) -> str:
    out = console(file=io.StringIO(), width=width, soft_wrap=soft_wrap)
    table.draw(out, cells)
    assert isinstance(out, Console) and isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_the_table_is_a_line_a_cell_where_it_has_no_room(cells: list[table.Cell]) -> None:
    wide, narrow, piped = drawn(cells, 140), drawn(cells, 60), drawn(cells, 140, soft_wrap=True)
    assert "0.5B" in wide and "512-GB" in wide and "│" in wide
    for text in (narrow, piped):
        assert "│" not in text and "8-GB Mac, 8B: does not fit; the largest that does: 0.5B" in text
    assert all(len(line) <= 140 for line in wide.splitlines())
    document = json.loads(json.dumps(table.document(cells)))
    assert [one["memory_gib"] for one in document["presets"]] == [cell.memory_gib for cell in cells]
