"""What signals do to a run: the first one waits for the step, the second one saves what is whole before it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import stopping
from stopping import Stopping
from test_ranks import pair, said_by
from training import SETTINGS, losses, tensors

from mlxtune.train import events
from mlxtune.train.signals import ignored

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
NEVER = ("train.steps=8", "train.save_every=0", "train.save_minutes=0", "train.eval_every=0", "lora.dropout=0.1")
FOREVER = 100.0


@pytest.fixture(scope="module")
def begin() -> Iterator[Stopping]:
    with stopping.worker() as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed(begin: Stopping, mlx_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert begin.start(out, words(mlx_model, data, out)).ended()[0] == 0
    return out


def words(model: Path, data: Path, out: Path, *settings: str) -> list[str]:
    chosen = (*SETTINGS, *NEVER, *settings)
    flags = ["train", "--model", str(model), "--data", str(data), "--out", str(out)]
    return [*flags, *(word for setting in chosen for word in ("--set", setting))]


def goes_on(begin: Stopping, out: Path, undisturbed: Path) -> None:
    """Resumed, it ends with the bits of the undisturbed run."""
    resumed = begin.start(out, ["train", "--resume", "--out", str(out)])
    assert resumed.ended()[0] == 0, resumed.said.read_text()
    assert tensors(out / "adapters.safetensors") == tensors(undisturbed / "adapters.safetensors")
    assert losses(out) == losses(undisturbed)


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(INT, 130, "Ctrl-C"), (TERM, 143, "SIGTERM"), (HUP, 129, "SIGHUP (sent when a terminal is closed)")],
)
def test_the_first_signal_says_what_it_does_and_waits_twice_as_long_as_the_last_step_took(
    number: signal.Signals,
    code: int,
    name: str,
    begin: Stopping,
    mlx_model: Path,
    data: Path,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    """Step 3 lasts a second, step 4 half a second more: it is finished and saved, though nothing else would wait."""
    run = begin.start(tmp_path / "run", words(mlx_model, data, tmp_path / "run"), {3: 1, 4: 1.5}, patience=0.1)
    run.in_step(4)
    run.send(number)
    said = f"{name}: finishing step 4 (about 1 s more), then saving; another signal stops at once and loses step 4"
    assert said in run.notes()  # at once
    assert run.ended()[0] == code, run.said.read_text()
    assert f"stopped after step 4; to go on: mlxtune train --resume --out {run.out}" in run.said.read_text()
    assert said in run.said.read_text()
    assert run.checkpoints() == [4] and run.events()[-1] == {"kind": "end", "step": 4, "state": "interrupted"}
    if number == HUP:
        goes_on(begin, run.out, undisturbed)


@pytest.mark.parametrize(("sent", "code"), [((INT, INT), 130), ((TERM, TERM), 143), ((HUP, TERM), 129), ((INT,), 130)])
def test_a_second_signal_or_too_long_a_step_saves_the_last_whole_state_and_leaves(
    sent: tuple[signal.Signals, ...],
    code: int,
    begin: Stopping,
    mlx_model: Path,
    data: Path,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    """Inside step 4, that would last for ever; nothing was saved before. One signal: a step more than twice as long as
    the last one is not waited for.
    """
    patience = 0.5 if len(sent) == 1 else 60
    run = begin.start(tmp_path / "run", words(mlx_model, data, tmp_path / "run"), {4: FOREVER}, patience)
    run.in_step(4)
    run.send(*sent)
    status, seconds = run.ended()
    assert status == code and seconds < 20, run.said.read_text()
    why = "lasts too long" if len(sent) == 1 else "is lost"
    assert f"stopped inside step 4, which {why}; to go on: mlxtune train --resume --out {run.out}" in run.notes()
    assert "Traceback" not in run.said.read_text()
    assert run.checkpoints() == [3] and run.events()[-1] == {"kind": "end", "step": 3, "state": "interrupted"}
    assert (run.out / "adapters.safetensors").is_file()
    if sent in ((INT, INT), (INT,)):
        goes_on(begin, run.out, undisturbed)


def test_the_first_step_is_waited_for_however_long_it_takes(
    begin: Stopping, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    run = begin.start(tmp_path / "run", words(mlx_model, data, tmp_path / "run"), {1: 2}, patience=0.1)
    run.in_step(1)
    run.send(INT)
    assert "finishing step 1 (how long it takes is not known yet)" in run.notes()
    assert "another signal stops at once and saves nothing" in run.notes()
    assert run.ended()[0] == 130
    assert run.checkpoints() == [1]


def test_a_second_signal_in_the_first_step_leaves_nothing(
    begin: Stopping, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    run = begin.start(tmp_path / "run", words(mlx_model, data, tmp_path / "run"), {1: FOREVER})
    run.in_step(1)
    run.send(INT, INT)
    assert run.ended()[0] == 130
    assert f"stopped inside step 1, which is lost; nothing was saved, and {run.out} is removed" in run.said.read_text()
    assert not run.out.exists()


def test_a_closed_terminal_sends_its_signal_twice_and_means_it_once(
    begin: Stopping, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    run = begin.start(tmp_path / "run", words(mlx_model, data, tmp_path / "run"), {3: 0.5, 4: 1.5})
    run.in_step(4)
    run.send(HUP, HUP, pause=0.1)
    assert run.ended()[0] == 129
    assert run.checkpoints() == [4]


def test_under_nohup_a_closed_terminal_stops_nothing(
    begin: Stopping, mlx_model: Path, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = begin.start(out, words(mlx_model, data, out), {4: 0.5}, nohup=True)
    run.in_step(4)
    run.send(HUP)
    assert run.ended()[0] == 0
    assert losses(out) == losses(undisturbed)


@pytest.mark.parametrize("gone", ["terminal", "pipe"])
def test_a_run_whose_words_nobody_can_read_any_more_is_saved_all_the_same(
    gone: str, begin: Stopping, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    """A terminal that was closed; and `2>&1 | tee`, which dies of the same Ctrl-C."""
    out = tmp_path / "run"
    if gone == "terminal":
        reader, writer = os.openpty()
        name = os.ttyname(writer)
    else:
        name = str(tmp_path / "pipe")
        os.mkfifo(name)
        reader, writer = os.open(name, os.O_RDONLY | os.O_NONBLOCK), -1
    run = begin.start(out, words(mlx_model, data, out), {4: 0.5}, stderr=Path(name))
    run.in_step(4)
    os.close(reader)
    run.send(HUP if gone == "terminal" else INT)
    assert run.ended()[0] == (129 if gone == "terminal" else 130)
    if writer >= 0:
        os.close(writer)
    assert run.checkpoints() == [4] and run.events()[-1]["state"] == "interrupted"


def test_checkpoints_come_by_time_as_well_and_change_no_bit(
    begin: Stopping, mlx_model: Path, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """More than 0.6 seconds pass in step 4 and in step 7, and nowhere else."""
    out = tmp_path / "run"
    settings = ("train.save_minutes=0.01", "train.keep_last=9")
    run = begin.start(out, words(mlx_model, data, out, *settings), {4: 0.7, 7: 0.7})
    assert run.ended()[0] == 0
    saved = [event["step"] for event in run.events() if event["kind"] == "checkpoint"]
    assert {4, 7, 8} <= set(saved) == set(run.checkpoints()), saved
    assert tensors(out / "adapters.safetensors") == tensors(undisturbed / "adapters.safetensors")
    assert losses(out) == losses(undisturbed)


TWO = """
import os, time
from pathlib import Path
from mlxtune.train import step
real = step.StepFunction.__call__
def call(self, number):
    event = real(self, number)
    if number == 4:
        Path("{marks}", os.environ["MLX_RANK"]).write_text(str(os.getpid()))
        time.sleep({lasts})
    return event
