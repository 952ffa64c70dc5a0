"""Judges that do as they are told: by the two texts that they are shown, or by a reply that they always give."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from fake_server import FakeServer

from mlxtune.evaluate.engines.request import Messages
from mlxtune.evaluate.judging.judge import PAIR_LABELS, Probabilities

SECTION = re.compile(r"([^\n]+):\n([0-9a-f]{16})\n(.*?)\n\2(?:\n\n|\Z)", re.DOTALL)
Preference = Callable[[str, str, str], float]  # (first answer, second answer, request) -> for the first, 0 to 1


def sections(prompt: Messages) -> dict[str, str]:
    """The texts of a prompt by their titles: what stands between two lines of the same word."""
    (message,) = prompt
    return {title: text for title, _, text in SECTION.findall(message["content"])}


class Scripted:
    """Prefers as a function says; rates an answer by what the function says of it against nothing."""

    def __init__(self, preference: Preference) -> None:
        self.preference = preference
        self.name = "scripted"
        self.notes: list[str] = []
        self.prompts: list[Messages] = []

    def label_probabilities(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[Probabilities | None]:
        self.prompts += prompts
        return [self._reply(sections(prompt), labels) for prompt in prompts]

    def _reply(self, texts: dict[str, str], labels: Sequence[str]) -> Probabilities | None:
        if tuple(labels) == PAIR_LABELS:
            for_first = self.preference(texts["Answer A"], texts["Answer B"], texts["Request"])
            return [for_first, 1 - for_first, 0.0]
        worth = self.preference(texts["Answer"], "", texts["Request"])
        return [1 - worth, 0.0, 0.0, 0.0, worth]


class Silent(Scripted):
    """Its replies cannot be read."""

    def _reply(self, texts: dict[str, str], labels: Sequence[str]) -> Probabilities | None:
        return None


def always_first(first: str, second: str, request: str) -> float:
    return 0.9


def by_length(first: str, second: str, request: str) -> float:
    return 0.5 if len(first) == len(second) else float(len(first) > len(second))


def knowing(good: Callable[[str, str], bool]) -> Preference:
    """Prefers the answers that are good. good: of (answer, request)."""

    def preference(first: str, second: str, request: str) -> float:
        return 0.5 + 0.4 * (good(first, request) - good(second, request))

    return preference


class JudgingServer(FakeServer):
    """A server whose replies are made by a function of the prompt's texts; with their chances, if told so."""

    def __init__(self, reply: Callable[[dict[str, str]], str], chances: dict[str, float] | None = None) -> None:
        super().__init__()
        self.reply = reply
        self.chances = chances  # of tokens at the label's place, as logarithms

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        text = self.reply(sections(asked["messages"]))
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        if self.chances is not None:
            told = [{"token": token, "logprob": chance} for token, chance in self.chances.items()]
            tokens = re.findall(r"\[\[|\]\]|[^\s\[\]]+", text)
            places = [{"token": token, "top_logprobs": told} for token in tokens]
            choice["logprobs"] = {"content": places}
        return {"model": asked["model"], "choices": [choice], "usage": {"completion_tokens": 3}}
