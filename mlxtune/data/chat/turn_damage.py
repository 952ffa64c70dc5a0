"""What of a turn, and of the context it is asked in, the template does not print."""

from __future__ import annotations

from collections.abc import Iterator

from mlxtune.data.chat.marks import CALLS, CONTENT, THINKING, thinking_parts
from mlxtune.data.chat.turn_places import Tail, TurnPlaces
from mlxtune.data.chat.turns import Damage
from mlxtune.data.template.template import MARKS


def of_context(row: TurnPlaces, first: int) -> Iterator[Damage]:
    """Texts of system, user and tool messages, and tools, that the prompt before message `first` does not show. What a
    template leaves out of earlier answers, thoughts say, is not there at inference either: no damage.
    """
    marked = row.marked_asked(first)
    shown = set(MARKS.findall(marked))
    for index, message in enumerate(row.messages[:first]):
        content = str(message.get("content") or "").strip()
        if message["role"] == "assistant" or not content:
            continue
        if row.marks[index][CONTENT] not in shown and (marked or content not in row.asked(first)):
            kind = "system" if message["role"] in ("system", "developer") else "content"
            yield Damage(kind, index, f"the template drops the text of message {index + 1} ({message['role']})")
    if not row.prints_tools:
        yield Damage("tools", 0, "the template does not print the tools")


def of_turn(row: TurnPlaces, first: int, last: int, marked: Tail | None, target: str, kept: bool) -> Iterator[Damage]:
    """What of the messages `first` to `last` is not in their target. kept: a thought that the template drops is."""
    for index in range(first, last + 1):
        message, name = row.messages[index], f"message {index + 1}"
        shown = {kind for kind, mark in enumerate(row.marks[index]) if marked is None or mark in marked.marks}
        content = str(message.get("content") or "").strip()
        if content and content not in target:
            parts = [(part, kind) for part, kind in thinking_parts(content) if kind is not None]
            missing = {kind for part, kind in parts if part not in target}
            if len(parts) == 1 and missing:
                yield Damage("content", index, f"the template drops the text of {name} (assistant)")
            elif CONTENT in missing:
                yield Damage("content", index, f"the template strips some text of {name}")
            elif THINKING in missing:
                yield Damage("thinking", index, f"the template strips thinking of {name}")
        calls = len(message.get("tool_calls") or ())
        lost = calls - sum(kind >= CALLS for kind in shown)
        if lost:
            which = "the tool calls" if lost == calls else f"{lost} of {calls} tool calls"
            yield Damage("calls", index, f"the template drops {which} of {name}")
        thought = row.given_thought(index).strip()
        if thought and (thought not in target or (THINKING not in shown and not kept)):
            yield Damage("thinking", index, f"the template drops the thinking of {name}")
