"""Answers on the disk as they come, so that an evaluation that was killed goes on where it was, to the same bytes.

A folder holds

    plan.json       what decides the answers (the evaluation's identity), which prompts are answered together, and the
                    notes of each side so far
    answers.jsonl   an answer a line, a batch after the other: all of one side, then all of the other
    times.jsonl     how long each batch took, and what was computed: what differs when it is run again

The plan stands before the first answer. A batch that is not whole, because the process was killed in it, is taken out
of answers.jsonl and computed again whole: in 16 bits an answer depends on what is answered beside it.

Example: plan [[r3, r1], [r2]], and answers.jsonl ends within the line of r1. Both lines of the first batch go.

Who can do without an answer asks with `patience`: a batch that an engine refuses is then a batch without answers, which
plan.json names once a later one was answered. Until then it may be the engine that is gone, and not that batch: what
was refused last of all is asked again by the process that goes on. One that could never be asked is named
at once: it says nothing of the engine.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from mlxtune_convert.files import contents, explained, flush_open, json_text, read_json

from mlxtune.errors import UserError
from mlxtune.evaluate.engines.request import Answer, Engine, Request, Unaskable, kept_answer

PLAN_FILE, ANSWERS_FILE, TIMES_FILE = "plan.json", "answers.jsonl", "times.jsonl"
ANEW = "Choose another --out, and begin anew."


@dataclass(frozen=True)
class Files:
    """The names of a journal's files, and what they belong to."""

    # What decides the answers, and their plan.
    plan: str = PLAN_FILE
    # The answers.
    answers: str = ANSWERS_FILE
    # How long each batch took; "": that is not kept.
    times: str = TIMES_FILE
    # What is kept, for messages.
    what: str = "evaluation"
    # What to do about a folder that holds another one.
    instead: str = "Choose another --out."

    @property
    def new(self) -> str:
        """The plan that is being written."""
        return f"{self.plan}.new"


Told = Callable[[str, int, int], None]  # of a side: its name, how many of its prompts are answered, of how many


