"""What happened in a run, kept as JSON lines in RUN/events.jsonl and shown by whoever listens.

Kinds: `begin` (also of a resumed run: `step` is where it goes on, `computed` the way in words), `train` (one optimizer
step), `eval`, `checkpoint`, `note` (something a person must know), `end`. Losses keep full precision; `peak_bytes` of a
step is the most that MLX has held since the model was read, the proof of the fast ways included. The file is only ever
appended to, one whole line at a time; steps that a crash took back and that were done again are in it twice, and `read`
leaves out the first.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from mlxtune_convert.files import finite, flush_open

Event = dict[str, Any]
Listener = Callable[[Event], None]

FILE = "events.jsonl"


class Events:
    """Writes events to `folder`/events.jsonl and passes them on to the listeners. folder None: to nobody. Several
    threads may do so.
    """

    def __init__(self, folder: Path | None, *listeners: Listener) -> None:
        self._listeners = listeners if folder is not None else ()
        self._lock = threading.RLock()  # a listener may have something to say itself
        self._ended = False
        self._file = None if folder is None else _opened(folder / FILE)
        if self._file and folder and _cut_off(folder / FILE):
            self._file.write("\n")

    def listen(self, *listeners: Listener) -> None:
        """Pass events on to these as well."""
        self._listeners = (*self._listeners, *listeners)

    def emit(self, kind: str, **fields: Any) -> None:
        event = {"kind": kind, **finite(fields)}
        with self._lock:
            if self._file and not self._ended:  # `end` tells what became of the run, and is the last one
                self._file.write(json.dumps(event, ensure_ascii=False) + "\n")
                self._file.flush()
                if kind in ("checkpoint", "end"):
                    flush_open(self._file.fileno())
                self._ended = kind == "end"
            for listener in self._listeners:
                listener(event)

    def close(self) -> None:
        with self._lock:
            if self._file:
                self._file.close()
                self._file = None


def _opened(file: Path) -> IO[str]:
    """A file to append to, and not what a link leads to. Raises OSError for a link."""
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    return os.fdopen(handle, "a", encoding="utf-8")


def _cut_off(file: Path) -> bool:
    """Whether the last line is not whole: a crash or a full disk cut it."""
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(max(0, size - 1))
        return opened.read(1) not in (b"", b"\n")


def read(folder: Path) -> list[Event]:
    """Every event of a run that still counts: not a line that a crash cut off, nor steps that were done again.

    Raises ValueError for a file that is none of ours: no text, or an event with another kind of value than we write.
    """
    out: list[Event] = []
    for line in (folder / FILE).read_text(encoding="utf-8").split("\n"):  # an answer may hold other line separators
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, lists in lists without end
            continue
        if not isinstance(event, dict) or "kind" not in event:
            continue
        _check(event)
        if event["kind"] == "begin":
            out = [old for old in out if old.get("step", 0) <= event["step"]]
        out.append(event)
    return out


def _check(event: Event) -> None:
    """Raise ValueError for an event whose numbers are none."""
    counted = event["kind"] in ("begin", "train", "eval")
    if (counted or "step" in event) and not _is_count(event.get("step")):
        raise ValueError(f"an event without its step: {event['kind']}")
    if "steps" in event and not _is_count(event["steps"]):
        raise ValueError(f"steps that are no number: {event['steps']}")
    if event["kind"] in ("train", "eval") and not _is_loss(event.get("loss", "")):
        raise ValueError(f"a loss that is no number: {event.get('loss')}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_loss(value: Any) -> bool:
    """None: it was not finite."""
    if value is None:
        return True
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < sys.float_info.max  # also of a whole number that no float holds
