"""A suite in train.sample_prompts: its checks are asked at each evaluation, and may choose the adapter that is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from training import options, tensors, tune

from mlxtune.cli.suites import _about_data
from mlxtune.config import resolve
from mlxtune.errors import UserError
from mlxtune.evaluate.checks.suite import read_suite
from mlxtune.evaluate.engines.local import Local
from mlxtune.evaluate.engines.request import Request
from mlxtune.train import evaluation
from mlxtune.train.checkpoint import State
from mlxtune.train.evaluation import Evaluation
from mlxtune.train.identity import Identity, _flat


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{**row, "checks": ["ended", {"contains": "e"}]} for row in tiny.conversations(33)[30:]]
    return tiny.write_jsonl(tmp_path_factory.mktemp("suite") / "suite.jsonl", rows)


def test_the_suite_is_asked_as_eval_asks_it(mlx_model: Path, data: Path, suite: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = tune(
        *(mlx_model, data, run, f"train.sample_prompts={suite}", "train.keep=last"),
        *("train.steps=6", "train.eval_every=0", "train.save_every=0"),
    )
    first, last = [event for event in found if event["kind"] == "eval"]
    assert list(last["checks"]) == ["ended", "contains"]
    said = tiny.done(
        *("eval", "--model", mlx_model, "--adapter", run, "--suite", suite, "--max-tokens", "128"),
        *("--out", tmp_path / "evaluation", "--json"),
    )
    checks = json.loads(said.stdout)["checks"]
    lines = [json.loads(line) for line in (tmp_path / "evaluation" / "answers.jsonl").read_text().splitlines()]
    for event, side in ((first, "base"), (last, "tuned")):
        assert event["checks"] == {name: pytest.approx(checks[name][side]) for name in checks}
        texts = {line["id"]: line["text"] for line in lines if line["side"] == side}
        assert [sample["answer"] for sample in event["samples"]] == [texts[id] for id in ("1", "2", "3")]
        assert event["samples"][1]["prompt"] == tiny.conversations(33)[31]["messages"][0]["content"]


def test_what_engine_and_suite_have_to_say_is_said_once(
    mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference that its own check refuses, answers that are cut, a check that applies to none of them, and what the
    engine notes; also where that check chooses.
    """

    class Slow(Local):
        def plan(self, requests: Sequence[Request]) -> list[list[int]]:
            self.notes.append("answered slowly")
            return super().plan(requests)

    monkeypatch.setattr(evaluation, "SAMPLE_TOKENS", 2)
    monkeypatch.setattr(evaluation, "Local", Slow)
    real = evaluation.score_answers
    monkeypatch.setattr(evaluation, "score_answers", lambda *of: [one for one in real(*of) if one.check != "choice"])
    rows: list[Any] = [{**row, "checks": ["ended", {"choice": "A"}]} for row in tiny.conversations(3)]
    rows[2]["checks"] = [{"contains": "\ufffd no"}]
    suite = tiny.write_jsonl(tmp_path / "suite.jsonl", rows)
    found = tune(
        *(mlx_model, data, tmp_path / "run", f"train.sample_prompts={suite}", "train.keep_by=choice"),
        *("train.steps=2", "train.eval_every=1", "train.save_every=0"),
    )
    notes = [event["text"] for event in found if event["kind"] == "note"]
    assert notes.count("answered slowly") == 1
    about = read_suite(suite).notes
    assert about and [notes.count(note) for note in about] == [1] * len(about)
    assert sum("choice (train.keep_by) applied to no answer" in note for note in notes) == 3
    evaluations = [event for event in found if event["kind"] == "eval"]
    assert [event["cut"] for event in evaluations] == [3, 3, 3]
    assert all("choice" not in event["checks"] and "ended" in event["checks"] for event in evaluations)


