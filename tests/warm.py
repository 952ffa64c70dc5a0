"""The command without its start: a process that has imported what commands import and forks for each of them.

A start takes some three seconds of a core, most of them to import torch and transformers, and the tests make hundreds.
What is forked is a process of its own, as fresh as the command's: nothing was computed before it, and it ends as any.
Run as a program this is the server: a line of JSON in for each command, a line with its exit status out.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# Variables that may be others than the server's: those that nothing reads while it is imported, and those that
# libraries set in the process that imports them.
FREE = ("PYTEST_CURRENT_TEST", "COLUMNS", "TORCHINDUCTOR_CACHE_DIR", "TRANSFORMERS_NO_ADVISORY_WARNINGS")
LONGEST = 600.0  # seconds
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


@dataclass(frozen=True)
class Measured:
    """result: of the command; its status is a negative signal where one ended it; seconds: of a core; peak: bytes that
    it held beyond those of the process that it was forked from; late: it did not end, and was killed.
    """

    result: subprocess.CompletedProcess[str]
    seconds: float
    peak: int
    late: bool


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The command in a process forked by the server, without input."""
    return measured(command, environment).result


def measured(
    command: list[str], environment: dict[str, str], given: str = "", memory: int = 0, longest: float = LONGEST
) -> Measured:
    """The same, and what it took. The command's first word tells mlxtune-convert from mlxtune. given: its input;
    memory: bytes beyond the server's that it may address, 0: no limit; longest: seconds until it is killed.
    """
    global _server
    if _server is None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        _server = subprocess.Popen([sys.executable, __file__], env=_begun_in, **pipes)
    server = _server
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        streams = {name: Path(folder, name) for name in ("in", "out", "err")}
        streams["in"].write_text(given, encoding="utf-8")
        asked = {"command": command, "cwd": os.getcwd(), "environment": environment, "memory": memory}
        asked |= {"longest": longest, **{name: str(path) for name, path in streams.items()}}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the server of forked commands has ended"
        said, told = (streams[name].read_bytes().decode("utf-8", "replace") for name in ("out", "err"))
    took = json.loads(answer)
    status = took.pop("status")
    return Measured(subprocess.CompletedProcess(command, status, said, told), **took)


def end() -> None:
    """Let the server of this process end."""
    global _server
    if _server is not None:
        _server.communicate()  # closes what it reads
        _server = None


def _serve() -> None:
    import mlxtune_convert.cli

    import mlxtune.cli  # first, as in the command: it chooses what MLX multiplies with

    for name in ("tuning", "bench", "demo.story", "model.peft", "ship.gguf"):
        __import__(f"mlxtune.{name}")
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    # No thread but those of OpenBLAS, which ends them before a fork and begins them again after it.
    assert "pyarrow" not in sys.modules and threading.active_count() == 1
    gc.freeze()  # a forked process need not look at, and so copy, what was imported
    for line in sys.stdin:
        asked = json.loads(line)
        before = _resident()
        child = os.fork()
        if child == 0:
            _become(asked)
            other = Path(asked["command"][0]).name == "mlxtune-convert"
            _leave_after(mlxtune_convert.cli.main if other else mlxtune.cli.main)
        late = not _ends(child, asked["longest"])
        _, status, usage = os.wait4(child, 0)
        took = {"seconds": usage.ru_utime + usage.ru_stime, "peak": max(0, usage.ru_maxrss * 1024 - before)}
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), "late": late, **took}), flush=True)
    os._exit(0)


def _resident() -> int:
    """Bytes that this process holds, with which one that it forks begins."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _ends(child: int, longest: float) -> bool:
    """Wait for a process, `longest` seconds; one that does not end is killed."""
    handle = os.pidfd_open(child)
    ended, _, _ = select.select([handle], [], [], longest)
    os.close(handle)
    if not ended:
        os.kill(child, signal.SIGKILL)
    return bool(ended)


def _leave_after(main: Callable[[], Any]) -> NoReturn:
    """End this process as Python does after `main`, but for taking apart all that was imported: a second of a core."""
    status: Any = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    assert status is None or isinstance(status, int)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):  # closed
            stream.flush()
    os._exit(status or 0)


def _become(asked: dict[str, Any]) -> None:
    """Take a command's place: its words, folder, environment and streams."""
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = asked["command"]
    if asked["memory"]:
        own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (own + asked["memory"],) * 2)
    for number, (path, flags) in enumerate(
        [(asked["in"], os.O_RDONLY), *((asked[name], os.O_WRONLY | os.O_CREAT) for name in ("out", "err"))]
    ):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)


if __name__ == "__main__":
    _serve()
