"""Bad numbers, a full disk, a folder that turns read-only: what a run does then, and what it says."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny
from training import options, scale_losses, tune

from mlxtune import errors
from mlxtune.machine import surroundings
from mlxtune.train import loggers


def poison(patch: pytest.MonkeyPatch, *steps: int) -> None:
    """A NaN in the loss of the second micro-batch of these steps."""
    scale_losses(patch, lambda count: math.nan if (count + 1) // 2 in steps and count % 2 == 0 else 1.0)


def test_steps_with_bad_numbers_are_skipped_as_often_as_is_allowed(
    mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 3, 7)
    found = tune(mlx_model, data, tmp_path / "skip", "train.on_nonfinite=skip", "train.steps=8")
    assert [event["step"] for event in found if event["kind"] == "train"] == [1, 2, 4, 5, 6, 8]
    said = [event["text"] for event in found if "skipped" in event.get("text", "")]
    assert [event["step"] for event in found if event["kind"] == "note" and event.get("nonfinite")] == [3, 7]
    assert len(said) == 2 and said[0].startswith("step 3: the loss is not finite in float32 (nan)")
    assert len(re.findall(r"line \d+", said[0])) == 2  # the rows of the micro-batch at fault, not of both
    monkeypatch.undo()
    poison(monkeypatch, *range(2, 24))
    with pytest.raises(errors.UserError, match=r"step 12: .* \(10 steps were skipped before it\)"):
        tune(mlx_model, data, tmp_path / "stop", "train.on_nonfinite=skip")
    kept = mx.load(str(tmp_path / "stop" / "adapters.safetensors"))
    assert all(mx.isfinite(array).all().item() for array in kept.values())  # type: ignore[union-attr]


def test_patience_ends_a_run_that_gets_no_better_and_keeps_the_best_beside_the_last(
    mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    settings = ("train.lr=1", "train.schedule=constant", "train.eval_every=1", "train.patience=3", "train.keep=last")
    found = tune(mlx_model, data, tmp_path / "run", *settings)
    scores = {event["step"]: event["loss"] for event in found if event["kind"] == "eval" and event["step"]}
    best = min(scores, key=lambda step: scores[step])
    assert max(scores) == best + 3 < 24
    assert found[-1]["best_step"] == best
    for name, wanted in (("run/checkpoints/best", scores[best]), ("run", scores[max(scores)])):
        scored = tiny.mlxtune("eval", "--model", mlx_model, "--adapter", tmp_path / name, "--data", data, "--json")
        assert json.loads(scored.stdout)["tuned"]["loss"] == pytest.approx(wanted, rel=1e-5)


def test_a_loss_far_above_the_usual_is_noted_with_its_rows(
    mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale_losses(monkeypatch, lambda count: 3.0 if count > 46 else 1.0)
    found = tune(mlx_model, data, tmp_path / "run", "train.lr=1e-5")
    said = [event["text"] for event in found if "jumped" in event.get("text", "")]
    assert len(said) == 1 and said[0].startswith("step 24: the loss jumped to") and said[0].count("line ") == 4


def test_a_folder_that_turns_unwritable_ends_the_run_in_one_line(mlx_model: Path, data: Path, tmp_path: Path) -> None:
    """Root writes anywhere: the child gives up its rights in the middle."""
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from mlxtune.train import step\n"
        "real = step.StepFunction.__call__\n"
        "def call(self, number):\n"
        "    if number == 7:\n"
        f"        Path({str(tmp_path / 'run')!r}, 'checkpoints').chmod(0o555)\n"
        "        if os.geteuid() == 0: os.seteuid(65534)\n"
        "    return real(self, number)\n"
        "step.StepFunction.__call__ = call\n"
    )
    process = tiny.started(*options(mlx_model, data, tmp_path / "run"), code=code)
    out, err = process.communicate()
    result = subprocess.CompletedProcess([], process.wait(), out, err)
    tiny.one_clear_line(result, "cannot write", "permission denied")
    kept = sorted(folder.name for folder in (tmp_path / "run/checkpoints").iterdir())
    assert kept == [f"step-{step:07d}" for step in (2, 4, 6)]


def test_sampled_answers_are_kept_with_each_evaluation(mlx_model: Path, data: Path, tmp_path: Path) -> None:
    found = tune(
        mlx_model, data, tmp_path / "run", 'train.sample_prompts=["Question number 3?"]', "train.eval_every=12"
    )
    evaluations = [event for event in found if event["kind"] == "eval"]
    assert [event["step"] for event in evaluations] == [0, 12, 24]
    assert all(event["samples"][0]["prompt"] == "Question number 3?" for event in evaluations)
    said = tiny.mlxtune(
        *("generate", "--model", mlx_model, "--adapter", tmp_path / "run", "--prompt", "Question number 3?"),
        *("--max-tokens", "128"),
    )
    assert evaluations[-1]["samples"][0]["answer"].strip() == said.stdout.strip()


def test_a_logger_that_is_not_installed_is_an_error_at_start(mlx_model: Path, data: Path, tmp_path: Path) -> None:
    words = options(mlx_model, data, tmp_path / "run", "train.loggers=[trackio]")
    tiny.refused(tmp_path / "run", *words, expected=("trackio needs the package trackio", "pip install"))


def test_a_logger_that_fails_later_is_noted_and_the_run_goes_on(
    mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for tensorboardX whose disk is gone after the third number."""
    written: list[Any] = []

    class Writer:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def add_scalar(self, *numbers: Any) -> None:
            written.append(numbers)
            if len(written) > 3:
                raise ConnectionError("gone")

        close = __init__

    monkeypatch.setitem(sys.modules, "tensorboardX", type(sys)("tensorboardX"))
    monkeypatch.setattr(sys.modules["tensorboardX"], "SummaryWriter", Writer, raising=False)
    monkeypatch.setattr(loggers, "require", lambda names: None)
    found = tune(mlx_model, data, tmp_path / "run", "train.loggers=[tensorboard]")
    assert [numbers[0] for numbers in written] == ["valid/loss", "train/loss", "train/lr", "train/grad_norm"]
    assert sum("tensorboard takes no more numbers" in event.get("text", "") for event in found) == 1
    assert found[-1]["state"] == "finished"


def test_machines_that_may_stop_in_the_middle_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux's battery files, as the kernel documents them (Documentation/ABI/testing/sysfs-class-power)."""
    supply = tmp_path / "BAT0"
    supply.mkdir()
    monkeypatch.setattr(surroundings, "POWER", tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    for status, percent, expected in (("Discharging", 15, 15), ("Discharging", 80, 80), ("Charging", 15, None)):
        (supply / "status").write_text(f"{status}\n")
        (supply / "capacity").write_text(f"{percent}\n")
        assert surroundings.battery() == expected
        said = surroundings.warnings(tmp_path, needed=0)
        assert bool(said) == (expected is not None)
        assert any("low" in line for line in said) == (expected == 15)
    assert " of disk are free" in surroundings.warnings(tmp_path, needed=1 << 60)[-1]


def test_a_mac_is_kept_awake_until_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for macOS's caffeinate that notes its arguments and stays until it is told to go."""
    tool = tmp_path / "caffeinate"
    tool.write_text(f"#!/bin/sh\necho $$ $* > {tmp_path}/called\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "platform", "darwin")
    with surroundings.kept_awake() as awake:
        assert awake
        while not (tmp_path / "called").exists() or not (tmp_path / "called").read_text():
            time.sleep(0.01)
        process, *arguments = (tmp_path / "called").read_text().split()
        assert arguments == ["-i", "-w", str(os.getpid())]
        os.kill(int(process), 0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)
