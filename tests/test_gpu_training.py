"""A run whose device fails saves its last whole step, says what to do, and resumes to the bits of one without it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny
from broken import BUFFERS, LOST, OUT_OF_MEMORY, WATCHDOG, Evaluations, command, fail_gradients, failing
from training import NOISE, options, same_bits, tune

from mlxtune.compute import proof
from mlxtune.errors import UserError
from mlxtune.evaluate import generate
from mlxtune.machine import backend
from mlxtune.machine.gpu_errors import Kind
from mlxtune.train import evaluation, events, runs, step

# Step 7 of 10 begins with micro-batch 13; the run saves nothing of its own before its end.
STEPS = ("train.steps=10", "train.save_every=100")
IN_STEP_7 = 13
Break = Callable[[pytest.MonkeyPatch], Any]


def broken(model: Path, data: Path, run: Path, break_: Break, *settings: str, resume: bool = False) -> UserError:
    """Train until the device fails. Returns what is said."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as said:
        break_(patch)
        tune(model, data, run, *STEPS, *settings, resume=resume)
    return said.value


def resumed(model: Path, data: Path, run: Path, *settings: str) -> None:
    tune(model, data, run, *STEPS, *settings, resume=True)


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def undisturbed(mlx_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run of the same settings in this process that nothing disturbed; each is made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*settings: str) -> Path:
        if settings not in made:
            made[settings] = tmp_path_factory.mktemp("undisturbed") / "run"
            tune(mlx_model, data, made[settings], *STEPS, *settings)
        return made[settings]

    return run