class Journal:
    """The answers of one evaluation. folder None: they are kept in memory alone."""

    def __init__(self, folder: Path | None, identity: dict[str, Any], files: Files = Files()) -> None:
        """identity: what decides the answers; JSON. Raises UserError for a folder that holds something else."""
        self.folder = folder
        self.identity = identity
        self.files = files
        self.plans: dict[str, list[list[int]]] = {}  # of each side
        self.notes: dict[str, list[str]] = {}  # of each side: what a person must know of how it answers
        self.refused: dict[str, dict[str, str]] = {}  # of each side: the number of a batch in its plan -> why
        self.found = 0  # how many answers an earlier process left
        self._unsaid: list[tuple[str, str, str]] = []  # (side, batch, why) of those refused since the last answer
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
        found = self.some_answers(side, requests, engine, told, patience=0)
        return [answer for answer in found if isinstance(answer, Answer)]

    def some_answers(
        self,
        side: str,
        requests: Sequence[Request],
        engine: Callable[[], Engine],
        told: Told = lambda *_: None,
        patience: int = 0,
    ) -> list[Answer | str]:
        """The same; in place of an answer that there is not, why. patience: how many batches in a row an engine may
        refuse; beyond that its UserError is raised.
        """
        got: list[Answer | str | None] = [None] * len(requests)
        if side in self.plans and sum(map(len, self.plans[side])) != len(requests):
            raise UserError(f"{self.folder} holds the plan of another number of prompts", "Choose another --out.")
        if side in self.plans:
            self._take(self.plans[side], side, requests, got)
        if None not in got:
            return [one for one in got if one is not None]
        answering = engine()
        planned = answering.plan(requests)
        self.plans.setdefault(side, planned)
        self._note(side, answering)
        self._write_plan()
        for number, places in enumerate(self.plans[side]):
            if got[places[0]] is not None:
                continue
            began, before = time.perf_counter(), answering.work()
            try:
                answers = answering.answers([requests[place] for place in places])
            except UserError as error:
                self._refuse(side, number, error, patience)
                for place in places:
                    got[place] = error.message
                continue
            took = {"seconds": round(time.perf_counter() - began, 3)}
            done_now = {name: count - before[name] for name, count in answering.work().items()}
            if self._note(side, answering) or self._unsaid:
                self._say_refused()
                self._write_plan()
            self._append(side, answers, {**took, **done_now})
            for place, answer in zip(places, answers, strict=True):
                got[place] = answer
            told(side, len(requests) - got.count(None), len(requests))
        return [one for one in got if one is not None]

    def _refuse(self, side: str, number: int, error: UserError, patience: int) -> None:
        """Remember that an engine refused a batch. Raises the error where too many came one after the other. One that
        could never be asked is no sign that the engine is gone.
        """
        if isinstance(error, Unaskable):
            self.refused.setdefault(side, {})[str(number)] = error.message
            self._write_plan()
            return
        self._unsaid.append((side, str(number), error.message))
        if len(self._unsaid) > patience:
            raise error

    def _say_refused(self) -> None:
        """Those that were refused before a batch that was answered have no answers, for this process and later ones."""
        for side, number, why in self._unsaid:
            self.refused.setdefault(side, {})[number] = why
        self._unsaid = []

    def _take(
        self, plan: list[list[int]], side: str, requests: Sequence[Request], got: list[Answer | str | None]
    ) -> None:
        """Put the recorded answers of whole batches where they belong. One that is not whole is forgotten.

        Raises UserError for an answer that the plan does not have there: a kill leaves no such thing.
        """
        taken = 0
        for batch_number, places in enumerate(plan):
            why = self.refused.get(side, {}).get(str(batch_number))
            if why is not None:
                for place in places:
                    got[place] = why
                continue
            expected = [(side, requests[place].id, requests[place].sample) for place in places]
            batch = self._recorded[: len(places)]
            found = [(whose, answer.id, answer.sample) for whose, answer in batch]
            for number, key in enumerate(found):
                if key != expected[number]:
                    line = self.found + taken + number + 1
                    file = f"{self.folder}/{self.files.answers}"
                    raise UserError(f"{file} line {line}: not the answer that {self.files.plan} has there", ANEW)
            if len(found) < len(expected):
                self._forget()
                break
            for place, (_, answer) in zip(places, batch, strict=True):
                got[place] = answer
            del self._recorded[: len(places)]
            taken += len(places)
        self.found += taken

    def _note(self, side: str, engine: Engine) -> bool:
        """Keep the notes that an engine has by now; whether there are new ones."""
        before = self.notes.get(side, [])
        self.notes[side] = list(dict.fromkeys([*before, *engine.notes]))
        return self.notes[side] != before

    def _forget(self) -> None:
        """Cut the answers that belong to no whole batch off the file."""
        if self.folder is None or not self._recorded:
            return
        file = self.folder / self.files.answers
        lines = file.read_bytes().split(b"\n")[:-1]
        kept = lines[: len(lines) - len(self._recorded)]
        self._recorded = []
        os.truncate(file, sum(len(line) + 1 for line in kept))

    def _open(self, folder: Path) -> None:
        """Take what an earlier process left."""
        is_new = not (folder / self.files.plan).exists()
        if is_new:
            _require_nothing(folder, self.files)
        self._lock = locked(folder / self.files.answers, self.files)
        try:
            if is_new:
                self._write_plan()
            else:
                self._read(folder)
        except BaseException:
            self.close()
            raise

    def _read(self, folder: Path) -> None:
        saved = read_json(folder / self.files.plan, f"the plan of {_one(self.files.what)}")
        if saved.get("identity") != json.loads(json_text(self.identity)):
            what = _differing(saved.get("identity"), self.identity)
            raise UserError(f"{folder} holds another {self.files.what}: {what} changed", self.files.instead)
        plans, notes, refused = (saved.get(name, {}) for name in ("plans", "notes", "refused"))
        if not (_are_plans(plans) and _are_notes(notes) and _are_refusals(refused)):
            what = f"not the plan of {_one(self.files.what)}"
            raise UserError(f"{folder / self.files.plan}: {what}", self.files.instead)
        self.plans, self.notes, self.refused = plans, notes, refused
        self._read_answers(folder)

    def _read_answers(self, folder: Path) -> None:
        file = folder / self.files.answers
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
        held: dict[str, Any] = {"identity": self.identity, "plans": self.plans, "notes": self.notes}
        if self.refused:
            held["refused"] = self.refused
        text = json_text(held) + "\n"
        new = self.folder / self.files.new
        with explained(new), new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            flush_open(file.fileno())
        new.replace(self.folder / self.files.plan)

    def _append(self, side: str, answers: Sequence[Answer], took: dict[str, float]) -> None:
        """Write a batch's answers, and what they took."""
        if self.folder is None:
            return
        lines = [json_text({"side": side, **asdict(answer)}) for answer in answers]
        times = {"side": side, "ids": [answer.id for answer in answers], **took}
        for name, text in ((self.files.answers, lines), (self.files.times, [json_text(times)])):
            if not name:
                continue
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


def _require_nothing(folder: Path, files: Files) -> None:
    """Raise UserError for a folder that holds more than what a process leaves that was killed before it had a plan."""
    for path in contents(folder):
        begun = path.name == files.answers and path.stat().st_size == 0
        if path.name != files.new and not begun:
            raise UserError(f"{folder} holds {path.name}, and no {files.what}", "Choose another --out.")


def locked(file: Path, files: Files) -> IO[bytes]:
    """A file, held by this process until it is closed. Raises UserError where another one holds it, and for a link."""
    if file.is_symlink():
        raise UserError(f"{file} is a link", f"The files of {_one(files.what)} are its own: choose another --out.")
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


def _one(what: str) -> str:
    """An evaluation, a making."""
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"


def _are_plans(saved: Any) -> bool:
    return isinstance(saved, dict) and all(_is_plan(plan) for plan in saved.values())


def _are_notes(saved: Any) -> bool:
    lists = list(saved.values()) if isinstance(saved, dict) else [None]
    return all(isinstance(some, list) and all(isinstance(note, str) for note in some) for some in lists)


def _are_refusals(saved: Any) -> bool:
    sides = list(saved.values()) if isinstance(saved, dict) else [None]
    return all(isinstance(side, dict) and all(isinstance(why, str) for why in side.values()) for side in sides)


def _is_plan(plan: Any) -> bool:
    if not isinstance(plan, list) or not all(isinstance(places, list) and places for places in plan):
        return False
    places = [place for batch in plan for place in batch]
    return all(type(place) is int for place in places) and sorted(places) == list(range(len(places)))


def _differing(saved: Any, now: dict[str, Any]) -> str:
    """The names of what is not the same."""
    old = saved if isinstance(saved, dict) else {}
    return ", ".join(name for name in {**old, **now} if old.get(name) != now.get(name)) or "its plan"
