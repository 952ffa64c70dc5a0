"""`mlxtune bench` on a tiny model: what is measured adds up, alone and against mlx-lm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import on_preferences
import pytest
import tiny

from mlxtune.bench import children, ours, theirs
from mlxtune.bench.figures import OURS, THEIRS, Measured
from mlxtune.cli.bench import _print as print_measured
from mlxtune.config import resolve
from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.model import linux_cpu
from mlxtune.model.load import open_model
from mlxtune.train.run_data import read_data


def test_both_competitors_train_on_the_same_rows(mlx_model: Path, data: Path) -> None:
    flags = {"model.path": str(mlx_model), "data.path": str(data)}
    settings = resolve.load(None, ("train.batch_rows=4", "lora.rank=4", "train.epochs=1"), flags)
    our, their = (children.measure(settings, 8, who) for who in (OURS, THEIRS))
    assert our.rows == their.rows == 8
    assert our.steps == their.steps == 2
    assert our.tokens == their.tokens
    assert their.supervised == our.supervised + 8  # mlx-lm counts a padding token after every row
    assert our.padding < their.padding
    assert our.processed < their.processed
    assert our.base_bytes == their.base_bytes
    assert 0 < our.head_saved < 1 and our.seconds > 0 and 0 < our.utilisation < 1
    assert their.peak_bytes > our.peak_bytes > 0
    assert 0 < our.update < 1 and their.update == 0
    assert our.waits > 3  # on the CPU every layer of gradients is waited for
    assert not our.queued and not their.queued
    assert their.waits == 1  # mlx-lm evaluates once a step
    assert our.first_seconds == their.first_seconds == our.traced == 0  # nothing is compiled on the CPU
    assert (our.limits, their.limits) == ("mlxtune", "mlx-lm")


def test_mlx_lm_trains_under_the_limits_that_mlx_has_of_itself(
    mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a process without mlxtune: how much MLX may take and keep, and whether it multiplies in TF32."""
    read = "sys.exit(f'{mx.set_memory_limit(1)} {mx.set_cache_limit(1)} {os.environ.get(\"MLX_ENABLE_TF32\", 1)}')"
    code = f"import os, sys, mlx.core as mx; {read}"
    bare = {name: value for name, value in os.environ.items() if not name.startswith("MLX_")}
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=bare)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(backend, "_unset", {"MLX_ENABLE_TF32": "1"})  # this process may have got ours from another
    (tmp_path / "sitecustomize.py").write_text(
        f"import mlx_lm.tuner.trainer as trainer\ndef train(*_):\n    {code}\ntrainer.train = train\n"
    )
    flags = {"model.path": str(mlx_model), "data.path": str(data)}
    with pytest.raises(UserError) as told:
        children.measure(resolve.load(None, ("train.batch_rows=4",), flags), 8, THEIRS)
    assert told.value.message.split()[-3:] == alone.stderr.split() and alone.stderr.endswith(" 1\n")


def test_what_mlxtune_set_for_itself_is_known_and_what_the_user_set_stays() -> None:
    code = "import os; from mlxtune.machine.backend import as_without_mlxtune as told; "
    code += "print(told(), os.environ['MLX_ENABLE_TF32'])"
    for given, told in (({}, "{'MLX_ENABLE_TF32': '1'} 0\n"), ({"MLX_ENABLE_TF32": "0"}, "{} 0\n")):
        environment = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"} | given
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert done.stdout == told


