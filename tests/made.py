"""Engines for tests of makers, and what a making left in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fake_server import FakeServer

from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.make.engine import Opened
from mlxtune.make.folder import Making

CUT = "\0cut"  # at the end of a scripted answer: the engine was stopped there


class Scripted:
    """An engine that answers what it is told to, a few requests at a time."""

    def __init__(self, answers: Callable[[Request], str], at_once: int = 4) -> None:
        """answers: the text of each, CUT at its end where it is cut; raises UserError for one that is refused."""
        self.name = "scripted"
        self.notes: list[str] = []
        self.asked: list[Request] = []  # in the order in which they were
        self._answers, self._at_once = answers, at_once

    def work(self) -> dict[str, int]:
        return {}

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        places = list(range(len(requests)))
        return [places[first : first + self._at_once] for first in range(0, len(places), self._at_once)]

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        self.asked += requests
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Answer:
        text = self._answers(request)
        finish = "length" if text.endswith(CUT) else "stop"
        return Answer(request.id, request.sample, text.removesuffix(CUT), "", finish, len(text.split()))  # type: ignore[arg-type]


def opened(engine: Scripted, name: str = "scripted", chats: bool = True, licence: str = "") -> Opened:
    """A scripted engine as makers are given one."""
    return Opened(name, "server", name, {"scripted": name}, licence, chats, lambda: engine)


def making(out: Path, engine: Scripted, how: str = "testing", **settings: Any) -> Making:
    """A making with a scripted engine."""
    return Making(out, {"how": how, "seed": 0}, opened(engine), **settings)


class Talking(FakeServer):
    """A server that answers each prompt by a function of it, and may end who asks it."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__()
        self.ends: dict[int, Callable[[], None]] = {}  # how many requests came -> what is done then
        self._says = answer

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        if end := self.ends.pop(len(self.asked), None):
            end()
        message = {"role": "assistant", "content": self._says(asked["messages"][-1]["content"])}
        return {
            "model": asked["model"],
            "choices": [{"message": message, "finish_reason": "stop"}],
            "usage": {"completion_tokens": 7},
        }


def lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a file that a making wrote."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def reasons(out: Path) -> dict[str, list[dict[str, Any]]]:
    """What a making rejected, by the reason's code."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines(out / "rejected.jsonl"):
        found.setdefault(line["reason"], []).append(line)
    return found
