"""One revision of the project, and its commands run in a folder of their own.

Only what pyproject.toml says of a revision is used: the packages it has, and where its commands begin. So the same
lines serve revisions whose modules have other names.

Run as a program this is a server, as tests/warm.py is one: it imports what the commands import, then forks for each of
them. A line of JSON in for each command, a line with its exit status out.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Public libraries that the commands need sooner or later; what is not installed is not imported.
LIBRARIES = ("mlx.nn", "mlx_lm", "torch", "transformers.models.auto.modeling_auto", "peft", "gguf", "pydantic")
POLL = 0.0005  # seconds between two looks at a run that is to be killed; one of its steps takes some 20 ms


@dataclass(frozen=True)
class Revision:
    """What pyproject.toml says of one."""

    code: Path  # the checkout
    packages: tuple[str, ...]  # names to import
    search: tuple[str, ...]  # folders to find them in, absolute
    commands: dict[str, str]  # name of a command -> module:function

    @staticmethod
    def of(code: Path) -> Revision:
        said = tomllib.loads((code / "pyproject.toml").read_text(encoding="utf-8"))
        packages = [code / path for path in said["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
        search = dict.fromkeys(str(package.parent) for package in packages)  # in this order, each once
        names = tuple(package.name for package in packages)
        return Revision(code, names, tuple(search), dict(said["project"]["scripts"]))

    def places(self) -> dict[str, str]:
        """Name of a package -> its __file__. Raises SystemExit when one comes from elsewhere than this checkout."""
        found = {}
        for name in self.packages:
            file = str(importlib.import_module(name).__file__)
            if not Path(file).is_relative_to(self.code):
                raise SystemExit(f"{name} was imported from {file}, not from {self.code}")
            found[name] = file
        return found

    def entry(self, command: str) -> Callable[[], Any]:
        """The function that the installed command calls."""
        module, _, name = self.commands[command].partition(":")
        function: Callable[[], Any] = getattr(importlib.import_module(module), name)
        return function


def check_out(revision: str, folder: Path) -> Path:
    """Write the files of a revision of this repository into `folder`. Raises SystemExit when git has no such one."""
    done = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"git archive {revision}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


class Side:
    """The commands of one revision, run in `folder`. home: for what they keep elsewhere (caches)."""

    def __init__(self, code: Path, folder: Path, home: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(Revision.of(code).search),
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            "HF_HUB_OFFLINE": "1",
            # One thread each: two sides share the machine, and sums are taken in one order.
            "OPENBLAS_NUM_THREADS": "1",
            "COLUMNS": "200",
            "NO_COLOR": "1",
        }
        home.mkdir(parents=True, exist_ok=True)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # -P: this file's folder is no place to find modules in.
        self._server = subprocess.Popen([sys.executable, "-P", __file__, str(code)], env=environment, **pipes)

    def places(self) -> dict[str, str]:
        """Name of a package -> its __file__. To be asked once, before the first command."""
        places: dict[str, str] = json.loads(self._answer())
        return places

    def run(self, words: list[str], said: Path, kill: tuple[str, int] | None = None) -> int:
        """Run one command; its exit status, and what it said in the file `said`. words: from the command's name on.
        kill: (a run's folder, step): SIGKILL as soon as that run has told of the step; the status is then -9.
        """
        out, err = said.with_suffix(".out"), said.with_suffix(".err")
        said.parent.mkdir(parents=True, exist_ok=True)
        asked = {"words": words, "folder": str(self.folder), "out": str(out), "err": str(err), "kill": kill}
        assert self._server.stdin
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        status = int(self._answer())
        texts = [path.read_text(encoding="utf-8") for path in (out, err)]
        if status == -signal.SIGKILL:
            texts = ["", ""]  # how far it came is chance
        said.write_text(f"exit {status}\n--- out\n{texts[0]}\n--- err\n{texts[1]}", encoding="utf-8")
        out.unlink()
        err.unlink()
        return status

    def close(self) -> None:
        self._server.communicate()

    def _answer(self) -> str:
        assert self._server.stdout
        answer = self._server.stdout.readline()
        if not answer:
            raise SystemExit("the server of one side's commands has ended")
        return answer


def _serve(code: Path) -> None:
    revision = Revision.of(code)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints while it is imported is no answer
    if sys.platform == "linux":  # elsewhere a process that has loaded a GPU's libraries cannot be forked
        for command in revision.commands:  # first: they choose what MLX multiplies with
            revision.entry(command)
        for name in LIBRARIES:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    print(json.dumps(revision.places()), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            answers.close()
            _become(asked)
            revision.entry(asked["words"][0])()
            os._exit(0)  # a command ends by itself
        if asked["kill"]:
            run, step = asked["kill"]
            _kill_at(child, Path(asked["folder"], run, "events.jsonl"), step)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
    os._exit(0)  # taking apart all that was imported takes seconds as well


def _become(asked: dict[str, Any]) -> None:
    """Take a command's place: its words, folder and streams."""
    os.chdir(asked["folder"])
    sys.argv = asked["words"]
    new = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    streams = [(os.devnull, os.O_RDONLY), (asked["out"], new), (asked["err"], new)]
    for number, (path, mode) in enumerate(streams):
        opened = os.open(path, mode, 0o600)
        os.dup2(opened, number)
        os.close(opened)


def _kill_at(child: int, events: Path, step: int) -> None:
    """SIGKILL for `child` once `events` tells of that training step, unless it has ended before."""
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if events.is_file() and _steps_done(events) >= step:
            os.kill(child, signal.SIGKILL)
            return
        time.sleep(POLL)


def _steps_done(events: Path) -> int:
    done = 0
    for line in events.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last line may be half written
            event = json.loads(line)
            if event["kind"] == "train":
                done = event["step"]
    return done


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
