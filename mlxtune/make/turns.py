"""Conversations of several turns out of single ones: the engine plays the user, then answers.

    row                 user: How do I store bulbs?   assistant: Dry and dark.
    asked for turn 2    "Below is a conversation ... write what the user says next"  -> And for how long?
    asked for turn 2    user, assistant, user: And for how long?                     -> Until the frost is over.

Each answer is asked for behind the very conversation that it will stand in, by the chat template itself. All
conversations go on together, a turn at a time, so that batches are full. A conversation in which a turn is no good is
not kept: what follows would answer to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlxtune.evaluate.checks.overlap import rouge_l
from mlxtune.evaluate.checks.words import words_of
from mlxtune.evaluate.engines.request import Request
from mlxtune.evaluate.judging.judge import as_text
from mlxtune.make import parsing
from mlxtune.make.answer_filters import Made, wrong_with
from mlxtune.make.folder import UNASKED, Failed, Making, Rejected, Row, Spent, Yield
from mlxtune.make.given_rows import Conversation
from mlxtune.make.guard import Guard
from mlxtune.make.portions import portions

PORTION = 64  # conversations that go on together, at most: many enough to fill batches
SAME = 0.7  # ROUGE-L to what was said before, above which it is said again
FEW = 3  # words that may be said again
LEAST, MOST = 2, 150  # words of what a user says
# How an engine begins what it writes in another's name: User:, **User:**
SPEAKER = re.compile(r"\A[\s*_]*(?:user|human|customer|next message)[\s*_]*:[\s*_]*", re.IGNORECASE)
TOLD = (
    "Below is a conversation between a user and an assistant. Write what the user says next: a question or a wish that "
    "follows from the last answer and has not been said yet, in the user's own voice and language, in one to three "
    "sentences. Reply with the words of the user alone."
)


@dataclass
class Growing:
    """A conversation on its way."""

    # Of its row.
    id: str
    # So far.
    messages: list[dict[str, Any]]
    # Turns of the user that were added.
    added: int = 0
    # False: it goes no further, and is not kept.
    is_good: bool = True

    @property
    def turns(self) -> int:
        """How often the user spoke."""
        return sum(message["role"] == "user" for message in self.messages)

    def has(self, text: str) -> bool:
        """Whether nearly the same was said before, by whomever. A few words, such as "Yes.", may be said again."""
        said = [str(message["content"]) for message in self.messages if message["role"] != "system"]
        return len(words_of(text)) > FEW and float(rouge_l(text, said).max()) > SAME

    @property
    def waits(self) -> bool:
        """Whether the last thing that was said has no answer yet."""
        return self.messages[-1]["role"] == "user"


def make_turns(
    making: Making, conversations: Sequence[Conversation], turns: int, guard: Guard, count: int | None = None
) -> dict[str, Any]:
    """Let conversations grow until the user spoke `turns` times in each, and write the files of the making. Returns its
    document. count: conversations to keep at most; None: all.
    """
    making.guard = guard
    stopped, total = "", len(conversations) if count is None else min(count, len(conversations))
    for portion in portions(conversations, PORTION):
        if len(making.rows) >= total:
            break
        growing = []
        for conversation in portion:
            if _may_grow(making, conversation, turns, guard):
                growing.append(Growing(conversation.id, list(conversation.messages)))
        try:
            _grow(making, growing, turns, guard)
        except Spent as spent:
            stopped = str(spent)
        for one in growing:
            is_done = one.is_good and one.turns >= turns and not one.waits
            if is_done and len(making.rows) < total:
                making.keep(Row(one.messages, making.made([one.id], turns_added=one.added)))
        if stopped:
            break
    if len(making.rows) < total:
        stopped = stopped or making.spent
    return making.finish(Yield("conversations", total), stopped)


def first_requests(conversations: Sequence[Conversation], turns: int) -> list[Request]:
    """What is asked for first, of those that may grow."""
    found = []
    for one in conversations:
        if not one.missing(turns):
            continue
        if one.waits:
            found.append(Request(f"answer {one.users} of {one.id}", one.messages))
        else:
            found.append(turn_request(one.id, one.users + 1, one.messages))
    return found


def expected_requests(conversations: Sequence[Conversation], turns: int, count: int | None) -> int:
    """How many requests there are at most, where no turn is dropped."""
    requests = may_grow = 0
    for portion in portions(conversations, PORTION):
        if count is not None and may_grow >= count:
            break
        requests += sum(one.missing(turns) for one in portion)
        may_grow += sum(one.missing(turns) > 0 for one in portion)
    return requests


def turn_request(id: str, number: int, messages: Sequence[dict[str, Any]]) -> Request:
    """What asks for the words of the user in their turn of a number."""
    return Request(
        f"user {number} of {id}", [{"role": "user", "content": f"{TOLD}\n\nConversation:\n\n{as_text(messages)}"}]
    )


def _may_grow(making: Making, conversation: Conversation, turns: int, guard: Guard) -> bool:
    """Whether a conversation is begun with; one that is not is rejected."""
    why = guard.why_any(conversation.messages)
    if conversation.has_tools:
        reason, detail = "tools", ""
    elif not conversation.users:
        reason, detail = "no user", ""
    elif not conversation.missing(turns):
        reason, detail = "long enough", f"the user speaks {conversation.users} times"
    elif why is not None:
        reason, detail = "guarded", why
    else:
        return True
    making.reject(Rejected({"id": conversation.id, "messages": conversation.messages}, reason, detail))
    return False


def _grow(making: Making, growing: Sequence[Growing], turns: int, guard: Guard) -> None:
    """Turn after turn, all at once. Raises Spent where nothing may be asked any more."""
    _answer(making, [one for one in growing if one.waits])
    while shorter := [one for one in growing if one.is_good and one.turns < turns]:
        _ask(making, shorter, guard)
        _answer(making, [one for one in shorter if one.is_good])


def _ask(making: Making, growing: Sequence[Growing], guard: Guard) -> None:
    """Add the next words of the user to each."""
    requests = [turn_request(one.id, one.turns + 1, one.messages) for one in growing]
    for one, said in zip(growing, making.ask(requests), strict=True):
        if isinstance(said, Failed):
            _lose(making, one, said)
            continue
        text = parsing.unquoted(SPEAKER.sub("", parsing.unquoted(said.text)))
        reason, detail = wrong_with(Made(one.messages, replace(said, text=text), LEAST, MOST, is_of_user=True)), ""
        if not reason and one.has(text):
            reason = "said before"
        if not reason and (why := guard.why(text)) is not None:
            reason, detail = "guarded", why
        _add(making, one, "user", text, reason, detail)


def _answer(making: Making, growing: Sequence[Growing]) -> None:
    """Add the answer to each."""
    if not growing:
        return
    requests = []
    for one in growing:
        asked = [{"role": message["role"], "content": message["content"]} for message in one.messages]
        requests.append(Request(f"answer {one.turns} of {one.id}", asked))
    for one, said in zip(growing, making.ask(requests), strict=True):
        if isinstance(said, Failed):
            _lose(making, one, said)
            continue
        reason = wrong_with(Made(one.messages, said))
        if not reason and one.has(said.text):
            reason = "said before"
        _add(making, one, "assistant", said.text.strip(), reason, "")


def _lose(making: Making, one: Growing, failed: Failed) -> None:
    """A conversation in which a request has no answer goes no further."""
    one.is_good = False
    if failed.why != UNASKED:
        making.reject(Rejected({"id": one.id, "messages": one.messages}, "failed", failed.why))


def _add(making: Making, one: Growing, role: str, text: str, reason: str, detail: str) -> None:
    """What was said, at the end of a conversation; where it is no good, that conversation is rejected with it."""
    one.messages.append({"role": role, "content": text})
    one.added += role == "user"
    if reason:
        one.is_good = False
        where = f"{role}, turn {one.turns}"
        making.reject(
            Rejected({"id": one.id, "messages": one.messages}, reason, f"{where}: {detail}" if detail else where)
        )
