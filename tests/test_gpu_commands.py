"""When the device fails, a command ends in one line that says what to do, and leaves nothing half written."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import pytest
import tiny
from broken import BUFFERS, LOST, OUT_OF_MEMORY, WATCHDOG, Evaluations, command, fail_gradients, failing

from mlxtune.bench import __main__ as bench_child
from mlxtune.bench import children
from mlxtune.cli import main
from mlxtune.evaluate import generate
from mlxtune.machine import backend
from mlxtune.machine.gpu_errors import ADVICE, Kind
from mlxtune.model import convert as conversion
from mlxtune.model.arrays import to_numpy

# Files that a command leaves to its process's end to close.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
Words = list[str | Path]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Evaluations:
    return Evaluations(monkeypatch)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["generate", "--prompt", "Question number 3?", "--max-tokens", "3"], "shorten --prompt and --max-tokens"),
        (["eval"], "shorten the rows: --set data.max_tokens=N"),
        (["fuse", "--out", "OUT"], "leave the comparison out: --no-verify"),
        (["fuse", "--out", "OUT", "--no-verify"], "Close programs that hold memory, and run it again."),
        (["export", "--to", "peft", "--out", "OUT"], "leave the comparison out: --no-verify"),
        (["export", "--to", "hf", "--out", "OUT", "--no-verify"], "and run it again."),
        (["export", "--to", "gguf", "--out", "OUT.gguf", "--no-verify"], "and run it again."),
        (["export", "--to", "gguf-lora", "--out", "OUT.gguf", "--no-verify"], "and run it again."),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_out_of_memory_anywhere_in_a_command_is_one_line_with_a_hint(
    words: list[str],
    hint: str,
    device: Evaluations,
    mlx_model: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first thing that is computed fails, one in the middle, the last."""
    out = tmp_path / ("shipped.gguf" if "OUT.gguf" in words else "shipped")
    given = [out if word.startswith("OUT") else word for word in words]
    call: Words = [given[0], "--model", mlx_model, "--adapter", run, *given[1:]]
    before = device.count
    assert command(capsys, *call).returncode == 0
    many = device.count - before
    for number in sorted({1, many // 2, many} - {0}):
        again: Words = [*call, "--force"] if "--out" in words else call
        kept = _files(tmp_path)
        device.fail(number, OUT_OF_MEMORY)
        result = command(capsys, *again)
        device.fail(0, "")
        tiny.one_clear_line(result, "there is not enough memory ([METAL]", hint)
        assert _files(tmp_path) == kept


def _files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_failure_that_is_not_of_memory_has_its_own_advice(
    device: Evaluations, mlx_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, kind in ((WATCHDOG, Kind.WATCHDOG), (BUFFERS, Kind.BUFFERS), (LOST, Kind.LOST)):
        device.fail(3, text)
        result = command(capsys, "generate", "--model", mlx_model, "--prompt", "hi", "--max-tokens", "3")
        tiny.one_clear_line(result, kind.value, text, ADVICE[kind])


def test_an_ordinary_bug_is_no_failure_of_the_device(
    device: Evaluations, mlx_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device.fail(1, "[matmul] Last dimension of first input with shape (2,3) must match")
    monkeypatch.setattr(sys, "exit", pytest.fail)
    with pytest.raises(RuntimeError, match="matmul"):
        main(["generate", "--model", str(mlx_model), "--prompt", "hi"])


def test_converting_and_verifying_end_in_one_line_too(
    device: Evaluations, hf_model: Path, mlx_model: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "to_numpy", failing(OUT_OF_MEMORY))
        result = command(capsys, "convert", hf_model, tmp_path / "converted")
    tiny.one_clear_line(result, "there is not enough memory", "Close programs that hold memory, and run it again.")
    tiny.nothing_written(tmp_path / "converted")
    words: Words = ["--model", mlx_model, "--adapter", run]
    assert command(capsys, "fuse", *words, "--out", tmp_path / "fused").returncode == 0
    kept = _files(tmp_path)
    device.fail(2, OUT_OF_MEMORY)
    result = command(capsys, "verify", tmp_path / "fused", *words)
    tiny.one_clear_line(result, "there is not enough memory", "compare on shorter rows: --data PATH")
    assert _files(tmp_path) == kept


def test_a_chat_goes_on_after_a_failure_and_ends_where_the_device_is_lost(
    device: Evaluations, mlx_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = iter(["one", "two", "three", "four"])
    failures = {"two": (OUT_OF_MEMORY, 1), "four": (LOST, 1 << 30)}

    def ask(prompt: str) -> str:
        line = next(asked)
        text, times = failures.get(line, ("", 0))
        device.fail(3, text, times)
        return line

    kept: list[list[str]] = []
    real = generate.prompt_ids

    def seen(loaded: Any, messages: list[dict[str, str]], *settings: Any) -> list[int]:
        kept.append([message["content"] for message in messages if message["role"] == "user"])
        return real(loaded, messages, *settings)

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(generate, "prompt_ids", seen)
    result = command(capsys, "chat", "--model", mlx_model, "--max-tokens", "4")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert [("not enough memory" in line, "(this message is not kept)" in line) for line in errors] == [
        (True, True),
        (False, False),
    ]
    assert Kind.LOST.value in errors[1] and ADVICE[Kind.LOST] in result.stderr
    assert kept == [["one"], ["one", "two"], ["one", "three"], ["one", "three", "four"]]


def test_a_benchmarks_child_tells_its_parent(
    mlx_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The child is run in this process: every gradient fails there; the parent computes none."""
    real = subprocess.run

    def child(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if list(command[1:3]) != ["-m", "mlxtune.bench"]:
            return real(command, **options)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = bench_child.main(command[3], command[4], int(command[5]))
        return subprocess.CompletedProcess(command, code, out.getvalue(), "")

    monkeypatch.setattr(children.subprocess, "run", child)
    fail_gradients(monkeypatch, 1)
    result = command(capsys, "bench", "--model", mlx_model, "--data", data, "--rows", "8")
    tiny.one_clear_line(
        result, "the measurement of mlxtune failed: there is not enough memory ([METAL]", "batch_rows=1"
    )


def test_an_array_that_cannot_be_computed_is_never_taken_from_memory(tmp_path: Path) -> None:
    """numpy asks an array for its buffer, and where that raises, in other ways that give what lies in the memory."""
    for dtype in (mx.float32, mx.bfloat16):
        file = tmp_path / "torn.safetensors"
        mx.save_safetensors(str(file), {"a": mx.ones((1000, 1000))})
        array = mx.load(str(file))["a"].astype(dtype)  # type: ignore[call-overload, index]
        os.truncate(file, 2000)
        with pytest.raises(RuntimeError, match="Unable to read"):
            to_numpy(array)


def test_errors_that_the_device_kept_for_later_are_let_go_before_anything_is_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MLX raises the first error of a stream; work that was sent after it may have left others, raised one by one."""
    kept = [OUT_OF_MEMORY, LOST, OUT_OF_MEMORY]
    cleared: list[int] = []

    def synchronize(stream: Any = None) -> None:
        if kept:
            raise RuntimeError(kept.pop())

    monkeypatch.setattr(mx, "synchronize", synchronize)
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(len(kept)))
    backend.recover()
    assert kept == [] and cleared == [0]


def test_a_failure_while_files_are_read_is_not_taken_for_damage_of_the_files(
    mlx_model: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What mlx-lm raises for a model, and MLX for an adapter, else means that they are broken."""
    real, fail = mx.load, failing(OUT_OF_MEMORY)

    def load(file: str, *rest: Any, **options: Any) -> Any:
        return (fail if Path(file).name == "adapters.safetensors" else real)(file, *rest, **options)

    for place, name, broken in ((mlx_lm.utils, "load_model", fail), (mx, "load", load)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, broken)
            result = command(capsys, "eval", "--model", mlx_model, "--adapter", run)
        said = tiny.one_clear_line(result, f"there is not enough memory ({OUT_OF_MEMORY})")
        assert "does not describe" not in said and "torn" not in said