def test_steps_are_timed_when_all_is_compiled_and_the_first_time_is_told_apart(
    mlx_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, in this process."""
    monkeypatch.setattr(backend, "policy", lambda: backend.Policy(compiled=True, queued=True, tile=64))
    monkeypatch.setattr(linux_cpu, "worth_it", lambda: False)  # which are of the CPU, and wait
    flags = {"model.path": str(mlx_model), "data.path": str(data)}
    settings = resolve.load(None, ("train.batch_rows=4", "lora.rank=4", "train.epochs=1"), flags)
    found, _ = read_data(settings)
    our = ours.measure(settings, found, 3)
    assert our.waits <= 3 and our.first_seconds > 0 and our.queued
    assert "compiled" in our.computed and 0 < our.traced <= 3
    their = theirs.measure(THEIRS, settings, list(found.train)[:8], 4)
    assert their.waits == 1 and their.first_seconds > 0


def test_rows_of_several_examples_are_chosen_by_rows_and_timed_by_examples(mlx_model: Path, tmp_path: Path) -> None:
    """Rows of three turns each, four to a step: eight rows are two steps and 24 examples."""
    said = [row["messages"] for row in tiny.conversations(36)]
    rows = [{"messages": [*said[at], *said[at + 1], *said[at + 2]]} for at in range(0, 36, 3)]
    path = tiny.write_jsonl(tmp_path / "train.jsonl", rows)
    flags = ("--model", mlx_model, "--data", path, "--rows", "8", "--set", "train.batch_rows=4")
    flags = (*flags, "--set", "data.expand_turns=all")
    result = tiny.mlxtune("bench", *flags)
    assert result.returncode == 0, result.stderr
    assert "24 examples in 2 steps" in result.stdout and "s per example" in result.stdout


def test_the_command_prints_one_json_document(mlx_model: Path, data: Path) -> None:
    result = tiny.mlxtune("bench", "--model", mlx_model, "--data", data, "--rows", "8", "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert [one["who"] for one in answer["measured"]] == ["mlxtune"]
    assert answer["ratio"] is None


@pytest.mark.parametrize("queued", [True, False])
def test_waits_are_told_where_they_are_not_by_design(queued: bool, capsys: pytest.CaptureFixture[str]) -> None:
    one = Measured(OURS, 8, 2, 2.0, 9, 9, 9, 0.0, 10, 1, "gpu", update=0.05, waits=3.0, queued=queued)
    print_measured(replace(one, first_seconds=2.68, traced=3))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "the first time through these rows took 1.34 times as long (3 graphs compiled)" in lines
    waits = ", a micro-batch waits for the device 3.0 times" if queued else ""
    assert f"5.0% of the time in the optimizer's update{waits}" in lines


def test_ratios_are_of_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pairs by hand: medians 3 and 6 seconds a row; the single pairs spread from 1/5 to 5/6."""
    times = {OURS: [1.0, 2.0, 3.0, 4.0, 5.0], THEIRS: [5.0, 7.0, 6.0, 8.0, 6.0]}
    order: list[str] = []

    def measured(settings: resolve.Config, rows: int, who: str) -> Measured:
        order.append(who)
        seconds = times[who][order.count(who) - 1] * rows
        return Measured(who, rows, 1, seconds, 1, 1, 1, 0.0, 10 if who == OURS else 40, 1, "cpu")

    monkeypatch.setattr(children, "measure", measured)
    found, ratio = children.compare(resolve.Config(), 4, 5, lambda line: None)
    assert len(found) == 10 and order[:4] == ["mlxtune", "mlx-lm", "mlx-lm", "mlxtune"]
    assert ratio == pytest.approx({"time": 0.5, "time_lowest": 0.2, "time_highest": 5 / 6, "peak": 0.25, "pairs": 5})


def test_pairs_without_a_competitor_are_refused() -> None:
    tiny.one_clear_line(tiny.mlxtune("bench", "--pairs", "5"), "--pairs has no effect without --against")


def test_mlx_lms_trainer_is_not_measured_with_one_rank_in_place_of_several(mlx_model: Path) -> None:
    settings = resolve.load(None, ("lora.ranks={down_proj: 2}",), {"model.path": str(mlx_model), "data.path": "-"})
    model, _ = open_model(mlx_model)
    with pytest.raises(UserError, match=r"lora\.ranks: mlx-lm's trainer has one rank for all layers"):
        theirs._attach(model, settings)


def test_bench_says_that_one_epoch_has_no_use_for_kept_states(mlx_model: Path, data: Path) -> None:
    run = tiny.mlxtune("bench", "--model", mlx_model, "--data", data, "--set", "train.trunk_cache=1000000")
    tiny.one_clear_line(run, "train.trunk_cache 1000000 has no effect: mlxtune bench trains one epoch")


def test_bench_says_that_it_measures_no_preferences(mlx_model: Path, tmp_path: Path) -> None:
    """With the objective, which would have been ignored, and without it; of thumbs the good answers are rows."""
    pairs = tiny.write_jsonl(tmp_path / "pairs.jsonl", on_preferences.pairs(20))
    asked = ("bench", "--model", mlx_model, "--rows", "8", "--data")
    said = "preference.loss dpo has no effect: mlxtune bench measures supervised tuning"
    tiny.one_clear_line(tiny.mlxtune(*asked, pairs, "--set", "preference.loss=dpo"), said)
    tiny.one_clear_line(tiny.mlxtune(*asked, pairs), "mlxtune data convert")
