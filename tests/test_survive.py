"""A run that is killed, interrupted, torn or begun twice, and what is left of it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny
from rich.console import Console
from training import NOISE, SETTINGS, losses, options, same_bits, scale_losses, tune

from mlxtune import errors
from mlxtune.cli.display import Display
from mlxtune.config import resolve
from mlxtune.train import checkpoint, evaluation, events, signals
from mlxtune.train.run import tune as train
from mlxtune.train.run_folder import CONFIG_FILE, EVENTS_FILE, RunFolder

# Trains in a child the run that each line names: starting Python and its libraries 26 times would take minutes.
WORKER = """
import os, sys
from ctypes.util import find_library
from pathlib import Path
from rich.console import Console
from mlxtune.cli.display import Display
from mlxtune.config import resolve
from mlxtune.train.run import tune
from mlxtune.train.run_folder import RunFolder
settings = resolve.load(sys.argv[1])
for line in sys.stdin:
    run = Path(line.strip())
    if (child := os.fork()) == 0:
        with Display(Console(quiet=True)) as display:
            tune(settings, run, display, resume=RunFolder(run).has_work())
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
sys.exit()
"""
KILLS = 25


def test_a_run_killed_25_times_ends_with_the_bits_of_one_that_was_not(
    mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    """SIGKILL at random moments, some inside a checkpoint; with dropout, NEFTune, accumulation, a mixture, epochs."""
    sources = f"data.sources=[{{path: {data}, weight: 2}}, {{path: {data / 'valid.jsonl'}, weight: 1}}]"
    settings = (*SETTINGS[1:], "train.epochs=6", "train.save_every=1", sources, *NOISE)
    file, whole, run = (tmp_path / name for name in ("killed.yaml", "whole", "killed"))
    file.write_text(resolve.load(None, settings, {"model.path": str(mlx_model)}).to_yaml())
    draw, in_writing, codes = random.Random(0), 0, []
    with tiny.started(file, code=WORKER, OPENBLAS_NUM_THREADS="1") as worker:  # bits depend on the BLAS's threads
        assert worker.stdin and worker.stdout

        def start(folder: Path) -> int:
            worker.stdin.write(f"{folder}\n")
            worker.stdin.flush()
            return int(worker.stdout.readline())

        start(whole)
        assert worker.stdout.readline() == "0\n"
        # Of the time that it trained, without what came before.
        a_part = ((whole / EVENTS_FILE).stat().st_mtime - (whole / CONFIG_FILE).stat().st_mtime) / KILLS
        for number in range(KILLS):
            before = lines(run)
            child = start(run)
            while lines(run) <= before:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, a_part))
            inside = time.monotonic() + (2 * a_part if number % 3 == 0 else 0)
            while time.monotonic() < inside and not list((run / "checkpoints").glob(".step-*")):
                pass
            os.kill(child, signal.SIGKILL)
            codes.append(int(worker.stdout.readline()))
            in_writing += bool(list((run / "checkpoints").glob(".step-*")))
        start(run)
        assert worker.stdout.readline() == "0\n"
        worker.stdin.close()
    assert codes == [-signal.SIGKILL] * KILLS
    assert in_writing >= 1
    assert sum(event["kind"] == "begin" for event in events.read(run)) > 10
    same_bits(whole, run)


def lines(run: Path) -> int:
    """How many a run wrote so far."""
    file = run / EVENTS_FILE
    return file.read_text().count("\n") if file.exists() else 0


@pytest.fixture(scope="module")
def noisy(mlx_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with dropout and NEFTune that nothing interrupted, made in this process."""
    out = tmp_path_factory.mktemp("noisy") / "run"
    tune(mlx_model, data, out, *NOISE[:2])
    return out


