"""Conversations of several turns, each answered behind the model's own answers before it (`--turns replay`).

A row that says "Write a poem." and then "Shorter." becomes two prompts, kept, checked and compared like any others:

    r      user: Write a poem.
    r#2    user: Write a poem.   assistant: (what it answered to r)   user: Shorter.

What stands in r#2 for an answer that is not there yet is OWN_ANSWER: each side has its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from mlxtune.errors import UserError
from mlxtune.evaluate.checks.check import Check, SuiteRow
from mlxtune.evaluate.checks.suite import Suite
from mlxtune.evaluate.engines.replay import Replay
from mlxtune.evaluate.engines.request import Answer, Engine, Messages, Request, Wrapper

OWN_ANSWER = "(its own answer)"


def replayed(suite: Suite) -> Suite:
    """Every turn a prompt of its own. Turns of one row are one group: they are not independent.

    A row's own checks are asked of the answer that they were written for: the first one where the row lists `turns`,
    the last one of a recorded conversation. Those of the whole suite are asked of every answer. Raises UserError where
    no row has a second turn.
    """
    rows: list[SuiteRow] = []
    skipped = 0
    for row in suite.rows:
        parts = _turns(row, len(suite.common))
        skipped += len(parts) == 1 and _answers_before(row) > 0
        rows.extend(parts)
    if len(rows) == len(suite.rows):
        raise UserError(
            "--turns replay has no effect: no prompt of this suite has a second turn of plain text",
            "A second turn stands in `turns`, or in messages behind an earlier answer.",
        )
    _require_own_ids(rows)
    notes = [*suite.notes, f"{len(suite.rows)} conversations are {len(rows)} prompts: each turn is answered"]
    if skipped:
        notes.append(f"{skipped} conversations with tool calls are asked for their last answer alone")
    return replace(suite, rows=rows, notes=notes)


def _turns(row: SuiteRow, common: int) -> list[SuiteRow]:
    """A row's turns as prompts. common: how many of its checks are the whole suite's, and stand first."""
    if row.turns:
        asked = [row.messages, *([{"role": "user", "content": text}] for text in row.turns)]
        references = [row.reference, *row.turn_references]
        own_checks_of = 0
    else:
        asked, references = _recorded(row)
        own_checks_of = len(asked) - 1
    if len(asked) == 1:
        return [row]
    parts: list[SuiteRow] = []
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(asked):
        if number:
            messages = [*messages, {"role": "assistant", "content": OWN_ANSWER}]
        messages = [*messages, *turn]
        checks: list[Check] = row.checks if number == own_checks_of else row.checks[:common]
        parts.append(
            replace(
                row,
                id=row.id if number == 0 else f"{row.id}#{number + 1}",
                messages=messages,
                reference=references[number] if number < len(references) else None,
                checks=checks,
                calls=row.calls if number == own_checks_of else None,
                group=row.group if row.group is not None else row.id,
                follows=parts[-1].id if parts else None,
                turns=[],
                turn_references=[],
            )
        )
    return parts


def _answers_before(row: SuiteRow) -> int:
    return sum(message["role"] == "assistant" for message in row.messages)


def _recorded(row: SuiteRow) -> tuple[list[list[dict[str, Any]]], list[str | None]]:
    """(What is said before each answer, the recorded answers) of a conversation; in one part where tools were called,
    whose results nobody could give again.
    """
    if any(message["role"] == "tool" or message.get("tool_calls") for message in row.messages):
        return [row.messages], [row.reference]
    asked: list[list[dict[str, Any]]] = [[]]
    answers: list[str | None] = []
    for message in row.messages:
        if message["role"] != "assistant":
            asked[-1].append(message)
        elif any(one["role"] == "user" for one in asked[-1]):
            answers.append(str(message.get("content") or ""))
            asked.append([])
        else:  # an assistant that speaks first: nobody asked it
            asked[-1].append(message)
    return asked, [*answers, row.reference]


def _require_own_ids(rows: Sequence[SuiteRow]) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise UserError(f"--turns replay: two prompts would be called {row.id}", "Give the rows other ids.")
        seen.add(row.id)


def in_turn(engine: Engine, rows: Sequence[SuiteRow], most_tokens: int) -> Engine:
    """An engine that answers the prompts of `replayed` one turn after the other. most_tokens: of an answer.

    Recorded answers need none: the answer to each turn is among them.
    """
    if not any(row.follows for row in rows) or isinstance(engine, Replay):
        return engine
    return InTurn(engine, rows, most_tokens)


class InTurn(Wrapper):
    """An engine whose later prompts hold its own answers to the earlier ones."""

    def __init__(self, engine: Engine, rows: Sequence[SuiteRow], most_tokens: int) -> None:
        super().__init__(engine)
        self._next = {row.follows: row.id for row in rows if row.follows is not None}
        self._follows = {row.id: row.follows for row in rows if row.follows is not None}
        self._most = most_tokens

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """Conversations together as the engine would put their last, longest prompts together, in which every earlier
        answer is as long as it may be. A batch holds all turns of its conversations, one turn after the other.
        """
        at = {(request.id, request.sample): place for place, request in enumerate(requests)}
        firsts = [place for place, request in enumerate(requests) if request.id not in self._follows]
        longest = []
        for place in firsts:
            last, sample = requests[place].id, requests[place].sample
            while last in self._next:
                last = self._next[last]
            request = requests[at[last, sample]]
            filler = "so " * self._most
            longest.append(_with_own(request, [filler] * _own_answers(request.messages)))
        batches: list[list[int]] = []
        for together in self.engine.plan(longest):
            turn = [firsts[place] for place in together]
            batch: list[int] = []
            while turn:
                batch += turn
                later = [(self._next.get(requests[place].id), requests[place].sample) for place in turn]
                turn = [at[id, sample] for id, sample in later if id is not None]
            batches.append(batch)
        return batches

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        found: dict[tuple[str, int], Answer] = {}
        waiting = list(requests)
        while waiting:
            ready = [one for one in waiting if self._is_ready(one, found)]
            filled = [_with_own(one, self._said_before(one, found)) for one in ready]
            for one, answer in zip(ready, self.engine.answers(filled), strict=True):
                found[one.id, one.sample] = answer
            waiting = [one for one in waiting if (one.id, one.sample) not in found]
        return [found[one.id, one.sample] for one in requests]

    def _is_ready(self, request: Request, found: Mapping[tuple[str, int], Answer]) -> bool:
        before = self._follows.get(request.id)
        return before is None or (before, request.sample) in found

    def _said_before(self, request: Request, found: Mapping[tuple[str, int], Answer]) -> list[str]:
        """Its own answers to the earlier turns, the first one first."""
        said: list[str] = []
        id = request.id
        while id in self._follows:
            id = self._follows[id]
            said.insert(0, found[id, request.sample].text)
        return said


def _with_own(request: Request, said: Sequence[str]) -> Request:
    """A request with these texts in place of OWN_ANSWER."""
    texts = iter(said)
    messages = []
    for message in request.messages:
        is_own = message["role"] == "assistant" and message["content"] == OWN_ANSWER
        messages.append({**message, "content": next(texts)} if is_own else message)
    return replace(request, messages=messages)


def _own_answers(messages: Messages) -> int:
    return sum(message["role"] == "assistant" and message["content"] == OWN_ANSWER for message in messages)


class Turn(Protocol):
    """A prompt that may follow another one: of a suite, or as an evaluation keeps it."""

    @property
    def id(self) -> str: ...

    @property
    def messages(self) -> list[dict[str, Any]]: ...

    @property
    def follows(self) -> str | None: ...


class Conversations:
    """Whole conversations, for whoever compares the answers of two sides: earlier ones differ too."""

    def __init__(self, prompts: Iterable[Turn]) -> None:
        self._of = {prompt.id: prompt for prompt in prompts}

    def is_whole(self, id: str, texts: Mapping[str, str]) -> bool:
        """Whether this prompt and all that it follows are known and answered."""
        while id in self._of and id in texts:
            before = self._of[id].follows
            if before is None:
                return True
            id = before
        return False

    def asked(self, id: str) -> list[dict[str, Any]]:
        """What was said before a side's first answer."""
        prompt = self._of[id]
        while prompt.follows is not None:
            prompt = self._of[prompt.follows]
        return prompt.messages

    def said(self, id: str, texts: Mapping[str, str]) -> str:
        """All that one side said, and the user's turns between. texts: its answer to each prompt."""
        prompt = self._of[id]
        if prompt.follows is None:
            return texts[id]
        before = self.said(prompt.follows, texts)
        return f"{before}\n\n[user]\n{prompt.messages[-1]['content']}\n\n[assistant]\n{texts[id]}"
