"""Where each turn stands in a rendered conversation, found by construction.

The conversation is rendered a second time with every content replaced by a mark, a private-use character that occurs
nowhere else. The text between marks is the template's own, so walking both renders side by side gives each message's
exact place; user text takes part as one opaque piece, and nothing it contains can be mistaken for a turn. Where the
walk does not fit (a template that rewrites a turn), that turn alone is replaced and the two renders are compared.

Around a turn's content stands template text. The part that the template also prints when it asks the model for its turn
is prompt; the rest, up to and with the end-of-turn token, is what the model must produce.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

from mlxtune.data.template import (
    ASSISTANT,
    MARKS,
    THINKING_KEYS,
    Messages,
    Template,
    TemplateError,
    common_prefix,
    common_suffix,
)

CONTENT, THINKING, CALLS = range(3)  # what a mark stands for
KINDS = 3
KEPT = ("role", "name", "id", "tool_call_id", "type")  # what templates compare, count or look up


@dataclass(frozen=True)
class Damage:
    """Something of a message that the template does not print as it is. kind: system, content, calls, thinking or
    tools; index: of the message.
    """

    kind: str
    index: int
    text: str


@dataclass
class Turns:
    """A rendered conversation. spans: (message index, start, end) of the characters that the model must produce, in the
    text's order.
    """

    text: str
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)


@dataclass
class _Piece:
    """Neighbouring marks of one message in the marked render, with the template text before and after them."""

    index: int
    kinds: set[int]
    before: str
    after: str = ""


def locate(template: Template, messages: Messages, tools: Any = None) -> Turns:
    """Render a conversation and find its turns. Raises TemplateError when the template refuses it, or when a turn's
    place is not certain.
    """
    out = Turns(template.text(messages, tools))
    marks = _marks(out.text, len(messages))
    marked_messages = [_replaced(message, marks[index]) for index, message in enumerate(messages)]
    marked = template.attempt(marked_messages, tools)
    pieces = _pieces(marked, marks)
    out.damage = list(_lost(messages, pieces, template, tools, out.text)) if marked else []
    places = _walk(template, messages, tools, out.text, pieces, marks) if marked else None
    assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if places is None:
        apart = [(index, *_apart(template, messages, tools, out.text, index)) for index in assistants]
        out.spans = sorted(apart, key=lambda span: span[1:])
        return out
    seen: set[int] = set()
    for (before, (start, end), after), piece in zip(_neighbours(places, len(out.text)), pieces, strict=True):
        if piece.index in assistants:
            out.damage += _changed(messages[piece.index], piece, out.text[start:end])
            if piece.index not in seen:
                start -= _own_opening(template, messages, marked_messages, tools, piece.index, out.text[before:start])
            end += _own_closing(template, marked_messages, tools, piece, out.text[end:after])
            out.spans.append((piece.index, start, end))
            seen.add(piece.index)
    return out


def _neighbours(places: list[tuple[int, int]], length: int) -> Iterator[tuple[int, tuple[int, int], int]]:
    """(end of the place before, place, start of the place after)."""
    ends = [0, *(end for _, end in places)]
    starts = [*(start for start, _ in places[1:]), length]
    return zip(ends, places, starts, strict=False)


def _marks(text: str, count: int) -> list[str]:
    """Per message, its marks as a string of one character per kind; none of them is in the text."""
    spare = (chr(code) for block in ((0xE000, 0xF900), (0xF0000, 0xFFFFE)) for code in range(*block))
    if MARKS.search(text):
        spare = (mark for mark in spare if mark not in text)
    return ["".join(next(spare) for _ in range(KINDS)) for _ in range(count)]


def _kind(key: str) -> int:
    return CALLS if key == "tool_calls" else THINKING if key in THINKING_KEYS else CONTENT


def _replaced(message: dict[str, Any], marks: str, kinds: Iterable[int] = range(KINDS)) -> dict[str, Any]:
    """The message with the same keys, and marks for its texts of some kinds. Something is marked even in an empty
    turn.
    """
    out = dict(message)
    for key, value in message.items():
        if _kind(key) not in kinds:
            continue
        if key == "tool_calls" and value:
            out[key] = [_replaced_call(call, marks[CALLS]) for call in value]
        elif isinstance(value, str) and value and key not in KEPT:
            out[key] = marks[THINKING] if _kind(key) == THINKING else _replaced_text(value, marks)
    if not message.get("content") and not message.get("tool_calls"):
        out["content"] = marks[CONTENT]
    return out


THOUGHT = re.compile(r"(<think>\s*)(.*?)(\s*</think>\s*)", re.DOTALL)  # templates look for it in the content


def _replaced_text(text: str, marks: str) -> str:
    """One mark; with thinking inside the text, one for each thought and one for what stands around it."""
    if "</think>" not in text:
        return marks[CONTENT]
    out, last = "", 0
    for match in THOUGHT.finditer(text):
        around = text[last : match.start()]
        thought = marks[THINKING] if match.group(2) else ""
        out += (marks[CONTENT] if around.strip() else around) + match.group(1) + thought + match.group(3)
        last = match.end()
    return out + (marks[CONTENT] if text[last:].strip() else text[last:])


def _replaced_call(call: dict[str, Any], mark: str) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = mark if isinstance(function.get("arguments"), str) else {mark: mark}
    changed = {**function, "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed


def _pieces(marked: str, marks: list[str]) -> list[_Piece]:
    """The messages in the order in which the template prints them."""
    owner = {mark: (index, kind) for index, own in enumerate(marks) for kind, mark in enumerate(own)}
    parts = MARKS.split(marked)
    found = [owner[mark] for mark in MARKS.findall(marked)]
    out: list[_Piece] = []
    place = 0
    for index, group in groupby(found, key=lambda item: item[0]):
        kinds = [kind for _, kind in group]
        out.append(_Piece(index, set(kinds), parts[place]))
        place += len(kinds)
    for piece, follower in pairwise(out):
        piece.after = follower.before
    if out:
        out[-1].after = parts[-1]
    return out


def _walk(
    template: Template, messages: Messages, tools: Any, text: str, pieces: list[_Piece], marks: list[str]
) -> list[tuple[int, int]] | None:
    """[start, end) of each piece, by walking text and marked render side by side; None when they part."""
    places: list[tuple[int, int]] = []
    at = 0
    for piece in pieces:
        if not text.startswith(piece.before, at):
            return None
        at += len(piece.before)
        end = _end(template, messages, tools, text, piece, marks[piece.index], at)
        if end is None or not text.startswith(piece.after, end):
            return None
        places.append((at, end))
        at = end
    return places if at + len(pieces[-1].after if pieces else "") == len(text) else None


def _end(
    template: Template, messages: Messages, tools: Any, text: str, piece: _Piece, marks: str, at: int
) -> int | None:
    """Where a message that begins at `at` ends."""
    message = messages[piece.index]
    if piece.kinds == {CONTENT}:
        content = message.get("content") or ""
        for shown in (content, content.strip(), content.lstrip(), content.rstrip()):
            if text.startswith(shown, at) and text.startswith(piece.after, at + len(shown)):
                return at + len(shown)
    # Printed in another form: when this piece alone is replaced, what follows it stays as it is.
    alone = [*messages[: piece.index], _replaced(message, marks, piece.kinds), *messages[piece.index + 1 :]]
    after = _after(template.attempt(alone, tools), marks)
    return len(text) - len(after) if after is not None and text.endswith(after) else None


def _after(marked: str, marks: str) -> str | None:
    place = max(marked.rfind(mark) for mark in marks)
    return None if place < 0 else marked[place + 1 :]


def _apart(template: Template, messages: Messages, tools: Any, text: str, index: int) -> tuple[int, int]:
    """A turn's span when the walk fails: the conversation up to it, compared with the same whose last turn is a mark.
    What comes later must leave it where it is.
    """
    upto = template.text(messages[: index + 1], tools)
    mark = _marks(upto, 1)[0][CONTENT]
    marked = template.attempt([*messages[:index], {"role": messages[index]["role"], "content": mark}], tools)
    before, _, after = marked.partition(mark)
    asked = template.attempt(messages[:index], tools, prompt=True) if template.asks else ""
    start = common_prefix(upto, asked or before)
    end = len(upto) - common_suffix(upto[start:], after)
    certain = bool(marked) and start >= common_prefix(upto, template.attempt(messages[:index], tools))
    if not certain or not text.startswith(upto[:end]):
        raise TemplateError(f"the chat template prints message {index + 1} so that its place is not certain")
    closing = upto[end : end + common_prefix(upto[end:], text[end:])]
    return start, end + _to_stop(template, closing, closing)


def _own_opening(template: Template, messages: Messages, marked: Messages, tools: Any, index: int, opening: str) -> int:
    """How many characters before a turn's content the model must produce itself.

    opening: the template text between the message before and the content. What the template prints when it asks for
    this turn is prompt.
    """
    key = (messages[index - 1]["role"] if index else "", opening)
    if key not in template.starts:
        template.starts[key] = _prompt_length(template, marked[:index], tools, opening)
    return len(opening) - template.starts[key]


def _prompt_length(template: Template, marked: Messages, tools: Any, opening: str) -> int:
    """How many characters of `opening` the template prints when it asks for a turn after the marked messages."""
    silent, asked = (MARKS.split(template.attempt(marked, tools, prompt))[-1] for prompt in (False, True))
    if silent == asked:
        # It prints nothing to ask with: a plain turn's opening is the prompt.
        marks = _marks(ASSISTANT, len(marked))
        before = [_replaced(message, own) for message, own in zip(marked, marks, strict=True)]
        plain = template.attempt([*before, {"role": "assistant", "content": ASSISTANT}], tools)
        asked = MARKS.split(plain.partition(ASSISTANT)[0])[-1] if ASSISTANT in plain else opening
    shared = common_prefix(asked, opening)
    request = asked[common_prefix(silent, asked) :]
    if shared < len(asked) and request in opening:
        return opening.rindex(request) + len(request)  # the turn before ends otherwise when another follows it
    return shared


def _own_closing(template: Template, marked: Messages, tools: Any, piece: _Piece, closing: str) -> int:
    """How many characters after a piece the model must produce.

    closing: the template text up to the next piece.
    """
    if any(stop in closing for stop in template.stops):
        return _to_stop(template, closing, "")
    alone = {key: value for key, value in marked[piece.index].items() if key in KEPT or _kind(key) in piece.kinds}
    upto = [*marked[: piece.index], {"content": "", **alone}]
    return _to_stop(template, closing, MARKS.split(template.attempt(upto, tools))[-1])


def _to_stop(template: Template, closing: str, own: str) -> int:
    """Length of `closing` up to and with the end-of-turn token. Where another token ends the turn (a tool call's, say):
    of what the template prints before anything follows, `own`.
    """
    for match in template.special.finditer(closing):
        if match.group() in template.stops:
            return match.end()
    shared = closing[: common_prefix(closing, own)]
    whole = [match.end() for match in template.special.finditer(shared)]
    return len(own.rstrip()) if shared == own else max(whole, default=0)


def _lost(messages: Messages, pieces: list[_Piece], template: Template, tools: Any, text: str) -> Iterator[Damage]:
    """What the marked render does not show."""
    shown: dict[int, set[int]] = {}
    for piece in pieces:
        shown.setdefault(piece.index, set()).update(piece.kinds)
    if tools and text == template.attempt(messages):
        yield Damage("tools", 0, "the template does not print the tools")
    for index, message in enumerate(messages):
        kinds, name = shown.get(index, set()), f"message {index + 1}"
        if message.get("content") and CONTENT not in kinds:
            kind = "system" if message["role"] in ("system", "developer") else "content"
            yield Damage(kind, index, f"the template drops the text of {name} ({message['role']})")
        if message.get("tool_calls") and CALLS not in kinds:
            yield Damage("calls", index, f"the template drops the tool calls of {name}")
        if any(message.get(key) for key in THINKING_KEYS) and THINKING not in kinds:
            yield Damage("thinking", index, f"the template drops the thinking of {name}")


def _changed(message: dict[str, Any], piece: _Piece, shown: str) -> Iterator[Damage]:
    """Thinking inside the content that is not in the text shown."""
    thought = THOUGHT.search(str(message.get("content")))
    if thought and CONTENT in piece.kinds and thought.group(2) not in shown:
        yield Damage("thinking", piece.index, f"the template strips the thinking of message {piece.index + 1}")
