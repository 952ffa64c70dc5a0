"""What happens in a run: told to listeners, and most of it kept as JSON lines in RUN/events.jsonl.

An event is a dictionary with its `kind`:

    begin        also of a resumed run: `step` is where it goes on, `computed` the way in words; `steps`, `model`;
                 `seconds` that the preparation took; what the run is made of, as `provenance.of_job` says it; `data`:
                 counts of its rows (`data_facts`)
    train        one optimizer step, with the numbers of `StepFunction`: among them `tokens` of its rows, and
                 `computed_tokens`, the positions that went through the model: fewer where rows share, more by padding;
                 of preferences also `margin`, `accuracy`, `reward_chosen`, `reward_rejected`, `drift`, and kto's
                 `baseline` (`preference/tally` defines them), its `loss` is that of a pair or rated answer, and of kto
                 `baseline_tokens` are the positions that the baseline took, without gradients, beside those
    eval         `loss` and `tokens` of the validation rows after `step`, of preferences the same numbers as of a step;
                 `samples`, and a suite's `checks`, without those that applied to no answer; `cut`: how many of its
                 answers were cut; `seconds` of it all
    checkpoint   `step`, the `path` of its folder in RUN, and the `seconds` that saving took
    note         `text`: something that a person must know; `nonfinite`: of a `step` that was left out
    end          `state`: finished, interrupted or failed; after `step`; `nonfinite`: a loss or gradient of the step
                 after it was no number

and three that are only shown, and not written:

    reading      `rows` of the data file `source` are tokenized so far
    doing        `what` goes on now, before the first step, and may last
    start        the first step follows: of so many `steps`, with an evaluation after each `eval_every` (0: at the end)

Losses keep full precision; `peak_bytes` of a step is the most that MLX has held since the model was read, the proof of
the fast ways included. The file is only ever appended to, one whole line at a time. Steps that a crash took back and
that were done again are in it twice; `read` leaves out the first.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlxtune_convert.files import finite, flush_open

from mlxtune.train.run_folder import EVENTS_FILE

Event = dict[str, Any]
Listener = Callable[[Event], None]

SHOWN_ONLY = ("reading", "doing", "start")


def nobody(event: Event) -> None:
    """A listener that does nothing."""


class Events:
    """Writes events to `folder`/events.jsonl and passes them on to the listeners. Several threads may do so.

    folder None: nothing is written, and nobody is told: what a process does that is not the first of its run.
    """

    def __init__(self, folder: Path | None, *listeners: Listener) -> None:
        self._listeners = listeners if folder is not None else ()
        self._lock = threading.RLock()  # a listener may have something to say itself
        self._ended = False
        self._file = None if folder is None else _opened(folder / EVENTS_FILE)
        if self._file and folder and _cut_off(folder / EVENTS_FILE):
            self._file.write("\n")

    def listen(self, *listeners: Listener) -> None:
        """Pass events on to these as well."""
        self._listeners = (*self._listeners, *listeners)

    def emit(self, kind: str, **fields: Any) -> None:
        """Write an event, and pass it on. fields: its values; a number that is not finite becomes null."""
        event: Event = {"kind": kind, **finite(fields)}
        with self._lock:
            if kind not in SHOWN_ONLY:
                self._write(event)
            for listener in self._listeners:
                listener(event)

    def _write(self, event: Event) -> None:
        if self._file is None or self._ended:  # `end` tells what became of the run, and is the last one
            return
        self._file.write(json.dumps(event, ensure_ascii=False) + "\n")
        self._file.flush()
        if event["kind"] in ("checkpoint", "end"):
            flush_open(self._file.fileno())
        self._ended = event["kind"] == "end"

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


@dataclass(frozen=True)
class History:
    """What a run's events.jsonl tells, as far as it can be read."""

    events: list[Event]  # those that still count, as `read` gives them
    damaged: list[int]  # numbers of the lines, from 1, that are no events
    taken_back: list[tuple[int, int]]  # (step where a run went on, the last one that it had taken before), of each time


def read(folder: Path) -> list[Event]:
    """Every event of a run that still counts: not a line that a crash cut off, nor steps that were done again.

    Raises ValueError for a file that is none of ours: no text, or an event with another kind of value than we write.
    """
    text = (folder / EVENTS_FILE).read_text(encoding="utf-8")
    found = []
    for line in text.split("\n"):  # not splitlines: an answer may hold other line separators
        event = _event(line)
        if event is not None:
            _check(event)
            found.append(event)
    return _counting(found)[0]


class Following:
    """The history of a run that may go on: of its file only what was added is read each time.

    Others may have changed the file: a line that is no event is left out, and named. A last line that is not whole is
    none of these: a crash cut it off, or it is being written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / EVENTS_FILE
        self._begin_anew((0, 0))

    def _begin_anew(self, which: tuple[int, int]) -> None:
        self._which = which  # device and inode of the file, which tell it from another in its place
        self._size = 0  # bytes that were read
        self._rest = b""  # the last line, so far as it is written
        self._lines = 0  # that are whole
        self._found: list[Event] = []
        self._damaged: list[int] = []  # as in History

    def history(self) -> History:
        """A file that became shorter, or another one, is read from its beginning. Raises OSError."""
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            which = (status.st_dev, status.st_ino)
            if which != self._which or status.st_size < self._size:
                self._begin_anew(which)
            file.seek(self._size)
            added = file.read()
        self._size += len(added)
        *lines, self._rest = (self._rest + added).split(b"\n")
        for line in lines:
            self._lines += 1
            event = _whole_event(line)
            if event is not None:
                self._found.append(event)
            elif line.strip():
                self._damaged.append(self._lines)
        last = _whole_event(self._rest)
        events, taken_back = _counting(self._found if last is None else [*self._found, last])
        return History(events, list(self._damaged), taken_back)


def _whole_event(line: bytes) -> Event | None:
    """The event that a line holds; None: it holds none that we write."""
    try:
        event = _event(line.decode("utf-8"))
        if event is not None:
            _check(event)
    except ValueError:
        return None
    return event


def _event(line: str) -> Event | None:
    """The event that a line holds; None: it holds none."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, lists in lists without end
        return None
    return event if isinstance(event, dict) and "kind" in event else None


def _counting(found: list[Event]) -> tuple[list[Event], list[tuple[int, int]]]:
    """(The events without those of steps that were done again, `History.taken_back`)."""
    out: list[Event] = []
    taken_back = []
    for event in found:
        if event["kind"] == "begin":
            lost = [old["step"] for old in out if old["kind"] == "train" and old["step"] > event["step"]]
            if lost:
                taken_back.append((event["step"], max(lost)))
            out = [old for old in out if old.get("step", 0) <= event["step"]]
        out.append(event)
    return out, taken_back


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
