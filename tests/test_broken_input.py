"""Options that contradict each other, folders in the way, full disks, and signals.

Everything goes through the installed command: one clear line, exit status 2, nothing half-written.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from safetensors.numpy import load_file
from tiny import Change, lose_a_tensor, nothing_written, refused, remove

COMMAND = Path(sys.executable).with_name("mlxtune")
LINES = [json.dumps(row) for row in tiny.conversations(12)]
ASKED = {"messages": [{"role": "user", "content": "Where is my order?"}]}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--bits", "16", "--group-size", "64"), ("--bits 16 means not quantized", "--group-size and --mode")),
        (
            ("--mode", "mxfp4", "--bits", "8"),
            ("--bits 8 --group-size 32 does not exist for --mode mxfp4", "Bits: 4; group sizes: 32."),
        ),
        (("--group-size", "0"), ("--group-size 0 does not exist for --mode affine", "group sizes: 32, 64, 128.")),
        (("--bits", "7"), ("'7' is not one of '1', '2', '3', '4', '5', '6', '8', '16'", "mlxtune convert --help")),
    ],
    ids=["bits 16 in groups", "mxfp4 of 8 bits", "groups of 0", "7 bits"],
)
def test_options_that_contradict_each_other_are_refused(
    options: tuple[str, ...], expected: tuple[str, ...], hf_model: Path, tmp_path: Path
) -> None:
    refused(tmp_path / "out", "convert", hf_model, tmp_path / "out", *options, expected=expected)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_existing_folder_is_replaced_only_with_force_and_only_by_something_whole(
    hf_model: Path, tmp_path: Path
) -> None:
    out, torn = tmp_path / "out", tmp_path / "torn"
    out.mkdir()
    (out / "config.json").write_text("mine")
    tiny.one_clear_line(tiny.mlxtune("convert", hf_model, out), f"{out} already exists", "add --force to replace it")
    shutil.copytree(hf_model, torn)
    lose_a_tensor(torn)
    tiny.one_clear_line(tiny.mlxtune("convert", torn, out, "--force"), "the weights do not fit")
    assert contents(out) == {"config.json": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "torn"]
    tiny.done("convert", hf_model, out, "--force")
    assert contents(out)["config.json"] != b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "torn"]


@pytest.mark.parametrize("inside", ["", "model"], ids=["the source", "a folder that holds it"])
def test_force_never_replaces_what_the_result_is_made_from(inside: str, hf_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "models"
    shutil.copytree(hf_model, out / inside)
    before = contents(out)
    refusal = tiny.mlxtune("convert", out / inside, out, "--force")
    tiny.one_clear_line(refusal, "source", "Choose another folder.")
    assert contents(out) == before


def test_training_into_an_existing_run_is_refused(run: Path, mlx_model: Path, data: Path) -> None:
    before = contents(run)
    refusal = tiny.mlxtune("train", "--model", mlx_model, "--data", data, "--out", run)
    tiny.one_clear_line(refusal, f"{run} already exists", "or continue that run with --resume.")
    assert contents(run) == before


def test_resuming_without_a_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    refusal = tiny.mlxtune("train", "--resume", "--out", tmp_path / "run")
    tiny.one_clear_line(refusal, "has no checkpoint to resume from", "Start again without --resume")
    assert (tmp_path / "run" / "adapters.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ("--resume needs the run to go on with", "mlxtune train --resume --out RUN")),
        (("--out", "no-such-run"), ("no-such-run is not a run of mlxtune (no config.yaml)",)),
    ],
    ids=["without a run", "a run that is none"],
)
def test_resuming_takes_a_run_and_nothing_else(options: tuple[str, ...], expected: tuple[str, ...]) -> None:
    tiny.one_clear_line(tiny.mlxtune("train", "--resume", *options), *expected)


ADAPTERS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no tensors": (remove("adapters.safetensors"), ("has no adapters.safetensors", "train it, or resume it.")),
    "no configuration": (remove("adapter_config.json"), ("has no adapter_config.json", "Expected an adapter folder")),
    "torn tensors": (
        lambda folder: (folder / "adapters.safetensors").write_bytes(
            (folder / "adapters.safetensors").read_bytes()[:1000]
        ),
        ("adapters.safetensors: not a safetensors file, or a torn one",),
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_folder_that_is_not_whole_is_refused(kind: str, run: Path, mlx_model: Path, tmp_path: Path) -> None:
    change, expected = ADAPTERS[kind]
    shutil.copytree(run, tmp_path / "run")
    change(tmp_path / "run")
    refusal = tiny.mlxtune("generate", "--model", mlx_model, "--adapter", tmp_path / "run", "--prompt", "Hi")
    said = tiny.one_clear_line(refusal, *expected)
    assert refusal.stdout == ""
    assert str(tmp_path / "run") in said


def test_an_adapter_of_another_model_is_refused(run: Path, data: Path, tmp_path: Path) -> None:
    other, out = tiny.make_model(tmp_path / "other", hidden_size=96), tmp_path / "out"
    expected = ("adapters.safetensors does not fit this model", "Use the model that the adapter was trained on.")
    refused(out, "export", "--model", other, "--adapter", run, "--to", "hf", "--out", out, expected=expected)


def test_exporting_a_peft_adapter_with_a_dtype_is_refused(run: Path, mlx_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--to", "peft", "--dtype", "float16", "--out", out)
    expected = ("--dtype has no effect with --to peft", "It is for: hf.")
    refused(out, "export", "--model", mlx_model, "--adapter", run, *options, expected=expected)


def test_sampling_options_without_a_temperature_are_refused(mlx_model: Path) -> None:
    refusal = tiny.mlxtune("generate", "--model", mlx_model, "--prompt", "Hi", "--top-p", "0.5")
    tiny.one_clear_line(refusal, "--top-p has no effect at --temperature 0", "Add, say, --temperature 0.7.")


@pytest.fixture
def as_nobody_special() -> list[str]:
    """What to put before a command so that file modes count: root is above them."""
    if os.geteuid() != 0:
        return []
    rights = "-dac_override,-dac_read_search"
    prefix = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"]
    if shutil.which("setpriv") is None or subprocess.run([*prefix, "true"], check=False).returncode != 0:
        pytest.skip("root is above file modes, and setpriv cannot change that here")
    return prefix


@pytest.mark.parametrize("verb", ["convert", "train"])
def test_a_folder_that_cannot_be_written_is_refused(
    verb: str, as_nobody_special: list[str], hf_model: Path, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    out = closed / "out"
    command = {"convert": ["convert", hf_model, out], "train": ["train", "--model", mlx_model, "--data", data]}[verb]
    options = ["--out", out] if verb == "train" else []
    refusal = subprocess.run(
        [*as_nobody_special, COMMAND, *command, *options], capture_output=True, text=True, check=False
    )
    tiny.one_clear_line(refusal, f"cannot write {out}: permission denied", "Choose a folder you may write to.")
    nothing_written(out)


def test_a_file_that_cannot_be_read_is_refused(as_nobody_special: list[str], tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.conversations(3))
    file.chmod(0)
    command = [*as_nobody_special, COMMAND, "data", "show", "--model", "model", "--data", file]
    refusal = subprocess.run(command, capture_output=True, text=True, check=False)
    tiny.one_clear_line(refusal, f"{file}: cannot be read (Permission denied)")


def test_a_name_that_is_too_long_is_refused() -> None:
    """As when someone hands over the data itself instead of a path."""
    refusal = tiny.mlxtune("data", "show", "--model", "model", "--data", '{"text": "' + "x" * 300 + '"}')
    tiny.one_clear_line(refusal, "the name is too long")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no small file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def leave_free(disk: Path, size: int) -> None:
    (disk / "other-files").write_bytes(b"0" * (shutil.disk_usage(disk).free - size))


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        ("convert", ("not enough disk space for", " needed, ", " free", "Free some space")),
        ("train", ("cannot write", "the disk is full", "Free some space")),
        ("export", ("cannot write", "the disk is full", "Free some space")),
    ],
)
def test_a_full_disk_is_said_and_left_as_it_was(
    verb: str,
    expected: tuple[str, ...],
    small_disk: Path,
    hf_model: Path,
    mlx_model: Path,
    run: Path,
    data: Path,
) -> None:
    out = small_disk / "out"
    leave_free(small_disk, 8192)
    command: dict[str, list[str | Path]] = {
        "convert": ["convert", hf_model, out],
        "train": ["train", "--model", mlx_model, "--data", data, "--out", out, "--set", "train.steps=2"],
        "export": ["export", "--model", mlx_model, "--adapter", run, "--to", "peft", "--out", out, "--no-verify"],
    }
    said = refused(out, *command[verb], expected=(*expected, str(out)))
    assert ".partial" not in said
    assert [path.name for path in small_disk.iterdir()] == ["other-files"]


def test_a_disk_that_fills_up_while_training_keeps_what_was_saved(
    small_disk: Path, mlx_model: Path, data: Path
) -> None:
    """There is room for one checkpoint, not for two; with more room the run goes on from it."""
    out = small_disk / "run"
    leave_free(small_disk, 800 << 10)
    settings = ("train.steps=6", "train.save_every=2", "train.eval_every=2")
    options = [option for setting in settings for option in ("--set", setting)]
    refusal = tiny.mlxtune("train", "--model", mlx_model, "--data", data, "--out", out, *options)
    tiny.one_clear_line(refusal, f"cannot write {out}", "the disk is full")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-0000002"]
    assert (
        load_file(out / "adapters.safetensors").keys()
        == load_file(out / "checkpoints" / "step-0000002" / "adapters.safetensors").keys()
    )
    assert [path.name for path in out.glob(".*")] == [".lock"]
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    resumed = tiny.done("train", "--resume", "--out", out)
    assert f"{out}: 6 steps" in resumed.stdout


def wait_for(ready: Callable[[], bool], process: tiny.Process) -> None:
    until = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)


# Before the command: steps that last, so that a signal comes inside them.
SLOWLY = """
import time
from mlxtune.train import step
real = step.StepFunction.__call__
def call(self, number):
    time.sleep(0.1)
    return real(self, number)
step.StepFunction.__call__ = call
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_after_a_step_that_can_be_resumed(
    number: signal.Signals, status: int, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ("--set", "train.steps=20", "--set", "lora.rank=2", "--set", "train.eval_every=0")
    process = tiny.started("train", "--model", mlx_model, "--data", data, "--out", out, *options, code=SLOWLY)
    events = out / "events.jsonl"
    wait_for(lambda: events.is_file() and events.read_text().count('"kind": "train"') > 2, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("stopped after step ")
    assert last.endswith(f"; to go on: mlxtune train --resume --out {out}")
    assert "Traceback" not in said
    step = int(last.removeprefix("stopped after step ").split(";")[0])
    assert (out / "adapters.safetensors").is_file()
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{step:07d}"]
    resumed = tiny.done("train", "--resume", "--out", out)
    assert f"{out}: 20 steps" in resumed.stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_during_a_conversion_leaves_nothing(
    number: signal.Signals, status: int, hf_model: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    process = tiny.started("convert", hf_model, place / "out")
    wait_for(lambda: any(place.iterdir()), process)
    process.send_signal(number)
    stdout, said = process.communicate(timeout=60)
    assert (process.returncode, stdout, said.strip()) == (status, "", "stopped")
    assert not list(place.iterdir())
