"""Runs programs of strangers: what a model wrote may do anything.

    with open_sandbox() as sandbox:                 refused where the system has none
        sandbox.run("def add(a, b): return a + b", "assert add(1, 2) == 3")        -> Outcome(passed=True, reason="")

A program passes when, after the last assertion, a word is said that it cannot know: not when its process ends well,
which `os._exit(0)` does too. On Linux a box is made of namespaces (`linux`), on macOS of a sandbox profile (`macos`).
Whether it holds is tried each time that one is opened.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxtune.errors import UserError
from mlxtune.evaluate.checks.sandbox import macos
from mlxtune.evaluate.checks.sandbox.boxes import Outcome, judged

SECONDS = 5.0  # that a program and its tests may take
UNSAFE = "With --unsafe-code programs run with your own rights: only for programs that you trust."
# A bare Python that finds this room, and nothing else that is installed: the packages around it are empty names, so
# that no `__init__` runs, and with it none of what this program imports.
BOOT = """
import sys, types
for name in ("mlxtune", "mlxtune.evaluate", "mlxtune.evaluate.checks", "mlxtune.evaluate.checks.sandbox"):
    sys.modules[name] = types.ModuleType(name)
sys.modules[name].__path__ = [sys.argv.pop(1)]
"""
SERVE = BOOT + "from mlxtune.evaluate.checks.sandbox import linux\nlinux.serve()"
PLAY = (
    BOOT
    + """
from mlxtune.evaluate.checks.sandbox import boxes
boxes.limit(float(sys.argv[1]))
boxes.play(sys.argv[2], [int(handle) for handle in sys.argv[3:]])
"""
)
# What is tried when a sandbox is opened: each program sets `done` to whether it could.
ATTEMPTS = {
    "read a file of yours": "try:\n    done = open({file!r}).read() == 'x'\nexcept OSError:\n    done = False",
    "write a file": "try:\n    done = open({file!r} + '.made', 'w').write('x') == 1\nexcept OSError:\n    done = False",
    "reach the network": "import socket\ntry:\n    done = bool(socket.create_connection(('127.0.0.1', {port}), 1))\n"
    "except OSError:\n    done = False",
}


class Sandbox(ABC):
    """Where programs run."""

    @abstractmethod
    def run(self, program: str, tests: str, seconds: float = SECONDS) -> Outcome:
        """Whether a program passes its tests in time. Raises UserError where the sandbox itself fails."""

    def close(self) -> None:  # noqa: B027, there may be nothing to end
        """End it."""

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Programs:
    """Whether programs may be run, and the sandbox for them, which is opened when it is first asked for."""

    def __init__(self, allowed: bool = False, unsafe: bool = False) -> None:
        """allowed: the user said --run-code; unsafe: and that it need not be in a sandbox."""
        self.allowed, self.unsafe = allowed or unsafe, unsafe
        self._sandbox: Sandbox | None = None

    def sandbox(self) -> Sandbox:
        """Raises UserError where there is none."""
        if self._sandbox is None:
            self._sandbox = open_sandbox(self.unsafe)
        return self._sandbox

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None


def open_sandbox(unsafe: bool = False) -> Sandbox:
    """A sandbox that holds; unsafe: none, only the limits on time and memory. Raises UserError where there is none."""
    sandbox: Sandbox
    if unsafe:
        return Launched(lambda folder: [])
    if macos.is_here():
        sandbox = Launched(macos.command)
    elif sys.platform == "linux":
        sandbox = Served()
    else:
        raise UserError(f"there is no sandbox for programs on {sys.platform}", UNSAFE)
    try:
        _try_out(sandbox)
    except BaseException:
        sandbox.close()
        raise
    return sandbox


def _try_out(sandbox: Sandbox) -> None:
    """Raise UserError for a sandbox in which a right program fails, or a hostile one gets what it wants."""
    outcome = sandbox.run("def double(x):\n    return 2 * x", "assert double(21) == 42")
    if not outcome.passed:
        raise UserError(f"the sandbox cannot run a simple program here ({outcome.reason})", UNSAFE)
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        file = Path(folder) / "file"
        file.write_text("x")
        for what, attempt in ATTEMPTS.items():
            program = attempt.format(file=str(file), port=server.getsockname()[1])
            if sandbox.run(program, "assert done").passed:
                raise UserError(f"the sandbox does not hold here: a program in it can {what}", UNSAFE)


class Launched(Sandbox):
    """Each box is a Python of its own. prefix: the command that closes it in, by the folder that it may write to."""

    def __init__(self, prefix: Callable[[str], list[str]]) -> None:
        self._prefix = prefix

    def run(self, program: str, tests: str, seconds: float = SECONDS) -> Outcome:
        def start(part: str, given: int, handles: Sequence[int]) -> Callable[[], None]:
            return self._start(part, given, handles, seconds)

        return judged(start, program, lambda: tests, seconds)

    def _start(self, part: str, given: int, handles: Sequence[int], seconds: float) -> Callable[[], None]:
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        process = subprocess.Popen(
            [*self._prefix(folder.name), *_bare(PLAY), str(seconds), part, *map(str, handles)],
            stdin=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=handles,
            cwd=folder.name,
            env=_environment(HOME=folder.name, TMPDIR=folder.name),
            start_new_session=True,
        )

        def end() -> None:
            with suppress(ProcessLookupError, PermissionError):  # all that it started and that did not leave its group
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            folder.cleanup()

        return end


class Served(Sandbox):
    """Boxes of Linux, forked by a process that shut itself up. Raises UserError where the system does not allow it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            _bare(SERVE),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,  # a Ctrl-C is for us
        )
        said = self._received()
        if "fault" in said:
            self.close()
            raise UserError(
                f"there is no sandbox for programs here: this Linux allows no namespaces ({said['fault']})",
                f"User namespaces make one; a container needs them allowed. {UNSAFE}",
            )

    def run(self, program: str, tests: str, seconds: float = SECONDS) -> Outcome:
        self._send({"program": program, "seconds": seconds})
        said = self._received()
        if "begun" in said:
            self._send({"tests": tests})
            said = self._received()
        if "fault" in said:
            raise UserError(f"the sandbox failed: {said['fault']}", UNSAFE)
        return Outcome(said["passed"], said["reason"])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _send(self, value: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()

    def _received(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return {"fault": "its process ended"}
        said: dict[str, Any] = json.loads(line)
        return said


def _environment(**more: str) -> dict[str, str]:
    """What a bare Python needs of the environment: some are built to find their library by it."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {"LANG": "C.UTF-8", **kept, **more}


def _bare(script: str) -> list[str]:
    """A command that runs a script in a Python without site-packages, without the user's variables and folders."""
    return [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", script, str(Path(__file__).resolve().parent)]
