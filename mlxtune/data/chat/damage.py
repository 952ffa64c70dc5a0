"""What of a conversation its template does not print.

Damage is read off marked renderings: a text whose mark is not printed is dropped. Inside a content that holds a thought
between tags, a part can be dropped as well; there the printed text is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlxtune.data.chat.conversation import Conversation
from mlxtune.data.chat.marks import CALLS, CONTENT, THINKING, thinking_parts
from mlxtune.data.chat.pieces import Piece
from mlxtune.data.chat.turn_places import Tail, TurnPlaces
from mlxtune.data.rows.messages import THINKING_KEYS
from mlxtune.data.template.probes import MARKS


@dataclass(frozen=True)
class Damage:
    """Something of a message that the template does not print as it is."""

    kind: str  # system, content, calls, thinking or tools
    index: int  # of the message, from 0
    text: str  # for people


NO_TOOLS = Damage("tools", 0, "the template does not print the tools")


def of_pieces(conversation: Conversation, text: str, pieces: list[Piece]) -> Iterator[Damage]:
    """What of a whole conversation is dropped. text: as it is printed; pieces: of its marked rendering."""
    printed: dict[int, set[int]] = {}  # index of a message -> kinds of its marks
    for piece in pieces:
        printed.setdefault(piece.index, set()).update(piece.kinds)
    if conversation.tools and text == conversation.template.attempt(conversation.messages):
        yield NO_TOOLS
    for index, message in enumerate(conversation.messages):
        kinds = printed.get(index, set())
        content = message.get("content") or ""
        # A content with a closing tag may be all thought.
        content_kinds = {CONTENT, THINKING} if "</think>" in content else {CONTENT}
        if content and not kinds & content_kinds:
            yield _dropped_text(index, message["role"])
        yield from _dropped_calls(index, message, kinds)
        if any(message.get(key) for key in THINKING_KEYS) and THINKING not in kinds:
            yield _dropped_thinking(index)


def of_content(message: dict[str, Any], piece: Piece, shown: str) -> Iterator[Damage]:
    """Thoughts, and texts around them, that are missing where a content with a thought is printed.

    shown: what stands in the place of the piece.
    """
    content = str(message.get("content"))
    if "</think>" not in content or not piece.kinds & {CONTENT, THINKING}:
        return
    for part, kind in thinking_parts(content):
        if kind is None or part in shown:
            continue
        if kind == THINKING:
            yield Damage("thinking", piece.index, f"the template strips thinking of message {piece.index + 1}")
        else:
            yield Damage("content", piece.index, f"the template strips some text of message {piece.index + 1}")


def of_context(row: TurnPlaces, first: int) -> Iterator[Damage]:
    """Texts of system, user and tool messages, and tools, that the prompt before message `first` does not show. What a
    template leaves out of earlier answers, thoughts say, is not there at inference either: no damage.
    """
    marked = row.marked_asked(first)
    printed_marks = set(MARKS.findall(marked))
    for index, message in enumerate(row.messages[:first]):
        content = str(message.get("content") or "").strip()
        if message["role"] == "assistant" or not content:
            continue
        if row.marks[index][CONTENT] in printed_marks:
            continue
        # Where the template refuses marks, the text itself is looked for.
        if marked or content not in row.asked(first):
            yield _dropped_text(index, message["role"])
    if not row.prints_tools:
        yield NO_TOOLS


def of_turn(
    row: TurnPlaces, first: int, last: int, marked: Tail | None, target: str, kept_thought: bool
) -> Iterator[Damage]:
    """What of the messages `first` to `last` is not in their target.

    marked: the turn where every text is a mark, None where the template refuses marks; kept_thought: the target holds a
    thought that the template drops.
    """
    for index in range(first, last + 1):
        message = row.messages[index]
        kinds = set()  # of the marks that are printed; all of them where that is not known
        for kind, mark in enumerate(row.marks[index]):
            if marked is None or mark in marked.marks:
                kinds.add(kind)
        yield from _missing_content(index, message, target)
        yield from _dropped_calls(index, message, kinds)
        thought = row.given_thought(index).strip()
        printed = thought in target and (THINKING in kinds or kept_thought)
        if thought and not printed:
            yield _dropped_thinking(index)


def _missing_content(index: int, message: dict[str, Any], target: str) -> Iterator[Damage]:
    """The most important of what a target lacks of a message's content."""
    content = str(message.get("content") or "").strip()
    if not content or content in target:
        return
    parts = [(part, kind) for part, kind in thinking_parts(content) if kind is not None]
    missing = {kind for part, kind in parts if part not in target}
    if len(parts) == 1 and missing:
        yield _dropped_text(index, "assistant")
    elif CONTENT in missing:
        yield Damage("content", index, f"the template strips some text of message {index + 1}")
    elif THINKING in missing:
        yield Damage("thinking", index, f"the template strips thinking of message {index + 1}")


def _dropped_text(index: int, role: str) -> Damage:
    kind = "system" if role in ("system", "developer") else "content"
    return Damage(kind, index, f"the template drops the text of message {index + 1} ({role})")


def _dropped_calls(index: int, message: dict[str, Any], kinds: set[int]) -> Iterator[Damage]:
    """The tool calls of a message of which no mark is printed. kinds: of the marks that are."""
    calls = len(message.get("tool_calls") or ())
    printed = len([kind for kind in kinds if kind >= CALLS])
    lost = calls - printed
    if lost:
        which = "the tool calls" if lost == calls else f"{lost} of {calls} tool calls"
        yield Damage("calls", index, f"the template drops {which} of message {index + 1}")


def _dropped_thinking(index: int) -> Damage:
    return Damage("thinking", index, f"the template drops the thinking of message {index + 1}")
