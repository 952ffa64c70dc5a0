"""Runs a program and its tests in two boxes, and tells whether the tests were passed.

Both boxes are processes with the limits below; whoever starts them says what else they cannot do (`linux`, `macos`).
This module runs in a bare Python, without anything installed: it imports the standard library and its own room.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import select
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from mlxtune.evaluate.checks.sandbox import program_side, tests_side
from mlxtune.evaluate.checks.sandbox.values import Lines

MEMORY = 1 << 30  # bytes of address space of one box; macOS cannot limit it
FILES = 16 << 20  # bytes of one file
OPEN_FILES = 64  # at a time
PROCESSES = 16  # of one user in one box; where the user is root it does not hold, and time alone limits them
LONGEST_PROOF = 4096  # bytes that are read of what the tests say

# Starts one box: (its part, its standard input, the pipes that it keeps) -> what ends it, with all that it started.
Start = Callable[[str, int, Sequence[int]], Callable[[], None]]


class Outcome(NamedTuple):
    """What became of one program."""

    passed: bool  # the last assertion was passed
    reason: str  # why not; "" where it was


def judged(start: Start, program: str, tests: Callable[[], str], seconds: float) -> Outcome:
    """Run a program and its tests. tests: gives their text; it is asked for when the program's box has started, so that
    no copy of it is in that box's memory. seconds: that both may take together.
    """
    deadline = time.monotonic() + seconds
    source_read, source_write = os.pipe()
    asked_read, asked_write = os.pipe()
    told_read, told_write = os.pipe()
    end_program = start("program", source_read, (asked_read, told_write))
    _close(source_read, asked_read, told_write)
    _write(source_write, program)
    word = secrets.token_hex(16)
    tests_read, tests_write = os.pipe()
    proof_read, proof_write = os.pipe()
    end_tests = start("tests", tests_read, (told_read, asked_write, proof_write))
    _close(tests_read, told_read, asked_write, proof_write)
    _write(tests_write, json.dumps({"tests": tests(), "word": word}))
    said = _read(proof_read, deadline)
    _close(proof_read)
    end_program()
    end_tests()
    if said is None:
        return Outcome(False, f"took longer than {seconds:g} s")
    if said == word:
        return Outcome(True, "")
    return Outcome(False, said.removeprefix(tests_side.FAILED) or "the tests were ended")


def _close(*handles: int) -> None:
    for handle in handles:
        os.close(handle)


def _write(handle: int, text: str) -> None:
    """All of a text, and its end. A box that does not listen any more is found out later."""
    data = text.encode(errors="surrogatepass")
    with suppress(BrokenPipeError):
        while data:
            data = data[os.write(handle, data) :]
    os.close(handle)


def _read(handle: int, deadline: float) -> str | None:
    """What the tests say until they end; None where they do not in time."""
    said = b""
    while len(said) < LONGEST_PROOF:
        ready, _, _ = select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(handle, LONGEST_PROOF)
        if not part:
            break
        said += part
    return said.decode(errors="replace")


def limit(seconds: float) -> None:
    """What this process, and each one that it starts, may use at most."""
    wanted = (
        (resource.RLIMIT_CPU, int(seconds) + 2),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, FILES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, PROCESSES),
        (resource.RLIMIT_CORE, 0),
    )
    for what, most in wanted:
        if sys.platform == "darwin" and what in (resource.RLIMIT_AS, resource.RLIMIT_NPROC):
            continue  # the first is refused there; the second counts all processes of the user
        with suppress(ValueError, OSError):  # a lower limit holds already
            resource.setrlimit(what, (most, most))


def play(part: str, handles: Sequence[int]) -> None:
    """Be one of the two boxes. handles: the pipes that `judged` gave to this part."""
    given = b""
    while more := os.read(0, 1 << 16):
        given += more
    text = given.decode(errors="surrogatepass")
    lines = Lines(handles[0], handles[1])
    if part == "program":
        program_side.run(text, lines)
    else:
        work = json.loads(text)
        tests_side.run(work["tests"], work["word"], lines, handles[2])