@pytest.mark.parametrize("settings", [(), ("train.checkpoint_layers=all", *NOISE[:2])])
def test_out_of_memory_in_step_7_saves_step_6_and_the_resumed_run_has_the_same_bits(
    settings: tuple[str, ...], undisturbed: Callable[..., Path], mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    said = broken(mlx_model, data, run, lambda patch: fail_gradients(patch, IN_STEP_7), *settings)
    assert said.message == (f"there is not enough memory ({OUT_OF_MEMORY}); step 6, the last whole one, is saved")
    assert f"mlxtune train --resume-anyway --out {run} --set train.on_oom=smaller" in said.hint
    assert saved(run) == ["step-0000006"]
    end = events.read(run)[-1]
    assert (end["kind"], end["step"], end["state"]) == ("end", 6, "interrupted")
    assert OUT_OF_MEMORY in end["reason"]
    (listed,) = runs.find(run)
    assert (listed.state, listed.step) == ("interrupted", 6)
    resumed(mlx_model, data, run, *settings)
    same_bits(undisturbed(*settings), run)


def test_whichever_computation_of_a_step_fails_the_step_before_it_is_whole(
    undisturbed: Callable[..., Path], mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    """Losses, gradients, clipping, the update: the model then holds arrays that were never computed."""
    counted: dict[int, int] = {}

    def count(patch: pytest.MonkeyPatch, fail: int = 0) -> None:
        device = Evaluations(patch)
        real = step.StepFunction.__call__

        def call(self: step.StepFunction, number: int) -> dict[str, Any]:
            counted[number] = device.count
            if fail and number == 7:
                device.fail(fail, WATCHDOG)
            return real(self, number)

        patch.setattr(step.StepFunction, "__call__", call)

    with pytest.MonkeyPatch.context() as patch:
        count(patch)
        tune(mlx_model, data, tmp_path / "counted", *STEPS)
    many = counted[8] - counted[7]
    assert many >= 5
    for fail in (many - 2, many - 1):
        run = tmp_path / f"failed-{fail}"
        said = broken(mlx_model, data, run, lambda patch, fail=fail: count(patch, fail))  # type: ignore[misc]
        whole = 7 if "step 7" in said.message else 6  # the last ones may be of what comes after the step
        assert "held up the display" in said.message and f"step {whole}, the last whole one, is saved" in said.message
        assert said.hint == (
            f"Let the display sleep meanwhile (pmset displaysleepnow), and go on: mlxtune train --resume --out {run}"
        )
        assert saved(run) == [f"step-000000{whole}"]
        resumed(mlx_model, data, run)
        same_bits(undisturbed(), run)


def test_a_failure_in_an_evaluation_leaves_it_to_the_resumed_run(
    undisturbed: Callable[..., Path], mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    """Those after steps 0 and 4 are computed, that after step 8 is not; smaller parts of steps would not help."""

    def break_(patch: pytest.MonkeyPatch) -> None:
        real, calls = evaluation.score, iter([0, 4, 8])

        def score(*args: Any) -> Any:
            if next(calls) == 8:
                raise RuntimeError(OUT_OF_MEMORY)
            return real(*args)

        patch.setattr(evaluation, "score", score)

    run = tmp_path / "run"
    said = broken(mlx_model, data, run, break_)
    assert "step 8, the last whole one, is saved" in said.message
    assert said.hint == f"Close programs that hold memory, and go on: mlxtune train --resume --out {run}"
    assert ("eval", 8) not in {(event["kind"], event.get("step")) for event in events.read(run)}
    resumed(mlx_model, data, run)
    same_bits(undisturbed(), run)


def test_a_failure_while_sampling_is_one_of_its_evaluation(
    undisturbed: Callable[..., Path], mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    asked = "train.sample_prompts=[hi]"
    answers = iter(["0", "4"])

    def answer(*_: Any, **__: Any) -> str:
        found = next(answers, "")
        if not found:
            raise RuntimeError(BUFFERS)
        return found

    run = tmp_path / "run"
    said = broken(mlx_model, data, run, lambda patch: patch.setattr(generate, "answer", answer), asked)
    assert said.message.startswith(f"the GPU has no buffers left ({BUFFERS}); step 8")
    assert said.hint == f"To go on, with none of them taken: mlxtune train --resume --out {run}"
    resumed(mlx_model, data, run, asked)
    same_bits(undisturbed(), run)


def test_a_failure_in_the_first_step_leaves_nothing_and_says_so(mlx_model: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = broken(mlx_model, data, run, lambda patch: fail_gradients(patch, 1))
    assert said.message.endswith("; no step was finished, so nothing is saved")
    assert said.hint == (
        "Close programs that hold memory, or begin with --set train.on_oom=smaller, "
        "--set train.checkpoint_layers=all, --set train.batch_rows=1, a lower data.max_tokens."
    )
    assert not run.exists()
    small = ("train.checkpoint_layers=all", "train.batch_rows=1", "train.on_oom=smaller")
    said = broken(mlx_model, data, run, lambda patch: fail_gradients(patch, 1), *small)
    assert said.hint == "Close programs that hold memory, or begin with a lower data.max_tokens."
    said = broken(mlx_model, data, run, lambda patch: fail_gradients(patch, 1, LOST))
    assert "takes no more work" in said.message and "restart the machine" in said.hint
    assert not run.exists()


def test_a_failure_right_after_resuming_keeps_the_checkpoint_it_began_from(
    undisturbed: Callable[..., Path], mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    broken(mlx_model, data, run, lambda patch: fail_gradients(patch, IN_STEP_7))

    def no_memory(patch: pytest.MonkeyPatch) -> None:
        fail_gradients(patch, 1, "std::bad_alloc", kind=MemoryError)  # the machine's own

    said = broken(mlx_model, data, run, no_memory, resume=True)
    assert said.message == "there is not enough memory (std::bad_alloc); step 6, the last whole one, is saved"
    assert saved(run) == ["step-0000006"]
    resumed(mlx_model, data, run)
    same_bits(undisturbed(), run)


NEEDS_COMPILER = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="needs a C++ compiler")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU: the step is one compiled function."""
    policy = replace(backend.policy(), compiled=True)
    monkeypatch.setattr(backend, "policy", lambda: policy)
    mx.enable_compile()
    yield
    mx.disable_compile()


@NEEDS_COMPILER
def test_a_compiled_step_that_fails_leaves_the_step_before_it_whole(
    compiled: None, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    few = ("train.steps=8", "train.batch_rows=4", "train.accumulate=1", "train.save_every=100")
    tune(mlx_model, data, tmp_path / "whole", *few)
    assert any("compiled" in event.get("text", "") for event in events.read(tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="step 6, the last whole one, is saved"):
        fail_gradients(patch, 7)
        tune(mlx_model, data, tmp_path / "run", *few)
    tune(mlx_model, data, tmp_path / "run", *few, resume=True)
    same_bits(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("text", [WATCHDOG, OUT_OF_MEMORY])
def test_a_failure_in_the_proof_is_not_the_models_fault(
    text: str, mlx_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No slower way is taken for it, nothing of the run is left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof.Gradients, "__call__", failing(text))
        result = command(capsys, *options(mlx_model, data, tmp_path / "run", *STEPS))
    said = tiny.one_clear_line(result, text)
    assert "not used" not in said
    tiny.nothing_written(tmp_path / "run")


def test_a_failure_in_a_run_is_one_line_of_the_command(
    mlx_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_gradients(patch, IN_STEP_7, LOST)
        result = command(capsys, *options(mlx_model, data, tmp_path / "run", *STEPS))
    tiny.one_clear_line(
        result,
        f"{Kind.LOST.value} ({LOST}); step 6, the last whole one, is saved",
        f"To go on: mlxtune train --resume --out {tmp_path / 'run'}; if it fails again, restart the machine",
    )
