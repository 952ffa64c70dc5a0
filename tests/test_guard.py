"""Commands change what they are told to, and nothing beside it: seen on every command, among other people's things."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import guard
import pytest
from test_layers import COMMANDS

import mlxtune.cli


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a project of somebody else's, and its file of some length."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("mine, mine")
    (tmp_path / "theirs" / "link").symlink_to("file")
    return tmp_path


def ended(place: Path, change: Callable[[], Any], *words: str) -> str:
    """What is told of a command that does this."""
    watch = guard.Watch(["mlxtune", *words], place)
    time.sleep(0.02)  # file systems know the time to some milliseconds
    change()
    watch.end()
    return guard.told()


def rewritten(file: Path) -> None:
    """Other bytes of the same length, and the time of the last change set back."""
    known = file.stat()
    file.write_text("yours, too")
    os.utime(file, ns=(known.st_atime_ns, known.st_mtime_ns))


def churned(folder: Path) -> None:
    (folder / "left").touch()
    (folder / "left").unlink()


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file removed": (lambda at: (at / "theirs/file").unlink(), "theirs/file was removed"),
    "a folder removed": (lambda at: shutil.rmtree(at / "theirs"), "theirs was removed"),
    "bytes replaced, length and time kept": (lambda at: rewritten(at / "theirs/file"), "theirs/file was changed"),
    "written through a link": (lambda at: (at / "theirs/link").write_text("x"), "theirs/file was changed"),
    "rights changed": (lambda at: (at / "theirs/file").chmod(0o600), "theirs/file was changed"),
    "a link led elsewhere": (
        lambda at: ((at / "theirs/link").unlink(), (at / "theirs/link").symlink_to("..")),
        "theirs/link was changed",
    ),
    "a file left beside the output": (lambda at: (at / ".out.partial-1").touch(), ".out.partial-1 was made"),
    "a file made and removed in a source": (lambda at: churned(at / "theirs"), "theirs had something in it"),
    "a folder that leads nowhere": (lambda at: (at / "new").mkdir(), "new was made"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_guard_sees(fault: str, place: Path) -> None:
    change, expected = FAULTS[fault]
    told = ended(place, lambda: change(place), "convert", "theirs", "out")
    assert f"{place / expected}" in told and told.endswith("by: mlxtune convert theirs out")


def test_the_guard_sees_what_is_left_in_a_home_among_temporary_files_and_in_the_cache(place: Path, cache: Path) -> None:
    for folder in (Path(os.environ["HOME"]), Path(os.environ["TMPDIR"]), cache, cache / "mlxtune" / "rows"):
        folder.mkdir(parents=True, exist_ok=True)
        told = ended(place, (folder / "left").touch, "doctor")
        (folder / "left").unlink()
        assert f"{folder / 'left'} was made by: mlxtune doctor" in told
    store = cache / "mlxtune" / "rows" / ("0" * 32)
    assert ended(place, store.mkdir, "train", "--out", "run") == ""
    store.rmdir()


@pytest.mark.parametrize(
    ("line", "made"),
    [
        ("convert theirs new/out", ["new/out/config.json"]),
        ("export --to gguf --out new/a.gguf", ["new/a.gguf", "new/a.Modelfile", "new/a.verification.json"]),
        ("train --out=run", ["run/config.yaml", "run/checkpoints/step-0000001/state.json", "run/adapters.safetensors"]),
        ("train --model theirs", ["runs/2026-01-01-theirs/config.yaml"]),
        ("train --out run --set data.cache=kept", [f"kept/{'a' * 32}/ids.bin"]),
        ("verify theirs --model theirs", ["theirs/verification.json"]),
        ("demo --out d", ["d/model/config.json", "d/gguf/base.gguf"]),
        ("data convert theirs/file rows.jsonl", ["rows.jsonl"]),
    ],
)
def test_the_guard_allows_what_a_command_line_declares_and_nothing_beside_it(
    line: str, made: list[str], place: Path
) -> None:
    for name in made:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        told = ended(place, (place / name).touch, *line.split())
        assert told == "", told
    assert "beside was made" in ended(place, (place / made[0].split("/")[0]).with_name("beside").touch, *line.split())


def test_every_output_of_a_command_is_known_to_the_guard() -> None:
    """By the names that its options and arguments have; a new one must find its way into `guard.outputs`."""
    writing = {" ".join(path): {one.name for one in command.params} for path, command in COMMANDS.items()}
    known = {name for name, given in writing.items() if given & {"out", "dst"} or name == "verify"}
    assert known == {"convert", "data convert", "train", "fuse", "export", "verify", "demo"}


def test_commands_in_the_process_of_the_tests_are_watched_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("mlxtune.runs.find", lambda folder: (place / "theirs/file").unlink() or [])
    with pytest.raises(SystemExit):
        mlxtune.cli.main(["runs", "theirs"])
    assert "theirs/file was removed by: mlxtune runs theirs" in guard.told()
