"""Runs on preferences, from configuration to adapter."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import on_preferences
import pytest
import tiny
from broken import OUT_OF_MEMORY
from on_preferences import numbers, of_kind, tune
from training import same_bits

from mlxtune.compute.gradients import Gradients
from mlxtune.data.dataset.batches import Batch
from mlxtune.errors import UserError
from mlxtune.train import events
from mlxtune.train.loggers import PREFERRED
from mlxtune.train.preference import known
from mlxtune.train.run_folder import REFERENCE_FILE

# 1 / (4 beta ** 2), with the beta of 0.1 that nobody sets
AT_START = {"dpo": math.log(2), "ipo": 25.0, "apo": 1.0, "kto": 0.5}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 training pairs and 3 held out."""
    return on_preferences.write(tmp_path_factory.mktemp("pairs"), on_preferences.pairs(7), on_preferences.pairs(3, 7))


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 rated training rows and 3 held out."""
    return on_preferences.write(tmp_path_factory.mktemp("rated"), on_preferences.rated(7), on_preferences.rated(3, 7))


@pytest.fixture(scope="module")
def finished(mlx_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on the pairs, with evaluations and checkpoints."""
    out = tmp_path_factory.mktemp("dpo") / "run"
    tune(mlx_model, pairs, out, *LONG)
    return out


LONG = ("preference.loss=dpo", "train.epochs=2", "train.eval_every=2", "train.save_every=1", "train.keep_last=9")


@pytest.mark.parametrize("objective", [*AT_START, "apo on rated answers"])
def test_at_step_1_the_model_is_its_own_reference(
    objective: str, mlx_model: Path, pairs: Path, rated: Path, tmp_path: Path
) -> None:
    name, _, of_rated = objective.partition(" ")
    of_rated = of_rated or name == "kto"
    found = tune(mlx_model, rated if of_rated else pairs, tmp_path / "run", f"preference.loss={name}", "train.steps=1")
    (step,), evaluations = of_kind(found, "train"), of_kind(found, "eval")
    expected = 0.5 if of_rated else AT_START[name]
    assert step["loss"] == pytest.approx(expected, rel=1e-6)
    assert (step["margin"], step["accuracy"], step["drift"]) == (0.0, 0.5, 0.0)
    assert evaluations[0]["loss"] == pytest.approx(expected, rel=1e-6) and evaluations[0]["accuracy"] == 0.5
    assert evaluations[-1]["loss"] != evaluations[0]["loss"]
    assert ("baseline" in step) == (name == "kto")


@pytest.mark.parametrize(
    "settings",
    [
        ("preference.loss=dpo", "preference.sft=0.5", "preference.label_smoothing=0.1"),
        ("preference.loss=kto", "preference.good_weight=2"),
    ],
)
def test_however_a_step_is_accumulated_its_numbers_are_the_same(
    settings: tuple[str, ...], mlx_model: Path, tmp_path: Path
) -> None:
    """Four rows in 4, 2 and 1 micro-batches."""
    rows = on_preferences.rated if "preference.loss=kto" in settings else on_preferences.pairs
    data = on_preferences.write(tmp_path / "data", rows(4), rows(2, 4))
    found = []
    for size in (1, 2, 4):
        sizes = (f"train.batch_rows={size}", f"train.accumulate={4 // size}")
        found.append(numbers(tune(mlx_model, data, tmp_path / f"{size}", *settings, *sizes, "train.epochs=3")))
    assert len(found[0]) == 3
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.array(other)[:, 0], np.array(found[0])[:, 0], rtol=0, atol=1e-6)


def test_every_pair_is_trained_on_once_an_epoch(finished: Path, mlx_model: Path, pairs: Path) -> None:
    from mlxtune.config import resolve
    from mlxtune.data.dataset.batches import Plan
    from mlxtune.train.run_data import read_data
    from mlxtune.train.run_folder import RunFolder

    config = RunFolder(finished).config()
    assert config == resolve.load(finished / "config.yaml")
    train = read_data(config)[0].train
    plan = Plan(train, config.train)
    assert plan.steps == 4  # of 7 pairs in batches of 2, two of which are a step: 4 + 3, twice
    for epoch in ((1, 2), (3, 4)):
        assert sorted(row for step in epoch for row in plan.rows_of_step(step)) == list(range(7))
    steps = of_kind(events.read(finished), "train")
    assert sum(step["tokens"] for step in steps) == 2 * int(train.lengths.sum())
    assert sum(step["supervised_tokens"] for step in steps) == 2 * int(train.targets.sum())


