"""Commands change what they are told to, and nothing beside it: seen on every command, among other people's things."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import guard
import network
import pytest
import tiny
from mlxtune_convert import files
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
        ("report theirs", ["theirs/report.html"]),
        ("report theirs --out page.html", ["page.html"]),
        ("import-config theirs/file --out new/mine.yaml", ["new/mine.yaml"]),
        ("demo --out d", ["d/model/config.json", "d/gguf/base.gguf"]),
        ("data convert theirs/file rows.jsonl", ["rows.jsonl"]),
        ("make pairs theirs --out new/pairs.jsonl", ["new/pairs.jsonl"]),
        ("eval --model theirs --suite s.jsonl --out evals/e", ["evals/e/answers.jsonl", "evals/e/summary.json"]),
        ("eval --model theirs --suite s.jsonl --html new/e.html", ["new/e.html"]),
        ("rate theirs --rater anna", ["theirs/ratings.anna.jsonl"]),
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


MAKERS = ("instructions", "answers", "turns", "refusals", "from-documents", "from-template", "pairs")


def test_every_output_of_a_command_is_known_to_the_guard() -> None:
    """By the names that its options and arguments have; a new one must find its way into `guard.outputs`."""
    writing = {" ".join(path): {one.name for one in command.params} for path, command in COMMANDS.items()}
    known = {name for name, given in writing.items() if given & {"out", "dst", "html"} or name in ("verify", "rate")}
    assert known == {
        "convert",
        "data check",
        "data convert",
        "data curate",
        *(f"make {maker}" for maker in MAKERS),
        "train",
        "eval",
        "rate",
        "fuse",
        "export",
        "verify",
        "demo",
        "report",
        "import-config",
    }


def greedy(path: Path) -> None:
    """As files._remove, which tidies up its own temporary file, with a pattern that is too wide."""
    for other in path.parent.glob(".*.partial-*"):
        other.unlink()


def careless(path: Path) -> None:
    """As files.flush, with a copy for whoever writes it."""
    shutil.copy(path, path.with_name("copy")) if path.is_file() else None


BUGS = {
    "a neighbour's file removed": ("_remove", greedy, ".theirs.partial-4711 was removed by: mlxtune data convert"),
    "a file written beside the output": ("flush", careless, "copy was made by: mlxtune data convert"),
    "a temporary file left": (
        "flush",
        lambda path: tempfile.mkdtemp(prefix="mlxtune-", dir=os.environ["TMPDIR"]),
        " was made by: mlxtune data convert",
    ),
    "nothing": ("flush", files.flush, ""),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_a_command_is_seen_on_a_run_of_it(bug: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real command, in the process of the tests, that ends well."""
    name, wrong, expected = BUGS[bug]
    monkeypatch.chdir(place)
    monkeypatch.setattr(files, name, wrong)
    (place / ".theirs.partial-4711").write_text("theirs")
    tiny.write_jsonl(place / "rows.jsonl", tiny.conversations(2))
    with pytest.raises(SystemExit) as ended:
        mlxtune.cli.main(["data", "convert", "rows.jsonl", "out.jsonl"])
    told = guard.told()
    assert ended.value.code == 0 and (expected in told if expected else not told), told
    for left in Path(os.environ["TMPDIR"]).glob("mlxtune-*"):
        shutil.rmtree(left)


def test_commands_in_the_process_of_the_tests_are_watched_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("mlxtune.train.runs.find", lambda folder: (place / "theirs/file").unlink() or [])
    with pytest.raises(SystemExit):
        mlxtune.cli.main(["runs", "theirs"])
    assert "theirs/file was removed by: mlxtune runs theirs" in guard.told()


def test_a_command_that_the_tests_start_themselves_is_watched_too(place: Path) -> None:
    """This one stands for mlxtune, by its name."""
    program = place / "mlxtune"
    program.write_text("#!/bin/sh\nrm theirs/file\n")
    program.chmod(0o700)
    for run in (
        lambda words: subprocess.run(words, cwd=place),
        lambda words: subprocess.Popen(words, cwd=place).wait(),
    ):
        (place / "theirs/file").write_text("again")
        run([str(program), "runs", "theirs"])
        assert "theirs/file was removed by: " in guard.told()


CALLS = """
import os, socket, sys
sys.path.insert(0, sys.argv[1])
import network
network.forbid(os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND))
for ask in (
    lambda: socket.getaddrinfo("hub.example", 443),
    lambda: socket.gethostbyname("hub.example"),
    lambda: socket.create_connection(("127.0.0.1", 1)),
    lambda: socket.socket(socket.AF_INET6).connect_ex(("::1", 1)),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
):
    try:
        ask()
    except OSError as error:
        assert str(error).startswith("no network: "), error
    else:
        raise AssertionError("it was not refused")
one, other = socket.socketpair(socket.AF_UNIX)
one.send(b"x")
"""


def test_every_way_to_the_network_is_refused_and_written_down(tmp_path: Path) -> None:
    done = [sys.executable, "-c", CALLS, str(Path(network.__file__).parent), str(tmp_path / "calls")]
    subprocess.run(done, check=True)
    said = (tmp_path / "calls").read_text()
    assert (said.count("socket.getaddrinfo of "), said.count("socket.gethostbyname of ")) == (2, 1)
    assert "socket.connect of ('::1', 1)" in said and "socket.sendto of ('192.0.2.1', 53)" in said


@pytest.mark.skipif(sys.platform != "linux", reason="commands are forked on Linux alone")
def test_a_forked_command_that_asks_the_network_fails_its_test() -> None:
    """A name that is no folder here is looked for on the hub."""
    with pytest.raises(AssertionError, match=r"socket\.getaddrinfo of .* by: .*mlxtune generate"):
        tiny.mlxtune("generate", "--model", "owner/name", "--prompt", "x")
