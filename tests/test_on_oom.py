"""`train.on_oom: smaller`: a step that does not fit the memory is computed in smaller parts, as are those after it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest
import tiny
from broken import OUT_OF_MEMORY, WATCHDOG, fail_gradients
from test_ranks import finished, launched, program, two
from training import NOISE, losses, options, same_bits, tune

from mlxtune.compute import pieces, proof
from mlxtune.compute.division import Division
from mlxtune.compute.loss import Way
from mlxtune.data.dataset.batches import Batch
from mlxtune.errors import UserError
from mlxtune.train import checkpoint, events
from mlxtune.train.run_folder import RunFolder

STOP = ("train.steps=8", "train.batch_rows=4", "train.accumulate=2", "train.save_every=100")
SMALLER = (*STOP, "train.on_oom=smaller")
IN_STEP_7 = 13  # of two micro-batches a step
Fits = Callable[[Batch, Way], bool]


def one_row(batch: Batch, way: Way) -> bool:
    return len(batch.rows) == 1


def one_row_checkpointed(batch: Batch, way: Way) -> bool:
    return len(batch.rows) == 1 and way.recompute == 1


def divisions(run: Path) -> list[tuple[int, int, bool]]:
    """(last whole step, halved, checkpointed) of every division of a run."""
    return [(e["step"], e["halved"], e["checkpointed"]) for e in events.read(run) if "halved" in e]


def close(run: Path, other: Path) -> None:
    assert losses(run).keys() == losses(other).keys()
    for at, loss in losses(other).items():
        assert losses(run)[at] == pytest.approx(loss, rel=1e-5), at


@pytest.fixture(scope="module")
def enough(mlx_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with memory enough."""
    run = tmp_path_factory.mktemp("enough") / "run"
    tune(mlx_model, data, run, *STOP)
    return run


