"""The command without its start: a process that has imported what commands import and forks for each of them.

A start takes some three seconds of a core, most of them to import torch and transformers, and the tests make hundreds.
What is forked is a process of its own, as fresh as the command's: nothing was computed before it, and it ends as any.
Run as a program this is the server: a message in for each command, one out when it has begun, one when it has ended.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

import network

# Variables that may be others than the server's: those that nothing reads while it is imported, and those that
# libraries set in the process that imports them.
FREE = ("PYTEST_CURRENT_TEST", "COLUMNS", "TORCHINDUCTOR_CACHE_DIR", "TRANSFORMERS_NO_ADVISORY_WARNINGS", "HF_TOKEN")
FREE += ("TERM", "TMPDIR", "MLX_RANK", "MLX_HOSTFILE", "EDITOR", "VISUAL")
LONGEST = 1 << 18  # bytes of a message: the words and the environment of a command


def begin_in(environment: dict[str, str]) -> None:
    """Let commands in this environment be forked; their server begins with the first of them."""
    _servers.append(_Server(dict(environment)))


def fits(environment: dict[str, str]) -> bool:
    """Whether a command in this environment is the same when it is forked: libraries read most variables only when they
    are imported. (On macOS a process that has touched Metal's frameworks cannot be forked.)
    """
    return sys.platform == "linux" and any(server.fits(environment) for server in _servers)


def run(
    command: list[str], environment: dict[str, str], terminal: int | None = None
) -> subprocess.CompletedProcess[str]:
    """The command in a forked process, without input, or on a terminal of its own. It may change nothing but what it is
    told to write, and ask the network for nothing (but a hub that the environment names, and other ranks).
    """
    from guard import Watch  # not in the server

    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8") as err,
        tempfile.TemporaryFile("w+", encoding="utf-8") as calls,
        open(os.devnull, encoding="utf-8") as nothing,
    ):
        streams = [nothing.fileno(), out.fileno(), err.fileno()] if terminal is None else [terminal] * 3
        watch = Watch(command, environment=environment)
        alone = not {"HF_ENDPOINT", "MLX_RANK"} & environment.keys()
        status = Command(command, environment, [*streams, *([calls.fileno()] if alone else [])]).wait()
        watch.end()
        for file in (out, err, calls):
            file.seek(0)
        asked = calls.read()
        assert not asked, f"{asked}by: {' '.join(command)}"
        return subprocess.CompletedProcess(command, status, out.read(), err.read())


@dataclass(frozen=True)
class Measured:
    """A command that has ended, and what it took."""

    result: subprocess.CompletedProcess[str]  # its status is a negative signal where one ended it
    seconds: float  # of a core
    peak: int  # bytes that it held beyond those of the process that it was forked from
    late: bool  # it did not end, and was killed


def measured(
    command: list[str], environment: dict[str, str], given: str = "", memory: int = 0, longest: float = 600
) -> Measured:
    """The command in a forked process of the first server, which nothing watches: the environment may name another home
    and another cache, which what was imported does not hear of.

    given: its standard input; memory: bytes beyond the server's that it may address, 0: no limit; longest: seconds
    until it is killed.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        files[0].write(given.encode())
        files[0].seek(0)
        process = Command(command, environment, [file.fileno() for file in files], "", memory, _servers[0])
        late = False
        try:
            status = process.wait(longest)
        except subprocess.TimeoutExpired:
            late = True
            process.kill()
            status = process.wait()
        for file in files[1:]:
            file.seek(0)
        said, told = (file.read().decode("utf-8", "replace") for file in files[1:])
    return Measured(subprocess.CompletedProcess(command, status, said, told), *process.took(), late)


def start(command: list[str], environment: dict[str, str], code: str = "", streams: Sequence[int] = ()) -> Command:
    """The command, running in a forked process. code: Python that the process does first; streams: what it has as
    standard input, output and error, where these are not to be pipes to it.
    """
    if streams:
        return Command(command, environment, streams, code)
    (their_in, our_in), (our_out, their_out), (our_err, their_err) = (os.pipe() for _ in range(3))
    theirs = (their_in, their_out, their_err)
    process = Command(command, environment, theirs, code)
    for stream in theirs:
        os.close(stream)
    process.stdin, process.stdout, process.stderr = open(our_in, "w"), open(our_out), open(our_err)  # noqa: SIM115
    return process


def end(environment: dict[str, str] | None = None) -> None:
    """Let the server of this environment end, or all of them."""
    for server in [one for one in _servers if environment is None or one.fits(environment)]:
        server.end()
        _servers.remove(server)


class Command:
    """A command that was forked, as far as tests need it like a subprocess.Popen."""

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        streams: Sequence[int],
        code: str = "",
        memory: int = 0,
        server: _Server | None = None,
    ) -> None:
        self._server = server or next(server for server in _servers if server.fits(environment))
        asked = {"command": command, "cwd": os.getcwd(), "environment": environment, "code": code, "memory": memory}
        self.pid = self._server.fork(asked, streams)
        self.stdin: IO[str] | None = None
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None

    @property
    def returncode(self) -> int | None:
        return self._server.ended.get(self.pid)

    def took(self) -> tuple[float, int]:
        """(seconds of a core, bytes held beyond the server's) of a command that has ended."""
        return self._server.took[self.pid]

    def poll(self) -> int | None:
        self._server.hear(0)
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        until = time.monotonic() + timeout
        while self.returncode is None:
            left = until - time.monotonic()
            if left < 0:
                raise subprocess.TimeoutExpired("a forked command", timeout)
            self._server.hear(left)
        return self.returncode

    def communicate(self, text: str | None = None, timeout: float = 600) -> tuple[str, str]:
        """(rest of its standard output, of its standard error), when it has ended."""
        assert self.stdin and self.stdout and self.stderr
        said: dict[IO[str], str] = {}
        threads = [
            threading.Thread(target=lambda stream=stream: said.update({stream: stream.read()}))
            for stream in (self.stdout, self.stderr)
        ]
        for thread in threads:
            thread.start()
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(text or "")
            self.stdin.close()
        self.wait(timeout)
        for thread in threads:
            thread.join()
        rest = said[self.stdout], said[self.stderr]
        self._close()
        return rest

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended, and the server has not said so yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _close(self) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self.wait()