def scripted(patch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Let the check `contains` give these values, one evaluation after the other."""
    given = iter(values)
    patch.setattr(evaluation, "SAMPLE_TOKENS", 4)
    real = Evaluation.samples
    patch.setattr(Evaluation, "samples", lambda *of: replace(real(*of), checks={"contains": next(given)}))


def test_the_check_that_is_named_chooses_the_adapter(
    mlx_model: Path, data: Path, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss falls from step to step; the check is best after step 4, and equal once more after step 6, where the
    loss decides.
    """
    settings = (
        *(f"train.sample_prompts={suite}", "train.keep_by=contains", "train.steps=8", "train.eval_every=2"),
        *("train.keep_last=9", "train.warmup_steps=0", "train.lr=1e-3"),
    )
    for values, best in (([0.9, 0.2, 0.8, 0.5, 0.4], 4), ([0.0, 0.2, 0.8, 0.8, 0.4], 6)):
        with monkeypatch.context() as patch:
            scripted(patch, values)
            run = tmp_path / f"run{best}"
            found = tune(mlx_model, data, run, *settings)
        losses = [event["loss"] for event in found if event["kind"] == "eval"]
        assert losses == sorted(losses, reverse=True)
        assert (found[-1]["best_step"], found[-1]["best_check"]) == (best, 0.8)
        kept = tensors(run / "adapters.safetensors")
        assert kept == tensors(run / "checkpoints" / f"step-{best:07d}" / "adapters.safetensors")


def test_eval_says_of_a_suite_that_it_chose_the_adapter(
    mlx_model: Path, data: Path, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, run = Path(shutil.copy(suite, tmp_path / "own.jsonl")), tmp_path / "run"
    scripted(monkeypatch, [0.1, 0.2])
    settings = (f"train.sample_prompts={own}", "train.keep_by=contains", "train.steps=2", "train.eval_every=0")
    tune(mlx_model, data, run, *settings)
    rows = read_suite(suite).rows
    assert "3 of 3 prompts chose the checkpoint (1, 2, 3)" in " ".join(_about_data(rows, run)[1])
    (saved,) = (run / "checkpoints").glob("step-*2/state.json")
    assert json.loads(saved.read_text())["identity"]["suite"] == read_suite(own).digest
    own.unlink()
    assert "whether these prompts chose the checkpoint is not known" in " ".join(_about_data(rows, run)[1])


def test_a_run_that_a_suite_chooses_is_not_resumed_with_another_one(tmp_path: Path) -> None:
    """A score of one suite is no better than a lower one of another. Where the loss chooses, prompts may change."""

    def began(path: str, keep_by: str, digest: str) -> Identity:
        flat = {**_flat(resolve.Config()), "train.sample_prompts": path, "train.keep_by": keep_by}
        return Identity(flat, "train", "valid", "model", "mlx", suite=digest)

    with pytest.raises(UserError) as told:
        began("a", "contains", "1").refuse_other(began("a", "contains", "2"), tmp_path, anyway=True)
    assert "the suite that chooses the adapter (not what the run began with)" in told.value.message
    with pytest.raises(UserError, match=r"train\.sample_prompts"):  # of a version that did not note the digest
        began("a", "contains", "").refuse_other(began("b", "contains", "2"), tmp_path, anyway=True)
    assert began("a", "contains", "").refuse_other(began("a", "contains", "2"), tmp_path, anyway=False) == []
    for keep_by, digest in (("contains", "1"), ("loss", "")):
        notes = began("a", keep_by, digest).refuse_other(began("b", keep_by, digest), tmp_path, anyway=True)
        assert notes == ['changed since the last checkpoint: train.sample_prompts "a" -> "b"']


def test_patience_counts_evaluations_that_are_not_better_in_the_check(
    mlx_model: Path, data: Path, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.1, 0.8, 0.7, 0.6, 0.9])
    found = tune(
        *(mlx_model, data, tmp_path / "run", f"train.sample_prompts={suite}", "train.keep_by=contains"),
        *("train.patience=2", "train.steps=8", "train.eval_every=2", "train.save_every=0"),
    )
    notes = [event["text"] for event in found if event["kind"] == "note"]
    assert any("no better contains in 2 evaluations (train.patience)" in note for note in notes)
    assert max(event["step"] for event in found if event["kind"] == "train") == 6


def test_a_state_that_was_saved_before_checks_could_choose_is_read() -> None:
    state = State.of({"step": 4, "best_loss": 2.0, "best_step": 4})
    assert state.is_beaten_by(1.9, None) and not state.is_beaten_by(2.0, None)
    with pytest.raises(ValueError, match="no score"):
        State.of({"best_check": float("nan")})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("train.keep_by=contains",), "use loss, or name a suite in sample_prompts"),
        (("train.sample_prompts=SUITE", "train.keep_by=contain"), "Did you mean contains?"),
        (("train.sample_prompts=none.jsonl",), "train.sample_prompts: no data file none.jsonl"),
        (("train.sample_prompts=RUNS",), "Checks that run programs are asked by `mlxtune eval --suite` alone"),
    ],
)
def test_a_suite_that_cannot_be_asked_is_said_before_the_model_is_read(
    settings: tuple[str, ...], message: str, data: Path, suite: Path, tmp_path: Path
) -> None:
    runs: list[Any] = [{**tiny.conversations(1)[0], "checks": [{"code": "assert True"}]}]
    places = {"SUITE": str(suite), "RUNS": str(tiny.write_jsonl(tmp_path / "runs.jsonl", runs))}
    given = [text.replace(name, place) for text in settings for name, place in places.items() if name in text]
    words = options(tmp_path / "no-model", data, tmp_path / "run", *(given or settings))
    if len(settings) == 2:
        words += ["--set", settings[1]]
    tiny.refused(tmp_path / "run", *words, expected=(message,))