def numbers_in(event: dict[str, Any]) -> list[str]:
    return [name for name in PREFERRED if name in event]


def test_steps_and_evaluations_say_the_same_numbers(finished: Path) -> None:
    steps, evaluations = (of_kind(events.read(finished), kind) for kind in ("train", "eval"))
    assert [evaluation["step"] for evaluation in evaluations] == [0, 2, 4]
    assert {*numbers_in(steps[0])} == {*numbers_in(evaluations[0])}
    for event in (*steps, *evaluations):
        assert event["margin"] == pytest.approx(event["reward_chosen"] - event["reward_rejected"], abs=1e-9)


def test_a_run_notes_its_objective_when_it_begins(finished: Path) -> None:
    (begun,) = of_kind(events.read(finished), "begin")
    assert begun["preference"] == {"loss": "dpo", "beta": 0.1, "sft": 0.0, "rows": "pairs"}


@pytest.fixture(scope="module")
def from_sft(run: Path, mlx_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on the pairs, from an adapter of supervised rows."""
    out = tmp_path_factory.mktemp("from") / "run"
    tune(mlx_model, pairs, out, *FROM_SFT, f"lora.start_from={run}", "train.steps=3")
    return out


FROM_SFT = ("preference.loss=dpo", "train.save_every=1")


def test_an_adapter_that_a_run_starts_from_is_its_reference(from_sft: Path, finished: Path) -> None:
    assert of_kind(events.read(from_sft), "train")[0]["margin"] == 0.0
    one, other = (on_preferences.values(folder)["train"] for folder in (from_sft, finished))
    assert np.abs(one - other).min() > 0.01


def test_doras_layers_trained_in_full_and_embeddings_are_their_own_reference(
    mlx_model: Path, pairs: Path, tmp_path: Path
) -> None:
    settings = ("lora.variant=dora", "lora.train_also=[norms, embeddings, head]", "train.steps=1")
    found = tune(mlx_model, pairs, tmp_path / "run", "preference.loss=dpo", *settings)
    (step,), evaluations = of_kind(found, "train"), of_kind(found, "eval")
    assert step["margin"] == 0.0 and evaluations[-1]["margin"] != 0.0


def test_a_reference_of_another_answer_is_found_out_before_anything_is_learned(
    mlx_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = known.Known.of
    monkeypatch.setattr(known.Known, "of", lambda self, batch: real(self, batch)[::-1].copy())
    with pytest.raises(UserError, match="4 answers are not as likely as in the reference") as told:
        tune(mlx_model, pairs, tmp_path / "run", "preference.loss=dpo", "train.steps=1", "train.accumulate=1")
    assert "Nothing was trained" in told.value.hint and not (tmp_path / "run").exists()


def test_a_loss_that_is_not_that_of_the_start_is_found_out(
    mlx_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxtune.train.preference import start

    monkeypatch.setattr(start, "loss_at_start", lambda *_: 1.0)
    with pytest.raises(UserError, match=re.escape("the first step's loss is 0.693147")):
        tune(mlx_model, pairs, tmp_path / "run", "preference.loss=dpo", "train.steps=1")


def test_kept_states_of_frozen_blocks_change_no_number(mlx_model: Path, rated: Path, tmp_path: Path) -> None:
    settings = ("preference.loss=kto", "lora.layers=1", "train.epochs=2", "train.eval_every=2", "train.batch_rows=4")
    found = [
        tune(mlx_model, rated, tmp_path / kept, *settings, f"train.trunk_cache={kept}") for kept in ("off", "auto")
    ]
    computed = [of_kind(events_of_run, "begin")[0]["computed"] for events_of_run in found]
    assert "frozen blocks" not in computed[0] and computed[0] != computed[1]
    np.testing.assert_allclose(numbers(found[1]), numbers(found[0]), rtol=1e-4, atol=1e-5)


def test_pairs_that_do_not_fit_the_memory_together_are_computed_one_by_one(
    finished: Path, mlx_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second step on; a single pair is never divided."""
    real, computed = Gradients.of_answers, list[int]()

    def of_answers(self: Gradients, batch: Batch, value_of: Any) -> Any:
        if batch.pairs:  # else it is the proof
            computed.append(batch.pairs)
        if len(computed) > 2 and batch.pairs > 1:
            raise RuntimeError(OUT_OF_MEMORY)
        return real(self, batch, value_of)

    monkeypatch.setattr(Gradients, "of_answers", of_answers)
    found = tune(mlx_model, pairs, tmp_path / "run", *LONG, "train.on_oom=smaller")
    assert [event["halved"] for event in of_kind(found, "note") if "halved" in event] == [1]
    assert computed[:3] == [2, 2, 2] and set(computed[3:]) == {1}
    np.testing.assert_allclose(numbers(found), numbers(events.read(finished)), rtol=1e-4, atol=1e-5)


# Going on.


def cut(run: Path, to: Path, step: int) -> Path:
    """A copy of a run as a kill after a step's checkpoint would have left it."""
    shutil.copytree(run, to)
    for folder in (to / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    return to


def test_a_run_that_was_killed_goes_on_with_the_same_bits(mlx_model: Path, rated: Path, tmp_path: Path) -> None:
    """Also of kto, whose baseline is of the weights as they are."""
    settings = ("preference.loss=kto", *LONG[1:])
    whole = tmp_path / "whole"
    tune(mlx_model, rated, whole, *settings)
    run = cut(whole, tmp_path / "run", 2)
    tune(mlx_model, rated, run, *settings, resume=True)
    same_bits(whole, run)
    assert numbers(events.read(run)) == numbers(events.read(whole))


DIES = """
import os, signal
from mlxtune.train.preference import reference
from mlxtune.train import step
real, steps = reference._Pass.compute, step.StepFunction.__call__
def compute(self, batch):
    real(self, batch)
    {in_pass}
def call(self, number):
    if number == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return steps(self, number)
reference._Pass.compute, step.StepFunction.__call__ = compute, call
"""


def test_a_kill_at_any_place_loses_nothing(mlx_model: Path, pairs: Path, tmp_path: Path) -> None:
    """SIGKILL in the reference pass, after which there is nothing to go on from, then in the third step."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    tiny.done(*on_preferences.options(mlx_model, pairs, whole, *LONG))
    for in_pass, number in (("os.kill(os.getpid(), signal.SIGKILL)", 0), ("pass", 3)):
        code = DIES.format(in_pass=in_pass, number=number)
        with tiny.started(*on_preferences.options(mlx_model, pairs, run, *LONG), code=code) as process:
            process.wait()
        assert process.returncode == -9
        assert (run / "checkpoints").is_dir() == (number == 3)
    tiny.done("train", "--resume", "--out", run)
    same_bits(whole, run)
    assert on_preferences.reference(whole) == on_preferences.reference(run)
    listed = json.loads(tiny.mlxtune("runs", tmp_path, "--json").stdout)
    assert {one["state"] for one in listed} == {"finished"}


def gone(file: Path) -> None:
    file.unlink()


def flipped(file: Path) -> None:
    tensors: Any = mx.load(str(file))
    mx.eval(tensors)
    mx.save_safetensors(str(file), {**tensors, "train": tensors["train"] - 1e-3})


def torn(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("change", "said"),
    [(gone, f"has no {REFERENCE_FILE}"), (flipped, "is damaged"), (torn, "torn, or not a safetensors file")],
)
def test_a_run_does_not_go_on_without_its_reference(change: Any, said: str, finished: Path, tmp_path: Path) -> None:
    run = cut(finished, tmp_path / "run", 2)
    change(run / REFERENCE_FILE)
    ended = tiny.mlxtune("train", "--resume", "--out", run)
    tiny.one_clear_line(ended, said)
    assert "Put the run's own file back" in " ".join(ended.stderr.split())  # and not: download it again


def test_a_run_does_not_go_on_with_another_runs_reference_or_objective(
    finished: Path, mlx_model: Path, pairs: Path, tmp_path: Path
) -> None:
    other, rows = tmp_path / "other", on_preferences.pairs
    others = on_preferences.write(tmp_path / "data", rows(7, 20), rows(3, 7))
    tune(mlx_model, others, other, "preference.loss=dpo", "train.steps=1")
    run = cut(finished, tmp_path / "run", 2)
    shutil.copy(other / REFERENCE_FILE, run)
    with pytest.raises(UserError, match=r"is the reference of another run: the training examples differ"):
        tune(mlx_model, pairs, run, *LONG, resume=True)
    shutil.copy(finished / REFERENCE_FILE, run)
    for setting, told in (("loss=ipo", '"dpo" -> "ipo"'), ("beta=0.2", "null -> 0.2"), ("sft=1", "0.0 -> 1.0")):
        with pytest.raises(UserError, match=f"cannot be resumed, for this changed: preference.*{told}"):
            tune(mlx_model, pairs, run, *LONG, f"preference.{setting}", resume=True, anyway=True)


def test_a_longer_run_computes_what_more_of_the_reference_it_needs(
    from_sft: Path, run: Path, mlx_model: Path, pairs: Path, tmp_path: Path
) -> None:
    """One step asks for 4 of 7 pairs; from an adapter that the model no longer has when the run goes on."""
    longer, start = tmp_path / "longer", tmp_path / "start"
    shutil.copytree(run, start)
    settings = (*FROM_SFT, f"lora.start_from={start}")
    tune(mlx_model, pairs, longer, *settings, "train.steps=1")
    assert int((on_preferences.values(longer)["train"] == known.UNKNOWN).sum()) == 2 * 3
    (start / "adapters.safetensors").write_bytes((from_sft / "adapters.safetensors").read_bytes())
    with pytest.raises(UserError, match="changed since the run began"):
        tune(mlx_model, pairs, longer, *settings, "train.steps=3", resume=True, anyway=True)
    shutil.copy(run / "adapters.safetensors", start)
    tune(mlx_model, pairs, longer, *settings, "train.steps=3", resume=True, anyway=True)
    one, other = ([event["loss"] for event in of_kind(events.read(folder), "train")] for folder in (longer, from_sft))
    assert one == other
    assert on_preferences.reference(longer)["train"] == on_preferences.reference(from_sft)["train"]
    shutil.rmtree(start)  # not needed by who has the whole reference
    tune(mlx_model, pairs, longer, *settings, "train.steps=4", resume=True, anyway=True)


# What a run is for.


def test_the_adapter_that_tells_most_held_out_pairs_apart_is_kept(
    mlx_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is lowest at the end, the accuracy is made highest in the middle."""
    from mlxtune.train.preference.goal import Goal

    told = iter([0.5, 0.9, 0.6, 0.7])
    real = Goal.fields

    def fields(self: Goal, tally: Any) -> dict[str, float]:
        found = real(self, tally)
        return {**found, "accuracy": next(told)} if self.split is self.preference.valid else found

    monkeypatch.setattr(Goal, "fields", fields)
    run = tmp_path / "run"
    tune(mlx_model, pairs, run, "preference.loss=dpo", "train.keep_by=accuracy", "train.eval_every=1", "train.steps=3")
    end = events.read(run)[-1]
    assert (end["best_step"], end["best_check"]) == (1, 0.9)


def test_an_adapter_of_pairs_is_shipped_and_proven_on_answers_that_were_chosen(
    finished: Path, mlx_model: Path, tmp_path: Path
) -> None:
    from mlxtune.data.rows.sides import Side
    from mlxtune.ship.good_rows import of_good_answers
    from mlxtune.train.run_data import read_data
    from mlxtune.train.run_folder import RunFolder

    examples = read_data(RunFolder(finished).config())[0].valid
    assert set(of_good_answers(examples).sides.tolist()) == {Side.CHOSEN} < set(examples.sides.tolist())
    for to in ("peft", "hf", "gguf"):
        out = tmp_path / (f"{to}.gguf" if to == "gguf" else to)
        done = tiny.done("export", "--model", mlx_model, "--adapter", finished, "--to", to, "--out", out)
        assert "passed" in done.stdout + done.stderr
    fused = tiny.done("fuse", "--model", mlx_model, "--adapter", finished, "--out", tmp_path / "fused")
    assert "no training rows" not in fused.stderr


def test_the_recipe_goes_on_from_an_adapter_and_tells_people_what_it_does(
    run: Path, mlx_model: Path, pairs: Path, tmp_path: Path
) -> None:
    flags = ("--model", mlx_model, "--data", pairs, "--set", f"lora.start_from={run}", "--steps", "2")
    said = tiny.done("train", "-c", "dpo", *flags, "--out", tmp_path / "run").stderr
    assert "7 training pairs, 3 held out, 2 steps" in said
    assert "objective: dpo, beta 0.1, compared with the model at step 0" in said
    assert "computing the reference: " in said and "step 0: validation loss 0.6931" in said
    assert "accuracy 50.0%" in said
    assert re.search(r"step 2/2  loss [\d.]+  margin -?[\d.]+  accuracy \d+%  valid loss", said), said
