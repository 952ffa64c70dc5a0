"""The command without its start: a process that has imported what commands import and forks for each of them.

A start takes some three seconds of a core, most of them to import torch and transformers, and the tests make hundreds.
What is forked is a process of its own, as fresh as the command's: nothing was computed before it, and it ends as any.
Run as a program this is the server: a line of JSON in for each command, a line with its exit status out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

# Variables that may be others than the server's: those that nothing reads while it is imported, and those that
# libraries set in the process that imports them.
FREE = ("PYTEST_CURRENT_TEST", "COLUMNS", "TORCHINDUCTOR_CACHE_DIR", "TRANSFORMERS_NO_ADVISORY_WARNINGS")
_server: subprocess.Popen[str] | None = None
_begun_in: dict[str, str] = {}  # the environment that the server has


def begin_in(environment: dict[str, str]) -> None:
    """Say in which environment the server of this process is to begin, when it is first needed."""
    _begun_in.update(environment)


def fits(environment: dict[str, str]) -> bool:
    """Whether a command in this environment is the same when it is forked: libraries read most variables only when they
    are imported. (On macOS a process that has touched Metal's frameworks cannot be forked.)
    """
    return sys.platform == "linux" and _fixed(environment) == _fixed(_begun_in)


def _fixed(environment: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key not in FREE}


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The command in a process forked by the server, without input."""
    global _server
    if _server is None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        _server = subprocess.Popen([sys.executable, __file__], env=_begun_in, **pipes)
    server = _server
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        asked = {"command": command, "cwd": os.getcwd(), "environment": environment, "out": str(out), "err": str(err)}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the server of forked commands has ended"
        said, told = out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")
    return subprocess.CompletedProcess(command, int(answer), said, told)


def end() -> None:
    """Let the server of this process end."""
    global _server
    if _server is not None:
        _server.communicate()  # closes what it reads
        _server = None


def _serve() -> None:
    import mlxtune.cli  # first, as in the command: it chooses what MLX multiplies with

    for name in ("train.tuning", "bench", "demo.story", "adapter.peft", "ship.export"):
        __import__(f"mlxtune.{name}")
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    # No thread but those of OpenBLAS, which ends them before a fork and begins them again after it.
    assert "pyarrow" not in sys.modules and threading.active_count() == 1
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(asked)
            mlxtune.cli.main()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)  # taking apart all that was imported takes seconds as well


def _become(asked: dict[str, Any]) -> None:
    """Take a command's place: its words, folder, environment and streams."""
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = asked["command"]
    for number, (path, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), *((asked[name], os.O_WRONLY | os.O_CREAT) for name in ("out", "err"))]
    ):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)


if __name__ == "__main__":
    _serve()
