"""A command that the tests fork is the command."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import warm

import mlxtune.ship.export  # noqa: F401  what tests import before they run commands

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="commands are forked on Linux alone")


def ended(*words: str | Path, apart: bool) -> subprocess.CompletedProcess[str]:
    """The command, started apart from all others, or forked."""
    return tiny.mlxtune(*words, **({"MLXTUNE_APART": "1"} if apart else {}))


def test_commands_are_forked_unless_their_environment_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft  # noqa: F401  which sets a variable

    assert warm.fits({**os.environ, "COLUMNS": "200"})
    assert not warm.fits({**os.environ, "HF_ENDPOINT": "http://127.0.0.1:1"})
    monkeypatch.delenv("PATH")
    assert not warm.fits(dict(os.environ))


def test_a_forked_command_says_and_makes_what_a_started_one_does(
    hf_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With relative paths, a result on one stream, notes on the other, a refusal, and numbers to the last bit."""
    monkeypatch.chdir(tmp_path)
    settings = ("train.steps=2", "train.lr=1e-3", "lora.rank=2")
    words = ["train", "--model", hf_model, "--data", data, *(word for one in settings for word in ("--set", one))]
    for name, apart in (("started", True), ("forked", False)):
        done = ended(*words, "--out", name, apart=apart)
        assert done.returncode == 0 and done.stdout.startswith(f"{name}: 2 steps")
        assert "reading the model" in done.stderr
    started, forked = (Path(name, "adapters.safetensors").read_bytes() for name in ("started", "forked"))
    assert started == forked
    for words in (["chat", "--model", hf_model], ["fuse", "--nope"]):
        one, other = ended(*words, apart=True), ended(*words, apart=False)
        assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)


FIRST = """
import atexit, sys, threading, time
print(sys.stdin.readline(), end="")
print(sys.stdout.line_buffering, sys.argv[1:], file=sys.stderr)
atexit.register(print, "the last word")
threading.Thread(target=lambda: [time.sleep(0.3), print("a thread")]).start()
"""


@pytest.mark.parametrize("apart", [True, False], ids=["started", "forked"])
def test_a_command_reads_what_is_written_to_it_and_ends_as_python_does(apart: bool) -> None:
    """Code that comes first, pipes, threads that are waited for, functions for the end, and text that was kept back."""
    process = tiny.started("--version", code=FIRST, **({"MLXTUNE_APART": "1"} if apart else {}))
    assert isinstance(process, subprocess.Popen if apart else warm.Command)
    out, err = process.communicate("a line\n")
    assert (process.returncode, err) == (0, "False ['--version']\n")
    first, *middle, last = out.splitlines()
    assert (first, last) == ("a line", "the last word")
    # On a busy machine the thread may speak before the command does.
    assert sorted(line.split(" 0.")[0] for line in middle) == ["a thread", "mlxtune"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_forked_commands_hear_signals_and_one_does_not_wait_for_another(number: signal.Signals) -> None:
    code = "import sys, time; print('here', flush=True); time.sleep(60)"
    with tiny.started("--version", code=code) as process:
        assert process.stdout and process.stdout.readline() == "here\n" and process.poll() is None
        assert tiny.mlxtune("--version").returncode == 0
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.send_signal(number)
    assert process.returncode == -number


def test_a_forked_command_that_fails_shows_where() -> None:
    process = tiny.started("--version", code="1 / 0")
    out, err = process.communicate()
    assert (process.returncode, out) == (1, "") and err.endswith("ZeroDivisionError: division by zero\n")


def test_a_forked_command_has_a_terminal_where_it_is_given_one() -> None:
    ours, theirs = pty.openpty()
    process = tiny.started("--version", code=FIRST, streams=(theirs, theirs, theirs))
    os.close(theirs)
    os.write(ours, b"a line\n")
    assert process.wait(60) == 0
    assert b"True ['--version']" in os.read(ours, 4096)
    os.close(ours)


def test_a_command_that_ended_before_anybody_heard_of_it_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a busy machine: its beginning and its end are then heard in one turn."""
    sent = socket.send_fds

    def late(*given: Any) -> int:
        count = sent(*given)
        time.sleep(1.5)
        return count

    tiny.done("--version")  # the server is there
    monkeypatch.setattr(socket, "send_fds", late)
    process = tiny.started("--version")
    said, _ = process.communicate(timeout=9)
    assert process.returncode == 0 and said.startswith("mlxtune ")