class _Server:
    """This process's end of a server."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._fixed = _fixed(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._begun: list[int] = []
        self.ended: dict[int, int] = {}  # exit statuses by process, as subprocess counts them
        self.took: dict[int, tuple[float, int]] = {}  # by process: seconds of a core, and bytes beyond the server's

    def fits(self, environment: dict[str, str]) -> bool:
        return _fixed(environment) == self._fixed

    def fork(self, asked: dict[str, Any], streams: Sequence[int]) -> int:
        """Returns the process's number."""
        if self._control is None:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            words = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(words, env=self._environment, pass_fds=[theirs.fileno()])
            theirs.close()
        socket.send_fds(self._control, [json.dumps(asked).encode()], list(streams))
        while not self._begun:
            self.hear(60)
        return self._begun.pop()

    def hear(self, seconds: float) -> None:
        """Take what the server has to say; wait so long for its first word."""
        assert self._control
        while select.select([self._control], [], [], seconds)[0]:
            told = json.loads(self._control.recv(LONGEST) or b"null")
            assert told, "the server of forked commands has ended"
            if "status" in told:
                self.ended[told["number"]] = told["status"]
                self.took[told["number"]] = told["seconds"], told["peak"]
            else:
                # What ended before with this number was another process. What ends after may be heard in the same turn,
                # where this process was kept waiting: it must not be forgotten.
                self.ended.pop(told["number"], None)
                self._begun.append(told["number"])
            seconds = 0

    def end(self) -> None:
        if self._control and self._process:
            self._control.close()
            self._process.wait()


_servers: list[_Server] = []


def _fixed(environment: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key not in FREE}


def _serve(control: socket.socket) -> None:
    # PyTorch makes this folder when it is loaded; one that is there need not be made among the commands' files.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
    import mlxtune_convert.cli  # noqa: F401

    import mlxtune.cli  # noqa: F401  # first, as in the command: it chooses what MLX multiplies with

    for name in ("train.run", "bench", "demo.story", "adapter.peft", "ship.export", "report.written"):
        __import__(f"mlxtune.{name}")
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    # No thread but those of OpenBLAS, which ends them before a fork and begins them again after it.
    assert "pyarrow" not in sys.modules and threading.active_count() == 1
    gc.freeze()  # a forked process need not look at, and so copy, what was imported
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests and the commands
    own = _pages(1)  # with which every command begins
    running: dict[int, int] = {}  # their numbers, by what tells of their end
    while True:
        for ready in select.select([control.fileno(), *running], [], [])[0]:
            if ready in running:
                os.close(ready)
                number = running.pop(ready)
                _, status, usage = os.wait4(number, 0)
                took = {"seconds": usage.ru_utime + usage.ru_stime, "peak": max(0, usage.ru_maxrss * 1024 - own)}
                told = {"number": number, "status": os.waitstatus_to_exitcode(status), **took}
                control.send(json.dumps(told).encode())
                continue
            message, streams, _, _ = socket.recv_fds(control, LONGEST, 4)
            if not message:
                os._exit(0)  # the tests have ended
            child = os.fork()
            if child == 0:
                control.close()
                _leave_after(partial(_command, json.loads(message), streams))
            for stream in streams:
                os.close(stream)
            running[os.pidfd_open(child)] = child
            control.send(json.dumps({"number": child}).encode())


def _pages(column: int) -> int:
    """Bytes of this process, by a column of /proc/self/statm: 0 what it may address, 1 what it holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[column]) * resource.getpagesize()


def _command(asked: dict[str, Any], streams: Sequence[int]) -> None:
    """Take a command's place, with its words, folder, environment and streams, and be it."""
    from mlxtune_convert.cli import main as convert_main

    from mlxtune.cli import main

    # A handler even where the tests run in the background, which makes a shell ignore Ctrl-C for its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    tempfile.tempdir = None  # found again, by the new environment
    sys.argv = asked["command"]
    *streams, calls = [*streams, -1][:4]
    if os.isatty(streams[0]):
        os.setsid()  # then this terminal's Ctrl-C is for this process
        fcntl.ioctl(streams[0], termios.TIOCSCTTY, 0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    if calls >= 0:
        network.forbid(calls)
    for stream in streams:
        if stream > 2:
            os.close(stream)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    if asked["memory"]:
        resource.setrlimit(resource.RLIMIT_AS, (_pages(0) + asked["memory"],) * 2)
    exec(asked["code"], {"__name__": "__main__"})
    if Path(asked["command"][0]).name == "mlxtune-convert":
        convert_main()
    main()


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
        with contextlib.suppress(ValueError, OSError):  # closed, or nobody reads any more
            stream.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