@pytest.mark.parametrize("steps", [1, 7])
def test_ctrl_c_finishes_the_step_and_the_resumed_run_has_the_same_bits(
    steps: int, noisy: Path, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(errors.Interrupted) as stopped:
        tiny.interrupt_after(patch, steps)
        tune(mlx_model, data, tmp_path / "cut", *NOISE[:2])
    assert stopped.value.exit_code == 130
    assert f"after step {steps}; to go on: mlxtune train --resume --out {tmp_path / 'cut'}" in str(stopped.value)
    assert json.loads((tmp_path / "cut/events.jsonl").read_text().splitlines()[-1])["state"] == "interrupted"
    flags = {"model.path": str(mlx_model), "data.path": str(data)}
    assert RunFolder(tmp_path / "cut").config().data.path == resolve.load(None, (), flags).data.path
    tune(mlx_model, data, tmp_path / "cut", *NOISE[:2], resume=True)
    same_bits(noisy, tmp_path / "cut")


def test_ctrl_c_during_an_evaluation_leaves_it_to_the_resumed_run(
    noisy: Path, mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is written without the evaluation of its step; whoever resumes evaluates first."""
    with monkeypatch.context() as patch, pytest.raises(errors.Interrupted):
        tiny.interrupt_after(patch, 8)
        tune(mlx_model, data, tmp_path / "cut", *NOISE[:2])
    cut = losses(tmp_path / "cut")
    assert ("train", 8) in cut and ("eval", 8) not in cut
    tune(mlx_model, data, tmp_path / "cut", *NOISE[:2], resume=True)
    same_bits(noisy, tmp_path / "cut")


def test_ctrl_c_before_the_first_step_says_that_nothing_is_left(
    mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(*asked: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            time.sleep(0.01)
            asked[-1]()  # raises when the signal has been heard

    monkeypatch.setattr(evaluation, "score", score)
    with pytest.raises(errors.Interrupted) as stopped:
        tune(mlx_model, data, tmp_path / "cut")
    said = f"stopped before the first step; nothing was saved, and {tmp_path / 'cut'} is removed"
    assert str(stopped.value) == said and not (tmp_path / "cut").exists()


# A step that takes a minute.
SLOW = """
import sys, time
from mlxtune.train import step
real = step.StepFunction.__call__
def call(self, number):
    event = real(self, number)
    if number == 4:
        print("in step 4", file=sys.stderr, flush=True)
        time.sleep(60)
    return event
step.StepFunction.__call__ = call
"""


@pytest.mark.parametrize(("signals_sent", "patience"), [(2, 60.0), (1, 0.2)])
def test_a_step_that_should_end_is_given_up_between_micro_batches(
    signals_sent: int, patience: float, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    """Eight micro-batches, half a second each from step 4 on; nothing was saved before. After a second signal, or when
    the step lasts too long, the run ends in order, and not from the thread that watches for signals.
    """
    long = ("train.accumulate=8", "train.batch_rows=1", "train.save_every=0", "train.steps=5")
    tune(mlx_model, data, tmp_path / "whole", *long)
    began = 0

    def slow(count: int) -> float:
        nonlocal began
        began = count
        if 8 * 3 + 2 <= count < 8 * 3 + 2 + signals_sent:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5 if count > 8 * 3 else 0)
        return 1.0

    with pytest.MonkeyPatch.context() as patch, pytest.raises(errors.Interrupted, match="stopped after step 3; to go"):
        scale_losses(patch, slow)
        patch.setattr(signals, "STEP_SECONDS", patience)
        patch.setattr(signals, "GIVE_UP_SECONDS", 60.0)
        tune(mlx_model, data, tmp_path / "cut", *long)
    assert 8 * 3 + 2 <= began < 8 * 3 + 7
    tune(mlx_model, data, tmp_path / "cut", *long, resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_a_second_process_on_the_same_run_is_refused(run: Path, mlx_model: Path, data: Path, tmp_path: Path) -> None:
    with tiny.started(*options(mlx_model, data, tmp_path / "run"), code=SLOW) as process:
        assert process.stderr
        next(line for line in process.stderr if line.startswith("in step 4"))
        result = tiny.mlxtune("train", "--resume", "--out", tmp_path / "run")
        tiny.one_clear_line(result, f"process {process.pid} is training here")
        listed = json.loads(tiny.mlxtune("runs", tmp_path, "--json").stdout)
        assert [(one["state"], one["steps"]) for one in listed] == [("running", 24)]
        process.kill()
    listed = json.loads(tiny.mlxtune("runs", tmp_path, "--json").stdout)
    assert [(one["state"], one["step"]) for one in listed] == [("killed", 3)]
    assert tiny.mlxtune("train", "--resume", "--out", tmp_path / "run").returncode == 0
    (found,) = json.loads(tiny.mlxtune("runs", tmp_path, "--json").stdout)
    assert (found["state"], found["step"], found["model"]) == ("finished", 24, mlx_model.name)
    assert found["best_loss"] == min(loss for (kind, step), loss in losses(tmp_path / "run").items() if kind == "eval")


def test_a_run_killed_before_it_saved_anything_can_be_begun_again(
    mlx_model: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/adapters.safetensors").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints")
    before = (tmp_path / "run/events.jsonl").read_text().splitlines()
    found = tune(mlx_model, data, tmp_path / "run")
    assert len(found) == len(before)
    assert sum(event["kind"] == "begin" for event in found) == 1


def truncated(run: Path) -> None:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    os.truncate(newest / "adapters.safetensors", 1000)


def flipped(run: Path) -> None:
    file = sorted((run / "checkpoints").glob("step-*"))[-1] / checkpoint.OPTIMIZER_FILE
    bits = bytearray(file.read_bytes())
    bits[-1] ^= 1
    file.write_bytes(bits)


def emptied(run: Path) -> None:
    (sorted((run / "checkpoints").glob("step-*"))[-1] / checkpoint.STATE_FILE).write_text("")


@pytest.mark.parametrize("damage", [truncated, flipped, emptied])
def test_a_torn_checkpoint_is_skipped_with_a_line_and_the_one_before_it_used(
    damage: Any, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run")
    result = tiny.mlxtune("train", "--resume", "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "step-0000024 is incomplete" in result.stderr and "resumed after step 22" in result.stderr
    assert "last bits may differ" not in result.stderr
    same_bits(whole, tmp_path / "run")


# The command in a process that loaded MLX before mlxtune could choose what it multiplies with.
MLX_FIRST = "import sys; import mlx.core; from mlxtune.cli import main; main(sys.argv[1:])"


@pytest.mark.skipif(sys.platform != "linux" or not find_library("openblas"), reason="needs OpenBLAS on Linux")
def test_a_resume_says_when_another_library_multiplies(whole: Path, tmp_path: Path) -> None:
    """Its sums have another order: the last bits may be others than those of the run that went on."""
    shutil.copytree(whole, tmp_path / "run")
    emptied(tmp_path / "run")
    words = [sys.executable, "-c", MLX_FIRST, "train", "--resume", "--out", str(tmp_path / "run")]
    wide = {**os.environ, "COLUMNS": "500"}
    said = subprocess.run(words, capture_output=True, text=True, check=True, env=wide).stderr
    began = (
        r"the run began with OpenBLAS [\d.]+ for \w+ in \d+ threads?, this is MLX's own BLAS: the last bits may differ"
    )
    assert "resumed after step 22" in said and re.search(began, said), said


def changed_model(model: Path) -> None:
    tensors = mx.load(str(model / "model.safetensors"))
    name = next(name for name in tensors if name.endswith("scales"))  # type: ignore[union-attr]
    tensors[name] = tensors[name] * 1.01  # type: ignore[index]
    mx.eval(tensors)
    mx.save_safetensors(str(model / "model.safetensors"), tensors)  # type: ignore[arg-type]


def test_a_resume_under_other_settings_data_or_weights_is_refused_with_the_difference(
    mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    model, rows, run = (tmp_path / name for name in ("model", "data", "run"))
    shutil.copytree(mlx_model, model)
    shutil.copytree(data, rows)
    tune(model, rows, run, "train.steps=4")

    def resume(*settings: str, anyway: bool = False) -> None:
        with Display(Console(quiet=True)) as display:
            train(resolve.load(run / CONFIG_FILE, settings), run, display, True, anyway)

    for setting, said in {
        "train.lr=1e-3": "train.lr 0.005 -> 0.001",
        "lora.alpha=3": "lora.alpha 32.0 -> 3.0",
        "data.train_on=last": "data.train_on",
    }.items():
        for anyway in (False, True):
            with pytest.raises(errors.UserError, match=f"cannot be resumed, for this changed: {re.escape(said)}"):
                resume(setting, anyway=anyway)
    refused = tiny.mlxtune("train", "--resume", "--out", run, "--set", "train.steps=6")
    tiny.one_clear_line(refused, "train.steps 4 -> 6", "--resume-anyway")
    longer = tiny.mlxtune("train", "--resume-anyway", "--out", run, "--set", "train.steps=6")
    assert longer.returncode == 0, longer.stderr
    assert events.read(run)[-1]["step"] == 6
    assert RunFolder(run).config().train.steps == 6
    kept = (rows / "train.jsonl").read_text()
    (rows / "train.jsonl").write_text(kept.replace("number 3?", "number three?"))
    with pytest.raises(errors.UserError, match="for this changed: the training examples"):
        resume()
    (rows / "train.jsonl").write_text(kept)
    resume()
    (tmp_path / "moved").mkdir()
    model.rename(tmp_path / "moved/model")  # the same model elsewhere is the same model
    resume(f"model.path={tmp_path}/moved/model", "train.steps=7", anyway=True)
    changed_model(tmp_path / "moved/model")
    with pytest.raises(errors.UserError, match="for this changed: the base model"):
        resume()