step.StepFunction.__call__ = call
"""


@pytest.mark.parametrize("signals", [1, 2])
def test_of_two_processes_one_signal_to_either_stops_both_and_two_save_what_is_whole(
    signals: int, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    """The first one to the second process, which neither writes nor draws; the second one to both."""
    run, marks = tmp_path / "run", tmp_path / "marks"
    marks.mkdir()
    waits = TWO.format(marks=marks, lasts=2 if signals == 1 else FOREVER)
    processes = pair(tmp_path, *words(mlx_model, data, run), code=waits)
    until = time.monotonic() + 120
    while len(found := [mark.read_text() for mark in sorted(marks.iterdir())]) < 2 or not all(found):
        assert time.monotonic() < until and not any(process.poll() for process in processes)
        time.sleep(0.01)
    for number in range(signals):
        for pid in found[1:] if signals == 1 else found:
            os.kill(int(pid), INT)
        time.sleep(0.3 * (1 - number))
    said = said_by(processes)
    step = 4 if signals == 1 else 3
    where = "after step 4" if signals == 1 else "inside step 4, which is lost"
    assert f"stopped {where}; to go on: mlxtune train --resume --out {run}" in said, said
    assert "Traceback" not in said
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [f"step-{step:07d}"]


def test_two_threads_tell_events_one_after_the_other_and_the_end_is_the_last_one(tmp_path: Path) -> None:
    inside, most = 0, 0

    def listen(_: events.Event) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.001)
        inside -= 1

    told = events.Events(tmp_path, listen)
    threads = [threading.Thread(target=lambda: [told.emit("note", text="x") for _ in range(20)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told.emit("end", step=1, state="interrupted")
    told.emit("train", step=2)
    told.close()
    told.emit("note", text="late")
    assert most == 1
    assert [event["kind"] for event in events.read(tmp_path)] == ["note"] * 60 + ["end"]


def test_nothing_interrupts_the_saving_of_a_run_that_failed() -> None:
    """The launcher of several processes sends SIGTERM to the others as soon as one of them failed."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with ignored():
            os.kill(os.getpid(), signal.SIGTERM)
        assert heard == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
