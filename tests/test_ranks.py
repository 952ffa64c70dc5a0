"""One run on several processes, with MLX's ring on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from mlxtune.config import resolve as configuration
from mlxtune.data.dataset.batches import Batch
from mlxtune.train import events, preparation
from mlxtune.train.ranks import Ranks
from mlxtune.train.run_data import read_data

SETTINGS = (
    *("train.steps=8", "train.lr=5e-3", "train.eval_every=2", "train.save_every=2", "lora.rank=4"),
    *("lora.dropout=0.1", "train.neftune_alpha=5"),
)


def words(model: Path, data: Path, out: Path, *settings: str) -> list[str]:
    flags = ["train", "--model", str(model), "--data", str(data), "--out", str(out)]
    return [*flags, *(word for setting in (*SETTINGS, *settings) for word in ("--set", setting))]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def pair(folder: Path, *args: str, code: str = "") -> list[tiny.Process]:
    """Two processes that find each other as `mlx.launch` lets them, by a file and a number.

    code: what each of them does first. folder: for the file.
    """
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(2)]))
    fixed = {"MLX_HOSTFILE": str(hosts), "OPENBLAS_NUM_THREADS": "1"}
    return [tiny.started(*args, code=code, **fixed, MLX_RANK=rank) for rank in ("0", "1")]


def said_by(processes: list[tiny.Process]) -> str:
    """What they say until they end; none of them is left running, whatever happens."""
    try:
        return "".join(text for process in processes for text in process.communicate(timeout=180))
    finally:
        for process in processes:
            process.kill()


def two(folder: Path, *args: str, code: str = "") -> str:
    """What such a pair says."""
    return said_by(pair(folder, *args, code=code))


def launched(count: int, *args: str, program: Path | None = None) -> subprocess.Popen[str]:
    """`mlx.launch -n count mlxtune ...`, in a process group of its own."""
    port = free_port()
    bin = Path(sys.executable).parent
    command = [bin / "mlx.launch", "-n", str(count), "--backend", "ring", "--starting-port", str(port)]
    return subprocess.Popen(
        [*map(str, command), str(program or bin / "mlxtune"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "COLUMNS": "200", "OPENBLAS_NUM_THREADS": "1", "PATH": f"{bin}:{os.environ['PATH']}"},
    )


def program(folder: Path, code: str) -> Path:
    """The command as a file that can be launched; what `code` does comes first."""
    file = folder / "program"
    file.write_text(f"#!{sys.executable}\n{code}\nfrom mlxtune.cli import main\nmain()\n")
    file.chmod(0o755)
    return file


def finished(process: subprocess.Popen[str], seconds: float = 180) -> str:
    """Its output; nothing of it is left running, whatever happens."""
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in events.read(run) if event["kind"] in ("train", "eval")]


TWO_BATCHES, ODD_ROWS = ("train.batch_rows=4", "train.accumulate=2"), ("train.batch_rows=5",)


@pytest.fixture(scope="module")
def alone(mlx_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """Runs of one process, by their settings: steps of two micro-batches, and of one whose rows are an odd number."""
    runs = {}
    for settings in (TWO_BATCHES, ODD_ROWS):
        runs[settings] = tmp_path_factory.mktemp("alone") / "run"
        done = tiny.mlxtune(*words(mlx_model, data, runs[settings], *settings))
        assert done.returncode == 0, done.stderr
    return runs


@pytest.mark.parametrize("settings", [TWO_BATCHES, ODD_ROWS])
def test_two_processes_compute_the_losses_of_one(
    settings: tuple[str, ...],
    alone: dict[tuple[str, ...], Path],
    mlx_model: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    one = alone[settings]
    said = two(tmp_path, *words(mlx_model, data, tmp_path / "two", *settings))
    assert "2 processes" in said and "Traceback" not in said, said
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(one), rtol=1e-5)
    assert len(losses(one)) == 13
    assert said.count("best validation loss") == 1  # the second process neither draws nor writes
    assert len((tmp_path / "two" / "events.jsonl").read_text().splitlines()) == len(
        (one / "events.jsonl").read_text().splitlines()
    )
    pages = [(run / "report.html").read_text() for run in (one, tmp_path / "two")]
    assert ["was tuned for 8 steps in 2 processes." in page for page in pages] == [False, True]


def test_a_run_whose_second_process_died_is_resumed_by_one_process(
    alone: dict[tuple[str, ...], Path], mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    """SIGKILL in its fifth step, while the first one waits for it."""
    run = tmp_path / "died"
    dies = (
        "import os, signal\nfrom mlxtune.train import step\nreal = step.StepFunction.__call__\n"
        "def call(self, number):\n    if number == 5 and os.environ['MLX_RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n    return real(self, number)\n"
        "step.StepFunction.__call__ = call\n"
    )
    two(tmp_path, *words(mlx_model, data, run, *TWO_BATCHES), code=dies)
    state = json.loads(tiny.mlxtune("runs", run, "--json").stdout)[0]
    assert state["state"] in ("killed", "interrupted", "failed") and state["step"] < 5
    resumed = tiny.mlxtune("train", "--resume", "--out", run)
    assert resumed.returncode == 0, resumed.stderr
    np.testing.assert_allclose(losses(run), losses(alone[TWO_BATCHES]), rtol=1e-5)


def test_a_run_of_one_process_is_resumed_by_two(alone: dict[tuple[str, ...], Path], tmp_path: Path) -> None:
    one = alone[ODD_ROWS]
    run = tmp_path / "cut"
    shutil.copytree(one, run)
    for file in (run / "checkpoints/step-0000008").glob("*"):
        file.write_bytes(b"torn")
    said = two(tmp_path, "train", "--resume", "--out", str(run))
    assert "step-0000008 is incomplete" in said and "resumed after step 6" in said, said
    np.testing.assert_allclose(losses(run), losses(one), rtol=1e-5)
    again = "The run went on after step 6 though it had reached step 8: steps 7 to 8 were done again"
    assert again in (run / "report.html").read_text() and again not in (one / "report.html").read_text()


def test_processes_with_different_rows_are_refused(mlx_model: Path, data: Path, tmp_path: Path) -> None:
    """The second process reads other rows, as on a machine whose copy is old."""
    there = (
        "import os\nfrom mlxtune.data.dataset.examples import Examples\n"
        "if os.environ['MLX_RANK'] == '1':\n    Examples.digest = lambda self: 'others'\n"
    )
    said = two(tmp_path, *words(mlx_model, data, tmp_path / "run"), code=there)
    assert "the 2 processes do not have the same data" in said, said
    assert "Traceback" not in said, said
    assert not (tmp_path / "run").exists()


def test_the_smallest_machine_decides_the_batches_of_all(mlx_model: Path, data: Path, tmp_path: Path) -> None:
    """The second process has too little memory for the rows asked for: as one process with that little."""
    few = ("train.steps=2", "train.batch_rows=4", "train.eval_every=0", "train.save_every=0", "lora.dropout=0")
    few = (*few, "train.neftune_alpha=0")
    flags = {"model.path": str(mlx_model), "data.path": str(data)}
    small = configuration.load(None, (*few, "train.batch_rows=1", "train.checkpoint_layers=all", "lora.rank=4"), flags)
    predicted = preparation.plan(small, read_data(small)[0]).memory
    assert predicted
    least = (predicted.total >> 20) + 1 << 20
    there = (
        "import os\nfrom mlxtune.compute import fit_memory\nif os.environ['MLX_RANK'] == '1':\n"
        f"    fit_memory.backend.working_set_bytes = lambda: int({least} / fit_memory.SHARE)\n"
    )
    said = two(tmp_path, *words(mlx_model, data, tmp_path / "two", *few), code=there)
    assert "to fit" in said and "train.batch_rows=" in said, said
    done = tiny.mlxtune(*words(mlx_model, data, tmp_path / "one", *few, f"train.memory_limit={least}"))
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)


class Group:
    """Stands for MLX's group: only who and how many."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def step_of(batches: list[int], widths: list[int]) -> list[Batch]:
    """Micro-batches of so many examples, padded to these widths."""
    return [
        Batch(
            rows,
            np.zeros((len(rows), width), np.int32),
            np.full(len(rows), width),
            np.ones((len(rows), width), np.uint8),
        )
        for rows, width in zip(np.split(np.arange(sum(batches)), np.cumsum(batches)[:-1]), widths, strict=True)
    ]


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("batches", [[4], [5], [4, 4], [1, 1, 1], [4, 4, 4, 2], [4, 4, 1, 4, 4, 4, 3]])
def test_every_example_of_a_step_is_dealt_to_exactly_one_process(size: int, batches: list[int]) -> None:
    numbers = np.arange(sum(batches))
    step = step_of(batches, [7] * len(batches))
    dealt = [row for rank in range(size) for batch in Ranks(Group(rank, size)).own_batches(step) for row in batch.rows]
    assert sorted(dealt) == numbers.tolist()
    assert [batch.rows.tolist() for batch in Ranks().own_batches(step)] == [batch.rows.tolist() for batch in step]


@pytest.mark.parametrize(
    ("batches", "widths", "most"),
    [
        # The turns of a few rows, of growing lengths: 40 + 12 against 24 + 20 + 8. Dealt in turn it would be 68 and 36.
        ([2, 2, 2, 2, 2], [4, 6, 10, 12, 20], 52),
        ([1, 1, 1], [9, 9, 9], 18),
        ([1, 1], [9, 9], 9),
    ],
)
def test_two_processes_have_about_as_much_to_do(batches: list[int], widths: list[int], most: int) -> None:
    """Padded tokens of the busier one."""
    shares = [Ranks(Group(rank, 2)).own_batches(step_of(batches, widths)) for rank in range(2)]
    assert max(sum(batch.ids.size for batch in share) for share in shares) == most


def test_single_examples_are_not_all_dealt_to_the_first_process() -> None:
    """Two micro-batches of one example each, three processes."""
    shares = [Ranks(Group(rank, 3)).own_batches(step_of([1, 1], [9, 9])) for rank in range(3)]
    assert [len(share) for share in shares] == [1, 1, 0]