@pytest.mark.parametrize("noise", [(), NOISE[:2]], ids=["", "dropout and NEFTune"])
def test_the_losses_are_those_of_a_run_with_memory_enough(
    noise: tuple[str, ...], mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    tune(mlx_model, data, tmp_path / "enough", *SMALLER, *noise)
    with pytest.MonkeyPatch.context() as patch:
        sizes = fail_gradients(patch, IN_STEP_7, fits=one_row)
        found = tune(mlx_model, data, tmp_path / "run", *SMALLER, *noise)
    close(tmp_path / "run", tmp_path / "enough")
    assert divisions(tmp_path / "run") == [(6, 1, False), (6, 2, False)]
    assert sizes[: IN_STEP_7 - 1] == [4] * 12 and set(sizes[IN_STEP_7 - 1 :]) == {1}
    assert len(sizes) == 6 * 2 + 2 * 8  # nothing is tried in large parts again
    said = [event["text"] for event in found if "halved" in event]
    assert said[0] == (
        f"step 7: there is not enough memory ({OUT_OF_MEMORY}); "
        "from here on each micro-batch in up to 2 parts (train.on_oom: smaller)"
    )
    assert [event["state"] for event in found if event["kind"] == "end"] == ["finished"]


def test_single_rows_that_do_not_fit_are_checkpointed_and_then_the_run_stops_and_can_go_on(
    enough: Path, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        fail_gradients(patch, 1, fits=one_row_checkpointed)
        tune(mlx_model, data, tmp_path / "checkpointed", *SMALLER)
    close(tmp_path / "checkpointed", enough)
    assert divisions(tmp_path / "checkpointed") == [(0, 1, False), (0, 2, False), (0, 2, True)]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as said:
        fail_gradients(patch, IN_STEP_7, fits=lambda batch, way: False)
        tune(mlx_model, data, run, *SMALLER)
    assert "step 6, the last whole one, is saved" in said.value.message
    assert said.value.hint == f"Close programs that hold memory, and go on: mlxtune train --resume --out {run}"
    assert divisions(run) == [(6, 1, False), (6, 2, False), (6, 2, True)]
    state = RunFolder(run).newest(lambda _: None).state
    assert (state.step, state.halved, state.checkpointed) == (6, 2, True)
    with pytest.MonkeyPatch.context() as patch:
        sizes = fail_gradients(patch, 1 << 30)
        tune(mlx_model, data, run, *SMALLER, resume=True)
    assert set(sizes) == {1}
    close(run, enough)


def test_single_rows_that_do_not_fit_checkpointed_go_on_in_pieces(
    enough: Path, mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows are longer than a piece. Whoever resumes goes on so."""
    monkeypatch.setattr(pieces, "TOKENS", 16)
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        fail_gradients(patch, IN_STEP_7, fits=lambda batch, way: len(batch.rows) == 1 and way.tokens == 16)
        found = tune(mlx_model, data, run, *SMALLER)
    close(run, enough)
    assert divisions(run) == [(6, 1, False), (6, 2, False), (6, 2, True), (6, 2, True)]
    (said,) = [event["text"] for event in found if event.get("in_pieces")]
    assert said.endswith(
        "from here on each micro-batch in up to 4 parts, every block checkpointed and in pieces of a row "
        "(train.on_oom: smaller)"
    )
    state = RunFolder(run).newest(lambda _: None).state
    assert (state.halved, state.checkpointed, state.in_pieces) == (2, True, True)


def test_pieces_that_do_not_reproduce_the_model_are_not_used(
    mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shortest row is compared in several pieces, though it is no longer than one of the run's."""
    monkeypatch.setattr(pieces, "TOKENS", 64)  # rows have 55 to 78 tokens
    real = pieces.gradients_of

    def without_keys_before(*known: Any) -> Any:
        parameters, tokens, before = real(*known)
        return parameters, tokens, [array * 0 for array in before]

    monkeypatch.setattr(pieces, "gradients_of", without_keys_before)
    fail_gradients(monkeypatch, IN_STEP_7, fits=lambda batch, way: way.tokens > 0)
    with pytest.raises(UserError, match="step 6, the last whole one, is saved"):
        tune(mlx_model, data, tmp_path / "run", *SMALLER)
    assert divisions(tmp_path / "run")[-1] == (6, 2, True)
    told = [event.get("text", "") for event in events.read(tmp_path / "run")]
    assert "computing blocks in pieces of a row does not give this model's gradients: it is not used" in told


def test_checkpointing_that_does_not_reproduce_the_model_is_not_used(
    mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = proof.sums_of

    def wrong(model: nn.Module, way: Way, batch: Batch) -> proof.Sums:
        loss, gradients = real(model, way, batch)
        return loss, {name: gradient * (1 + 2e-3 * way.recompute) for name, gradient in gradients.items()}

    monkeypatch.setattr(proof, "sums_of", wrong)
    fail_gradients(monkeypatch, IN_STEP_7, fits=one_row_checkpointed)
    with pytest.raises(UserError, match="step 6, the last whole one, is saved"):
        tune(mlx_model, data, tmp_path / "run", *SMALLER)
    assert divisions(tmp_path / "run")[-1] == (6, 2, False)
    assert any(
        "does not give this model's gradients" in event.get("text", "") for event in events.read(tmp_path / "run")
    )


def test_only_memory_makes_steps_smaller(mlx_model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="held up the display"):
        fail_gradients(patch, IN_STEP_7, WATCHDOG)
        tune(mlx_model, data, tmp_path / "run", *SMALLER)
    assert divisions(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("rows", "halved", "parts"), [(4, 0, [4]), (4, 1, [2, 2]), (5, 1, [3, 2]), (5, 2, [2, 1, 1, 1]), (1, 3, [1])]
)
def test_a_micro_batch_is_cut_into_halves_whose_rows_keep_their_order(rows: int, halved: int, parts: list[int]) -> None:
    ids = np.arange(rows * 3).reshape(rows, 3)
    batch = Batch(np.arange(rows), ids, np.full(rows, 3), np.ones_like(ids))
    cut = Division(halved).parts(batch)
    assert [len(part.rows) for part in cut] == parts
    np.testing.assert_array_equal(np.concatenate([part.ids for part in cut]), ids)
    np.testing.assert_array_equal(np.concatenate([part.rows for part in cut]), np.arange(rows))


def test_a_stopped_run_goes_on_in_smaller_parts_when_asked_to(
    enough: Path, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError):
        fail_gradients(patch, IN_STEP_7, fits=one_row)
        tune(mlx_model, data, run, *STOP)
    with pytest.MonkeyPatch.context() as patch:
        fail_gradients(patch, 1, fits=one_row)
        with pytest.raises(UserError, match="resume-anyway"):
            tune(mlx_model, data, run, *SMALLER, resume=True)
        tune(mlx_model, data, run, *SMALLER, resume=True, anyway=True)
    close(run, enough)


def test_a_checkpoint_of_a_version_without_divisions_is_resumed(
    enough: Path, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError):
        fail_gradients(patch, IN_STEP_7)
        tune(mlx_model, data, tmp_path / "run", *STOP)
    file = tmp_path / "run/checkpoints/step-0000006" / checkpoint.STATE_FILE
    saved = json.loads(file.read_text())
    del saved["state"]["halved"], saved["state"]["checkpointed"], saved["identity"]["config"]["train.on_oom"]
    file.write_text(json.dumps(saved))
    tune(mlx_model, data, tmp_path / "run", *STOP, resume=True)
    same_bits(enough, tmp_path / "run")


# Before the command: a device that has no room for more than one row from a step on, on the process of a rank; where a
# file is named, it is made two steps later, and everything waits there to be killed.
LITTLE = """
import time
from pathlib import Path
from mlxtune.train import step
import mlx.core as mx  # after mlxtune, which chooses the BLAS
first, rank, mark = {asked}
text = "[metal::malloc] Attempting to allocate 8 bytes which is greater than the maximum allowed buffer size of 4."
class Little(step.Gradients):
    def __call__(self, batch):
        if number[0] >= first and len(batch.rows) > 1 and mx.distributed.init().rank() == rank:
            raise RuntimeError(text)
        return super().__call__(batch)
real, number = step.StepFunction.__call__, [0]
def call(self, which):
    number[0] = which
    if which == first + 2 and mark:
        Path(mark).touch()
        time.sleep(100)
    return real(self, which)
step.Gradients, step.StepFunction.__call__ = Little, call
"""


def little(first: int, rank: int, mark: str = "") -> str:
    return LITTLE.replace("{asked}", repr((first, rank, mark)))


def test_a_run_killed_after_a_division_is_resumed_to_the_bits_of_one_that_went_on(
    mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    """SIGKILL in step 7, nothing saved since the division; the resumed run has memory enough, and divides all the
    same."""
    went_on, killed, mark = (tmp_path / name for name in ("went-on", "killed", "mark"))
    with tiny.started(*options(mlx_model, data, killed, *SMALLER), code=little(5, 0, str(mark))) as process:
        done = tiny.started(*options(mlx_model, data, went_on, *SMALLER), code=little(5, 0))
        while not mark.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.kill()
    said = done.communicate()[1]
    assert done.returncode == 0 and "one array is larger than the GPU takes ([metal::malloc]" in said, said
    assert [path.name for path in (killed / "checkpoints").glob("step-*")] == ["step-0000004"]
    resumed = tiny.mlxtune("train", "--resume", "--out", killed)
    assert resumed.returncode == 0, resumed.stderr
    same_bits(went_on, killed)
    assert divisions(went_on) == divisions(killed) == [(4, 1, False), (4, 2, False)]


def test_what_one_of_two_processes_has_no_memory_for_both_compute_in_smaller_parts(
    mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    tune(mlx_model, data, tmp_path / "one", *STOP, *THREE)
    words = options(mlx_model, data, tmp_path / "two", *STOP, *THREE, "train.on_oom=smaller")
    said = two(tmp_path, *words, code=little(2, 1))
    assert "Traceback" not in said, said
    close(tmp_path / "two", tmp_path / "one")
    assert divisions(tmp_path / "two") == [(1, 1, False), (1, 2, False)]


def test_a_process_that_fails_says_why_and_the_first_one_saves_its_last_whole_step(
    mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    words = options(mlx_model, data, tmp_path / "run", *STOP, *THREE)
    said = finished(launched(2, *words, program=program(tmp_path, little(2, 1))))
    assert "Traceback" not in said, said
    assert "than the GPU takes ([metal::malloc]" in said and "the run of 2 processes ends" in said
    # The first one sees that the other is gone, or is told to stop by the launcher, which saw it too.
    assert "another of the 2 processes is gone, and with it the run" in said or "\nstopped" in said
    assert RunFolder(tmp_path / "run").newest(lambda _: None).state.step == 1


THREE = ("train.steps=3", "train.eval_every=0")
