"""What is asked of an engine, and what it answers.

    Request("r12", messages, tools, sample=0)   ->   Answer("r12", 0, "Within 30 days.", "", "stop", 6)

Every engine gives each request one answer; which of them run together, it says beforehand (`plan`), so that an
evaluation that was killed goes on with the very batches it had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from mlxtune.errors import UserError

Messages = Sequence[dict[str, Any]]
Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt."""

    # Of the prompt in its suite.
    id: str
    # 0 .. k - 1 where a prompt is answered k times.
    sample: int
    # What is judged: without the thought, special tokens and the end token.
    text: str
    # What the model thought before; "" where it shows none.
    thought: str
    # "stop": the model ended it; "length": it was cut.
    finish: Finish
    # Generated, those of the thought and the end token included; 0: not known.
    tokens: int


def kept_answer(line: Mapping[str, Any]) -> Answer:
    """An answer as an evaluation keeps it, read back. Raises KeyError, TypeError or ValueError for what is none."""
    texts = [line[name] for name in ("id", "text", "thought")]
    counts = [line[name] for name in ("sample", "tokens")]
    if not all(isinstance(text, str) for text in texts) or not all(type(count) is int for count in counts):
        raise TypeError
    if min(counts) < 0 or line["finish"] not in get_args(Finish):
        raise ValueError
    return Answer(line["id"], line["sample"], line["text"], line["thought"], line["finish"], line["tokens"])


@dataclass(frozen=True)
class Request:
    """One prompt that is to be answered once."""

    # Of the prompt in its suite.
    id: str
    # The conversation so far; the answer follows.
    messages: Messages
    # In OpenAI's form; None for none.
    tools: list[dict[str, Any]] | None = None
    # Which answer to this prompt it is, from 0.
    sample: int = 0


class Unaskable(UserError):
    """A request that its engine could never be asked: its template refuses it. Of the engine that says nothing."""


class Engine(Protocol):
    """What gives answers."""

    @property
    def name(self) -> str:
        """What answers, for people: a folder, an address, a file."""

    @property
    def notes(self) -> list[str]:
        """What a person must know of how it answers; complete when all is answered."""

    def work(self) -> dict[str, int]:
        """What was computed so far, by name; {} where that is not known."""

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """Which requests, by their place, are answered together. Raises UserError for a request that cannot be."""

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """Those to one batch of the plan, in its order. Raises UserError where there is none.

        Earlier answers may have been put into the requests since (`evaluate.turns`): all that was planned by is that
        none is longer than the longest that the plan knew.
        """


class Wrapper:
    """What an engine around another engine hands on."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def name(self) -> str:
        return self.engine.name

    @property
    def notes(self) -> list[str]:
        return self.engine.notes

    def work(self) -> dict[str, int]:
        return self.engine.work()
