"""A file of answers from chats, one a line, each with all that was said before it:

    {"prompt": [...], "completion": [{"role": "assistant", ...}], "label": true, "conversation": "5f1c9a02",
     "model": "model", "adapter": "run", "digest": "9c0e...", "whole": true}

"label" is true for thumbs up, false for down, null where nobody said. Prompt, completion and label are the columns of
KTO (Ethayarajh et al. 2024, arXiv:2402.01306), so the file is data as it stands; "whole" is false for an answer that
was stopped. A line is written at once, and replaced when the answer gets its thumb.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from mlxtune_convert.files import explained, flush_open, json_text, new_file

from mlxtune.data.rows.readers import Bad, raw_rows
from mlxtune.errors import UserError

EXPECTED = "a file that `mlxtune chat --log FILE` wrote"


@dataclass(frozen=True)
class Said:
    """One answer of a chat."""

    prompt: list[dict[str, Any]]  # messages before it, the system prompt first where there is one
    completion: list[dict[str, Any]]  # the answer as one message
    label: bool | None  # thumbs up or down; None: nobody said
    conversation: str  # the same for all answers of one conversation
    model: str  # as --model spelled it
    adapter: str | None  # as --adapter spelled it; None: the base answered
    digest: str | None  # of the adapter's tensors: a folder may hold another adapter today
    whole: bool  # it was not stopped

    @property
    def text(self) -> str:
        return str(self.completion[0].get("content") or "")

    def as_json(self) -> dict[str, Any]:
        """A line of the file."""
        line: dict[str, Any] = {"prompt": self.prompt, "completion": self.completion, "label": self.label}
        line |= {"conversation": self.conversation, "model": self.model, "adapter": self.adapter}
        return {**line, "digest": self.digest, "whole": self.whole}


@dataclass(frozen=True)
class Speaker:
    """Who answers in a chat."""

    model: str  # as --model spelled it
    adapter: str | None  # as --adapter spelled it; None: the base
    digest: str | None  # of the adapter's tensors


class ChatLog:
    """A file that a chat adds to; one process at a time does."""

    def __init__(self, path: Path, speaker: Speaker) -> None:
        """Raises UserError for a file that is no log, a link, or one that another chat adds to."""
        self.path = path
        self.speaker = speaker
        self.last: Said | None = None  # the answer that a thumb is for
        self._conversation = secrets.token_hex(4)
        self._start = 0  # where the last answer's line begins in the file
        self._file = _opened(path)
        try:
            _mend(self._file, path)
            read(path)
        except BaseException:
            self._file.close()
            raise

    def begin(self) -> None:
        """What follows is another conversation."""
        self._conversation = secrets.token_hex(4)

    def add(self, prompt: Sequence[dict[str, Any]], answer: dict[str, Any], whole: bool) -> None:
        """Keep an answer. whole: it was not stopped."""
        who = self.speaker
        self.last = Said(list(prompt), [answer], None, self._conversation, who.model, who.adapter, who.digest, whole)
        with explained(self.path):
            self._start = self._file.seek(0, os.SEEK_END)
        self._write(self.last)

    def rate(self, label: bool) -> bool:
        """Give the last answer a thumb, in place of one that it has; False where there is no answer yet."""
        if self.last is None:
            return False
        self.last = replace(self.last, label=label)
        self._write(self.last)
        return True

    def close(self) -> None:
        """Let others have the file; one that got no answer does not stay."""
        if self._file.closed:
            return
        if self._file.seek(0, os.SEEK_END) == 0:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _write(self, said: Said) -> None:
        """The last line of the file, at once."""
        with explained(self.path):
            self._file.seek(self._start)
            self._file.write((json_text(said.as_json()) + "\n").encode())
            self._file.truncate()
            self._file.flush()
            flush_open(self._file.fileno())


def read(path: Path) -> list[Said]:
    """The answers of a log, [] for an empty file. Raises UserError for what is none."""
    if not path.is_file():
        raise UserError(f"no file {path}", f"Name {EXPECTED}.")
    if path.stat().st_size == 0:
        return []
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: a log of chats ends in .jsonl", f"Name {EXPECTED}.")
    found = []
    for row in raw_rows(path):
        if isinstance(row, Bad):
            raise UserError(f"{path} {row.place}: {row.reason}", f"Name {EXPECTED}.")
        number, line = row
        try:
            found.append(_said(line))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} line {number}: not an answer of a chat", f"Name {EXPECTED}.") from error
    return found


def write(path: Path, answers: Sequence[Said]) -> None:
    """In place of what was there, whole or not at all. Raises UserError while a chat adds to the file."""
    with explained(path), path.open("rb") as now:
        _lock(now, path)
        with new_file(path, force=True) as file:
            for said in answers:
                file.write(json_text(said.as_json()) + "\n")


def _lock(file: IO[bytes], path: Path) -> None:
    """Until the file is closed. Raises UserError where another process holds it."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"a chat adds to {path}", "End it first, or name another file.") from error
    except OSError:  # a volume without locks
        pass


def _said(line: dict[str, Any]) -> Said:
    """Raises KeyError, TypeError or ValueError for what is none."""
    prompt, completion = line["prompt"], line["completion"]
    messages = [*prompt, *completion]
    if len(completion) != 1 or not all(isinstance(one["role"], str) for one in messages):
        raise ValueError
    if line["label"] not in (True, False, None) or not isinstance(line["conversation"], str):
        raise ValueError
    names = (line["model"], line["adapter"], line["digest"])
    return Said(prompt, completion, line["label"], line["conversation"], *names, line["whole"] is True)


def _opened(path: Path) -> IO[bytes]:
    """To read and write, made where it is missing. Raises UserError as `ChatLog` does."""
    if path.suffix != ".jsonl":
        raise UserError(f"--log {path}: the file's name must end in .jsonl", "As in --log chats.jsonl")
    if path.is_symlink():
        raise UserError(f"--log {path} is a link", "Name the file itself.")
    with explained(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)  # what was said is private
    file = os.fdopen(handle, "r+b")
    try:
        _lock(file, path)
    except UserError:
        file.close()
        raise
    return file


def _mend(file: IO[bytes], path: Path) -> None:
    """Take away a last line that a kill cut off. Raises UserError for a file whose other lines are no log: nothing is
    taken from a file of somebody else.
    """
    whole, _, torn = file.read().rpartition(b"\n")
    if not torn:
        return
    try:
        for line in whole.split(b"\n"):
            _said(json.loads(line))
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a log of chats", f"Name {EXPECTED}, or a new file.") from error
    with explained(path):
        file.truncate(len(whole) + 1)
