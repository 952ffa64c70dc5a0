"""Answers on the disk as they come, so that an evaluation that was killed goes on where it was, to the same bytes.

A folder holds

    plan.json       what decides the answers (the evaluation's identity), which prompts are answered together, and the
                    notes of each side so far
    answers.jsonl   an answer a line, a batch after the other: all of one side, then all of the other
    times.jsonl     how long each batch took, and what was computed: what differs when it is run again

The plan stands before the first answer. A batch that is not whole, because the process was killed in it, is taken out
of answers.jsonl and computed again whole: in 16 bits an answer depends on what is answered beside it.

Example: plan [[r3, r1], [r2]], and answers.jsonl ends within the line of r1. Both lines of the first batch go.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from mlxtune_convert.files import contents, explained, flush_open, json_text, read_json

from mlxtune.errors import UserError
from mlxtune.evaluate.engines.request import Answer, Engine, Request, kept_answer

PLAN_FILE, ANSWERS_FILE, TIMES_FILE = "plan.json", "answers.jsonl", "times.jsonl"
NEW_NAME = "plan.json.new"
ANEW = "Choose another --out, and begin anew."

Told = Callable[[str, int, int], None]  # of a side: its name, how many of its prompts are answered, of how many


class Journal:
    """The answers of one evaluation. folder None: they are kept in memory alone."""

    def __init__(self, folder: Path | None, identity: dict[str, Any]) -> None:
        """identity: what decides the answers; JSON. Raises UserError for a folder that holds something else."""
        self.folder = folder
        self.identity = identity
        self.plans: dict[str, list[list[int]]] = {}  # of each side
        self.notes: dict[str, list[str]] = {}  # of each side: what a person must know of how it answers
        self.found = 0  # how many answers an earlier process left
        self._recorded: list[tuple[str, Answer]] = []  # those, in the file's order
        self._lock: IO[bytes] | None = None  # the open file of answers: one process at a time adds to it
        if folder is not None:
            _make(folder)
            self._open(folder)

    def close(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            self._lock.close()

    def answers(
        self, side: str, requests: Sequence[Request], engine: Callable[[], Engine], told: Told = lambda *_: None
    ) -> list[Answer]:
        """Every request answered, in the requests' order. Sides must come in the same order each time.

        engine: called where something is left to answer; told: called as batches are done.
        """
        got: list[Answer | None] = [None] * len(requests)
        if side in self.plans and sum(map(len, self.plans[side])) != len(requests):
            raise UserError(f"{self.folder} holds the plan of another number of prompts", "Choose another --out.")
        if side in self.plans and self._take(self.plans[side], side, requests, got) == len(requests):
            return [answer for answer in got if answer is not None]
        answering = engine()
        planned = answering.plan(requests)
        self.plans.setdefault(side, planned)
        self._note(side, answering)
        self._write_plan()
        done = len(requests) - got.count(None)
        for places in self.plans[side]:
            if got[places[0]] is not None:
                continue
            began, before = time.perf_counter(), answering.work()
            answers = answering.answers([requests[place] for place in places])
            took = {"seconds": round(time.perf_counter() - began, 3)}
            done_now = {name: count - before[name] for name, count in answering.work().items()}
            if self._note(side, answering):
                self._write_plan()
            self._append(side, answers, {**took, **done_now})
            for place, answer in zip(places, answers, strict=True):
                got[place] = answer
            done += len(places)
            told(side, done, len(requests))
        return [answer for answer in got if answer is not None]

    def _take(self, plan: list[list[int]], side: str, requests: Sequence[Request], got: list[Answer | None]) -> int:
        """Put the recorded answers of whole batches where they belong; how many. One that is not whole is forgotten.

        Raises UserError for an answer that the plan does not have there: a kill leaves no such thing.
        """
        taken = 0
        for places in plan:
            expected = [(side, requests[place].id, requests[place].sample) for place in places]
            batch = self._recorded[: len(places)]
            found = [(whose, answer.id, answer.sample) for whose, answer in batch]
            for number, key in enumerate(found):
                if key != expected[number]:
                    line = self.found + taken + number + 1
                    raise UserError(
                        f"{self.folder}/{ANSWERS_FILE} line {line}: not the answer that {PLAN_FILE} has there", ANEW
                    )
            if len(found) < len(expected):
                self._forget()
                break
            for place, (_, answer) in zip(places, batch, strict=True):
                got[place] = answer
            del self._recorded[: len(places)]
            taken += len(places)
        self.found += taken
        return taken

    def _note(self, side: str, engine: Engine) -> bool:
        """Keep the notes that an engine has by now; whether there are new ones."""
        before = self.notes.get(side, [])
        self.notes[side] = list(dict.fromkeys([*before, *engine.notes]))
        return self.notes[side] != before

    def _forget(self) -> None:
        """Cut the answers that belong to no whole batch off the file."""
        if self.folder is None or not self._recorded:
            return
        file = self.folder / ANSWERS_FILE
        lines = file.read_bytes().split(b"\n")[:-1]
        kept = lines[: len(lines) - len(self._recorded)]
        self._recorded = []
        os.truncate(file, sum(len(line) + 1 for line in kept))

    def _open(self, folder: Path) -> None:
        """Take what an earlier process left."""
        is_new = not (folder / PLAN_FILE).exists()
        if is_new:
            _require_nothing(folder)
        self._lock = _locked(folder / ANSWERS_FILE)
        try:
            if is_new:
                self._write_plan()
            else:
                self._read(folder)
        except BaseException:
            self.close()
            raise

    def _read(self, folder: Path) -> None:
        saved = read_json(folder / PLAN_FILE, "the plan of an evaluation")
        if saved.get("identity") != json.loads(json_text(self.identity)):
            what = _differing(saved.get("identity"), self.identity)
            raise UserError(f"{folder} holds another evaluation: {what} changed", "Choose another --out.")
        self.plans = _plans(folder, saved.get("plans"))
        self.notes = _notes(folder, saved.get("notes"))
        self._read_answers(folder)

    def _read_answers(self, folder: Path) -> None:
        file = folder / ANSWERS_FILE
        data = file.read_bytes()
        whole, _, torn = data.rpartition(b"\n")
        if torn:
            os.truncate(file, len(data) - len(torn))
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                row = json.loads(line)
                self._recorded.append((row["side"], kept_answer(row)))
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                raise UserError(f"{file} line {number}: not an answer", ANEW) from error

    def _write_plan(self) -> None:
        """Whole or not at all."""
        if self.folder is None:
            return
        text = json_text({"identity": self.identity, "plans": self.plans, "notes": self.notes}) + "\n"
        new = self.folder / NEW_NAME
        with explained(new), new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            flush_open(file.fileno())
        new.replace(self.folder / PLAN_FILE)

    def _append(self, side: str, answers: Sequence[Answer], took: dict[str, float]) -> None:
        """Write a batch's answers, and what they took."""
        if self.folder is None:
            return
        lines = [json_text({"side": side, **asdict(answer)}) for answer in answers]
        times = {"side": side, "ids": [answer.id for answer in answers], **took}
        for name, text in ((ANSWERS_FILE, lines), (TIMES_FILE, [json_text(times)])):
            with explained(self.folder / name), (self.folder / name).open("a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in text))
                file.flush()
                flush_open(file.fileno())


def _make(folder: Path) -> None:
    """Make a folder where there is none. Raises UserError where something else has its name, or that of one above."""
    with explained(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            inside = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
            raise UserError(f"{inside} is no folder", "Choose another --out.") from error


def _require_nothing(folder: Path) -> None:
    """Raise UserError for a folder that holds more than what a process leaves that was killed before it had a plan."""
    for path in contents(folder):
        begun = path.name == ANSWERS_FILE and path.stat().st_size == 0
        if path.name != NEW_NAME and not begun:
            raise UserError(f"{folder} holds {path.name}, and no evaluation", "Choose another --out.")


def _locked(file: Path) -> IO[bytes]:
    """A file, held by this process until it is closed. Raises UserError where another one holds it, and for a link."""
    if file.is_symlink():
        raise UserError(f"{file} is a link", "An evaluation's files are its own: choose another --out.")
    with explained(file):
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    opened = os.fdopen(handle, "r+b")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        opened.close()
        raise UserError(
            f"another process is answering into {file.parent}", "Wait for it, or choose another --out."
        ) from error
    except OSError:  # a volume without locks
        pass
    return opened


def _plans(folder: Path, saved: Any) -> dict[str, list[list[int]]]:
    """Raises UserError for what is no plan."""
    if isinstance(saved, dict) and all(_is_plan(plan) for plan in saved.values()):
        return saved
    raise UserError(f"{folder / PLAN_FILE}: not the plan of an evaluation", "Choose another --out.")


def _notes(folder: Path, saved: Any) -> dict[str, list[str]]:
    """Raises UserError for what are no notes."""
    lists = list(saved.values()) if isinstance(saved, dict) else [None]
    if all(isinstance(some, list) and all(isinstance(note, str) for note in some) for some in lists):
        return dict(saved)
    raise UserError(f"{folder / PLAN_FILE}: not the plan of an evaluation", "Choose another --out.")


def _is_plan(plan: Any) -> bool:
    if not isinstance(plan, list) or not all(isinstance(places, list) and places for places in plan):
        return False
    places = [place for batch in plan for place in batch]
    return all(type(place) is int for place in places) and sorted(places) == list(range(len(places)))


def _differing(saved: Any, now: dict[str, Any]) -> str:
    """The names of what is not the same."""
    old = saved if isinstance(saved, dict) else {}
    return ", ".join(name for name in {**old, **now} if old.get(name) != now.get(name)) or "its plan"
