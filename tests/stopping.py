"""Runs of the command whose steps last as long as a test wants, for signals that come inside them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny

# Begins a process for each line: importing the libraries for every one of them would take minutes.
WORKER = """
import json, os, signal, sys, time
from mlxtune.train import run
from mlxtune.cli import main
from mlxtune.train import signals, step
real = step.StepFunction.__call__
for line in sys.stdin:
    asked = json.loads(line)
    if (child := os.fork()) == 0:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1):
            os.dup2(nothing, stream)
        os.dup2(os.open(asked["stderr"], os.O_WRONLY | os.O_CREAT | os.O_NOCTTY), 2)
        if asked["nohup"]:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signals.STEP_SECONDS = asked["patience"]
        def call(self, number):
            event = real(self, number)
            open(f"{asked['marks']}/{number}", "w").close()
            time.sleep(asked["lasts"].get(str(number), 0))
            return event
        step.StepFunction.__call__ = call
        code = 1
        try:
            main(asked["words"])
        except SystemExit as end:
            code = end.code
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
sys.exit()
"""


@dataclass
class Run:
    """A command in progress. out: the run's folder; said: what it prints to standard error, where that is a file."""

    process: tiny.Process
    pid: int
    out: Path
    said: Path
    marks: Path

    def in_step(self, number: int) -> None:
        """Wait until it is inside this step, its numbers computed."""
        until = time.monotonic() + 120
        while not (self.marks / str(number)).exists():
            assert time.monotonic() < until, self.said.read_text()
            time.sleep(0.01)

    def send(self, *numbers: signal.Signals, pause: float = 0.3) -> None:
        for number in numbers:
            os.kill(self.pid, number)
            time.sleep(pause)

    def ended(self) -> tuple[int, float]:
        """(its exit status, seconds waited for it)."""
        assert self.process.stdout
        began = time.monotonic()
        return int(self.process.stdout.readline()), time.monotonic() - began

    def notes(self) -> str:
        """What its events tell."""
        return "\n".join(event["text"] for event in self.events() if event["kind"] == "note")

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "events.jsonl").read_text().splitlines()]

    def checkpoints(self) -> list[int]:
        return sorted(int(folder.name[5:]) for folder in (self.out / "checkpoints").glob("step-*"))


class Stopping:
    """Begins runs, one at a time."""

    def __init__(self, process: tiny.Process) -> None:
        self._process = process

    def start(
        self,
        out: Path,
        words: list[str],
        lasts: dict[int, float] | None = None,
        patience: float = 60.0,
        nohup: bool = False,
        stderr: Path | None = None,
    ) -> Run:
        """lasts: seconds that steps sleep when they are computed; patience: signals.STEP_SECONDS."""
        marks, said = out.with_name("marks"), stderr or out.with_name("said")
        marks.mkdir(exist_ok=True)
        for mark in marks.iterdir():
            mark.unlink()
        asked = {"words": words, "lasts": lasts or {}, "patience": patience, "nohup": nohup}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({**asked, "stderr": str(said), "marks": str(marks)}) + "\n")
        self._process.stdin.flush()
        return Run(self._process, int(self._process.stdout.readline()), out, said, marks)


@contextlib.contextmanager
def worker() -> Iterator[Stopping]:
    # Bits depend on the BLAS and its threads.
    with tiny.started(code=WORKER, OPENBLAS_NUM_THREADS="1") as process:
        yield Stopping(process)
        assert process.stdin
        process.stdin.close()
