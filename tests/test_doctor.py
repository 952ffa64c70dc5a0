"""What `mlxtune doctor` prints where nobody looks, and what `--test` says when its surroundings fail."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlxtune_convert import files

from mlxtune import cli
from mlxtune.errors import UserError
from mlxtune.machine import diagnosis, tested
from mlxtune.selftest import checks, examination
from mlxtune.selftest.outcome import FAILED, MLX, Check, Found, NoRoom, Result, Workshop

Patch = pytest.MonkeyPatch
LONG = "the process ended (SIGABRT): " + "[METAL] Command buffer execution failed: " * 3


def fails_with(error: Exception) -> Callable[[Workshop], Found]:
    def run(_: Workshop) -> Found:
        raise RuntimeError("not written") from error

    return run


def child(patch: Patch, program: str) -> list[Result]:
    """The results where this program does the checks, which finds two functions to tell what it does."""
    tells = """
import json, os, sys
first = int(sys.argv[2])
def begin(number, of): print(json.dumps({"begun": number, "of": of, "group": "g", "name": f"{number}"}), flush=True)
def end(number): print(json.dumps({"group": "g", "name": f"{number}", "status": "ok"}), flush=True)
"""
    patch.setattr(examination, "COMMAND", (sys.executable, "-c", tells + program))
    return list(examination.results(lambda name: None))


def test_what_is_piped_is_neither_cut_nor_wrapped(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    fact = ", ".join(["a program"] * 20)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(diagnosis, "examine", lambda: ({"chip": "a chip", "other models in memory": fact}, []))
    results = [
        Result("Training", "20 steps", FAILED, said=LONG),
        Result("Training", "resume", "ok", 0, 0, "different"),
        Result("Training", "compiled", "not here", said="nothing is compiled on the CPU"),
        Result("Time", "one step", "measured", 1.0, unit="ms"),
    ]
    monkeypatch.setattr(examination, "results", lambda begun: (result for result in results))
    with pytest.raises(UserError, match="1 of 2 checks failed: 20 steps") as raised:
        cli.cli.main(["doctor", "--test"], standalone_mode=False)
    assert "Another version" not in raised.value.hint  # no number was wrong
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{'chip':<24}a chip", f"{'other models in memory':<24}{fact}"]
    assert f"{'':9}{LONG}" in lines


def test_the_advised_mlx_is_one_that_mlxtune_takes() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (taken,) = (line for line in project["dependencies"] if line.startswith(("mlx>", "mlx<", "mlx=")))
    name, limit = MLX.split("<")
    assert taken.startswith(name) and taken.endswith(f"<{limit}")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_folder_that_takes_nothing_more_ends_the_test(number: int, tmp_path: Path, monkeypatch: Patch) -> None:
    refusal = OSError(number, os.strerror(number), str(tmp_path / "model" / "weights"))
    with pytest.raises(NoRoom) as raised:
        checks.done(Check("", "", fails_with(refusal)), Workshop(tmp_path))
    assert raised.value.number == number
    with pytest.raises(UserError) as told:
        child(monkeypatch, f"begin(0, 3); print(json.dumps({{'refused': {number}}}))")
    assert tempfile.gettempdir() in told.value.message and "TMPDIR" in told.value.hint
    if number == errno.ENOSPC:
        assert told.value.message == f"no room to test in {tempfile.gettempdir()}: the disk is full"
        assert told.value.hint == "Free some space, or set TMPDIR to another folder."


def test_a_full_disk_is_known_by_a_library_s_words_and_by_mlxtune_s_own(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(UserError) as refused:
        files.require_space(tmp_path, 1 << 30)
    for error in (refused.value, Exception("No space left on device (os error 28)")):
        with pytest.raises(NoRoom):
            checks.done(Check("", "", fails_with(error)), Workshop(tmp_path))


def test_a_refusal_elsewhere_is_a_failed_check(tmp_path: Path) -> None:
    other = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "cache"))
    for error in (other, OSError(errno.EIO, "Input/output error"), ValueError("wrong")):
        assert checks.done(Check("", "", fails_with(error)), Workshop(tmp_path / "work")).status == FAILED


def test_without_a_folder_for_temporary_files_that_is_said(monkeypatch: Patch) -> None:
    def none(prefix: str) -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "mkdtemp", none)
    with pytest.raises(UserError, match="no folder to test in") as raised:
        list(examination.results(lambda name: None))
    assert "TMPDIR" in raised.value.hint


def test_a_process_that_ends_before_its_first_check_is_not_tried_again(monkeypatch: Patch) -> None:
    (result,) = child(monkeypatch, "sys.exit('no MLX here')")
    assert (result.name, result.status) == ("start", FAILED)
    assert result.said == "the process ended (exit status 1): no MLX here; what is left was not tried"
    found = child(monkeypatch, "begin(0, 3) if first == 0 else None; os._exit(3)")
    assert [result.name for result in found] == ["0", "start"]


@pytest.mark.parametrize("status", [3, 0])
def test_a_process_that_ends_between_two_checks_is_told(status: int, monkeypatch: Patch) -> None:
    program = f"""
for number in range(first, 3):
    begin(number, 3)
    end(number)
    if number == 1: os._exit({status})
"""
    found = child(monkeypatch, program)
    assert [(result.name, result.status) for result in found] == [
        *(("0", "ok"), ("1", "ok"), ("after 1", FAILED), ("2", "ok")),
    ]
    assert found[2].said == f"the process ended (exit status {status})"


def test_the_rest_is_spoken_of_only_where_there_is_one(monkeypatch: Patch) -> None:
    monkeypatch.setattr(examination, "PROCESSES", 1)
    program = "begin(0, {0}); os._exit(3)"
    assert [result.name for result in child(monkeypatch, program.format(2))] == ["0", "the rest"]
    assert [result.name for result in child(monkeypatch, program.format(1))] == ["0"]
    ends_badly = child(monkeypatch, "begin(0, 1); end(0); os._exit(3)")
    assert [result.name for result in ends_badly] == ["0", "after 0"]


@pytest.mark.parametrize(
    ("here", "said"), [("0.99.0", "newer"), ("0.1.0", "older"), ("0.32.4", ""), ("0.32.4.dev20261130", "")]
)
def test_a_version_that_was_not_tested_is_said(here: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**tested.versions(), "mlx": "0.32.4"}
    monkeypatch.setattr(tested, "versions", lambda: known)
    versions = {**known, "mlx": here}
    monkeypatch.setattr(tested.metadata, "version", versions.__getitem__)
    lines = tested.untested()
    assert len(lines) == (1 if said else 0)
    if said:
        assert (
            f"mlx {here} is {said} than 0.32.4" in lines[0]
            and "doctor --test" in lines[0]
            and "pip install" in lines[0]
        )


def test_doctor_says_what_was_tested_and_warns_of_what_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested, "untested", lambda: ["mlx 9 is newer than what was tested"])
    facts, advice = diagnosis.examine()
    assert facts["tested with"].startswith("mlx ") and "transformers" in facts["tested with"]
    assert "mlx 9 is newer than what was tested" in advice
