"""The command on a terminal of its own: what the terminal is sent, and what of that it would obey."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import warm

# What rich, click and readline themselves send: colours, erasing lines, moving up to draw again, the cursor hidden and
# shown, and what is pasted marked as such. Each is whole; none says anything that came from elsewhere.
OWN = re.compile(
    r"\x1b\[\?25h\r(?!\n)|\x1b\[(?:[0-9;]*m|[0-2]?K|[0-9]*[ABG]|\?25[lh]|\?2004[lh])|\r+\n|\r(?=\x1b\[|>|$)"
)
# What would command a terminal, turn what it shows, or begin a line.
HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
QUIET = 0.02  # seconds without a byte from the command
Typed = list[tuple[str, str]]  # (what the terminal has shown, what is typed then), each once and in order


def shows(*words: str | Path, status: int = 0, typed: Typed | None = None, **environment: str) -> str:
    """What the installed command sends to a terminal. It must end with this exit status."""
    code, text = ended(*words, typed=typed, **environment)
    assert code == status, text
    return text


def ended(*words: str | Path, typed: Typed | None = None, **environment: str) -> tuple[int, str]:
    """(exit status, what the terminal was sent, standard error too) of the installed command."""
    ours, theirs = pty.openpty()
    command = [str(Path(sys.executable).with_name("mlxtune")), *map(str, words)]
    whole = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", **environment}
    said: list[bytes] = []
    ended = threading.Event()
    listener = threading.Thread(target=_listen, args=(ours, said, ended, list(typed or ())))
    listener.start()
    try:
        if warm.fits(whole):
            code = warm.run(command, whole, theirs).returncode
        else:
            code = subprocess.run(
                command, stdin=theirs, stdout=theirs, stderr=theirs, env=whole, check=False
            ).returncode
    finally:
        ended.set()
        listener.join()
        os.close(ours)
        os.close(theirs)
    return code, b"".join(said).decode()


def _listen(ours: int, said: list[bytes], ended: threading.Event, typed: Typed) -> None:
    """Read what comes, until the command has ended and nothing is left; type what is to be typed.

    The terminal repeats what is typed at once, amid what the command is still writing: between the bytes of one
    character, if it falls so. As a person would, this waits until nothing more comes, QUIET seconds long.
    """
    due = None  # when to type at the latest, of a command that never falls silent
    while select.select([ours], [], [], QUIET)[0] or not ended.is_set():
        if select.select([ours], [], [], 0)[0]:
            said.append(os.read(ours, 65536))
            shown = b"".join(said[-20:]).decode(errors="replace")
            if due is None and typed and typed[0][0] in shown:
                due = time.monotonic() + 1
            if due is None or time.monotonic() < due:
                continue
        if due is not None:
            os.write(ours, typed.pop(0)[1].encode())
            due = None


def obeyed(text: str) -> list[str]:
    """Each HARMFUL character of what a terminal was sent, with what stands around it, but for the sequences of OWN."""
    left = OWN.sub("\n", text)
    return [left[max(0, at.start() - 30) : at.end() + 30] for at in HARMFUL.finditer(left)]


def lines(text: str) -> list[str]:
    """The lines that a terminal shows, those that are drawn again included, without colours."""
    return [line.strip() for line in OWN.sub(lambda at: "" if at[0].endswith("m") else "\n", text).split("\n")]
