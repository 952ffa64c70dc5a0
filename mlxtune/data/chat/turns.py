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
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

from mlxtune.data.chat.conversation import Conversation
from mlxtune.data.chat.marks import CALLS, CONTENT, KEPT, THINKING, kind_of, marks_for, replaced, thinking_parts
from mlxtune.data.template.template import (
    ASSISTANT,
    MARKS,
    THINKING_KEYS,
    Messages,
    Template,
    TemplateError,
    common_prefix,
    common_suffix,
)

SLACK = 12  # characters around a call's arguments that depend on them: the quotes of a text, say


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
    quoted: int = 0  # characters at the start of `after` that the real arguments do not have
    loose: int = 0  # characters at the end of `after` that a call's real arguments may not have

    @property
    def slack(self) -> int:
        return SLACK if max(self.kinds) >= CALLS else 0

    def followed(self, text: str, at: int) -> bool:
        """Whether the template text after the piece stands in `text` at `at`."""
        return common_prefix(text[at : at + len(self.after)], self.after) >= len(self.after) - self.loose


def locate(template: Template, messages: Messages, tools: Any = None) -> Turns:
    """Render a conversation and find its turns. Raises TemplateError when the template refuses it, or when a turn's
    place is not certain.
    """
    return _Conversation(template, messages, tools).turns()


class _Conversation(Conversation):
    """A conversation and its text, rendered once."""

    def __init__(self, template: Template, messages: Messages, tools: Any) -> None:
        super().__init__(template, messages, tools)
        self.text = self.whole(len(messages))

    def render(self, messages: Messages, prompt: bool = False) -> str:
        return self.template.attempt(messages, self.tools, prompt)

    def turns(self) -> Turns:
        out = Turns(self.text)
        marked = self.marked_whole(len(self.messages))
        pieces = self.pieces(marked)
        out.damage = list(self.lost(pieces)) if marked else []
        places = self.walk(pieces)
        assistants = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        if not places:
            out.spans = sorted(((index, *self.apart(index)) for index in assistants), key=lambda span: span[1:])
            self.prove(out.spans)
            return out
        seen: set[int] = set()
        ends = [0, *(end for _, end in places)]
        starts = [*(start for start, _ in places[1:]), len(self.text)]
        for before, (start, end), after, piece in zip(ends, places, starts, pieces, strict=False):
            if piece.index in assistants:
                out.damage += _changed(self.messages[piece.index], piece, self.text[start:end])
                if piece.index not in seen:
                    start -= self.own_opening(piece.index, self.text[before:start])
                end += self.own_closing(piece, self.text[end:after])
                out.spans.append((piece.index, start, end))
                seen.add(piece.index)
        return out

    def prove(self, spans: list[tuple[int, int, int]]) -> None:
        """Raise TemplateError unless every text of a context message is shown to stand outside the spans: by place, in
        a rendering in which these texts are marks and the turns are as they are.
        """
        context = [message["role"] != "assistant" for message in self.messages]
        mixed = zip(context, self.marked, self.messages, strict=True)
        pieces = self.pieces(self.render([marked if other else real for other, marked, real in mixed]))
        places = self.walk(pieces)
        shown = any(message["content"] for other, message in zip(context, self.messages, strict=True) if other)
        for index, start, end in spans:
            inside = any(place < end and start < until for place, until in places if place < until)
            if inside or (shown and not places):
                raise TemplateError(f"the chat template prints message {index + 1} so that its place is not certain")

    def pieces(self, marked: str) -> list[_Piece]:
        """The messages in the order in which the template prints them."""
        mine = re.compile(f"[{''.join(self.owner)}]")  # a real text may hold other private-use characters
        parts = mine.split(marked)
        found = [self.owner[mark] for mark in mine.findall(marked)]
        out: list[_Piece] = []
        place = 0
        for index, group in groupby(found, key=lambda item: item[0]):
            kinds = [kind for _, kind in group]
            out.append(_Piece(index, set(kinds), parts[place]))
            place += len(kinds)
        for piece, follower in pairwise(out):
            piece.after, piece.loose = follower.before, follower.slack
        if out:
            out[-1].after = parts[-1]
        return out

    def walk(self, pieces: list[_Piece]) -> list[tuple[int, int]]:
        """[start, end) of each piece, by walking text and marked render side by side; none when they part."""
        places: list[tuple[int, int]] = []
        at = 0
        for piece, follower in zip(pieces, [*pieces[1:], None], strict=False):
            shared = common_prefix(self.text[at : at + len(piece.before)], piece.before)
            if shared < len(piece.before) - piece.slack:
                return []
            at += shared
            end = self.end(piece, at)
            piece.after = piece.after[piece.quoted :]
            if follower is not None:
                follower.before = piece.after
            if end is None or not piece.followed(self.text, end):
                return []
            places.append((at, end))
            at = end
        return places if places and at + len(pieces[-1].after) == len(self.text) else []

    def end(self, piece: _Piece, at: int) -> int | None:
        """Where a piece that begins at `at` ends."""
        message, marks = self.messages[piece.index], self.marks[piece.index]
        if piece.kinds == {CONTENT}:
            content = message.get("content") or ""
            for shown in (content, content.strip(), content.lstrip(), content.rstrip()):
                if self.text.startswith(shown, at) and piece.followed(self.text, at + len(shown)):
                    return at + len(shown)
        # Printed in another form: when this piece alone is replaced, what follows it stays as it is.
        kinds = {min(kind, CALLS) for kind in piece.kinds}
        alone = replaced(message, marks, kinds)
        marked = self.render([*self.messages[: piece.index], alone, *self.messages[piece.index + 1 :]])
        last = max(marked.rfind(mark) for mark in marks)
        after = marked[last + 1 :]
        shared = common_suffix(self.text[at:], after)
        if last < 0 or shared < len(after) - piece.slack:
            return None
        piece.quoted = len(after) - shared
        return len(self.text) - shared

    def apart(self, index: int) -> tuple[int, int]:
        """A turn's span when the walk fails, by comparison with the same conversation whose turn is but a mark: the
        whole one, or the one up to that turn where what comes later leaves it as it is.
        """
        template, before_turn, after_turn = self.template, self.messages[:index], self.messages[index + 1 :]
        mark = self.marks[0][CONTENT]
        plain = {"role": "assistant", "content": mark}
        asked = self.render(before_turn, prompt=True) if template.request else ""
        earlier = self.render(before_turn)
        follower = str(after_turn[0].get("content") or "").strip() if after_turn else ""
        for later in (after_turn, []):
            shown = self.text if later else template.text(self.messages[: index + 1], self.tools)
            before, found, after = self.render([*before_turn, plain, *later]).partition(mark)
            known = common_prefix(shown, earlier)
            start = header = template.shared_start(shown, before)
            if asked and shown.startswith(asked):
                start = len(asked)
            elif template.request and (place := shown.find(template.request, known, header)) >= 0:
                start = place + len(template.request)
            end = len(shown) - common_suffix(shown[start:], after)
            kept = not later or follower in shown[end:]
            if found and start >= known and kept and self.text.startswith(shown[:end]):
                # What the template prints between the mark and the content of the next message.
                next_marked = [
                    replaced(message, own) for message, own in zip(later, marks_for(mark, later), strict=True)
                ]
                closing = MARKS.split(self.render([*before_turn, plain, *next_marked]).partition(mark)[2])[0]
                if not shown.startswith(closing, end):
                    closing = ""
                return start, end + up_to_end_token(template, closing, closing if not later else "")
        raise TemplateError(f"the chat template prints message {index + 1} so that its place is not certain")

    def own_opening(self, index: int, opening: str) -> int:
        """How many characters before a turn's content the model must produce itself.

        opening: the template text between the message before and the content. What the template prints when it asks
        for this turn is prompt.
        """
        key = (self.messages[index - 1]["role"] if index else "", opening)
        if key not in self.template.starts:
            self.template.starts[key] = self.prompt_length(self.marked[:index], opening)
        return len(opening) - self.template.starts[key]

    def prompt_length(self, marked: Messages, opening: str) -> int:
        """How many characters of `opening` the template prints when it asks for a turn after the marked messages."""
        silent, asked = (MARKS.split(self.render(marked, prompt))[-1] for prompt in (False, True))
        if silent == asked:
            # It prints nothing to ask with: a plain turn's opening is the prompt.
            marks = marks_for(ASSISTANT, marked)
            before = [replaced(message, own) for message, own in zip(marked, marks, strict=True)]
            plain = self.render([*before, {"role": "assistant", "content": ASSISTANT}])
            header = MARKS.split(plain.partition(ASSISTANT)[0])[-1] if ASSISTANT in plain else opening
            return common_prefix(header, opening)
        shared = self.template.shared_start(asked, opening)
        request = asked[common_prefix(silent, asked) :]
        if shared < len(asked) and request in opening:
            return opening.rindex(request) + len(request)  # the turn before ends otherwise when another follows it
        return shared

    def own_closing(self, piece: _Piece, closing: str) -> int:
        """How many characters after a piece the model must produce.

        closing: the template text up to the next piece.
        """
        if any(stop in closing for stop in self.template.stops):
            return up_to_end_token(self.template, closing, "")
        kinds = {min(kind, CALLS) for kind in piece.kinds}
        alone = {key: value for key, value in self.marked[piece.index].items() if key in KEPT or kind_of(key) in kinds}
        own = MARKS.split(self.render([*self.marked[: piece.index], {"content": "", **alone}]))[-1]
        return up_to_end_token(self.template, closing, own[piece.quoted :])

    def lost(self, pieces: list[_Piece]) -> Iterator[Damage]:
        """What the marked render does not show."""
        shown: dict[int, set[int]] = {}
        for piece in pieces:
            shown.setdefault(piece.index, set()).update(piece.kinds)
        if self.tools and self.text == self.template.attempt(self.messages):
            yield Damage("tools", 0, "the template does not print the tools")
        for index, message in enumerate(self.messages):
            kinds, name = shown.get(index, set()), f"message {index + 1}"
            content = message.get("content") or ""
            if content and not kinds & ({CONTENT, THINKING} if "</think>" in content else {CONTENT}):
                kind = "system" if message["role"] in ("system", "developer") else "content"
                yield Damage(kind, index, f"the template drops the text of {name} ({message['role']})")
            calls = len(message.get("tool_calls") or ())
            lost = calls - sum(kind >= CALLS for kind in kinds)
            if lost:
                which = "the tool calls" if lost == calls else f"{lost} of {calls} tool calls"
                yield Damage("calls", index, f"the template drops {which} of {name}")
            if any(message.get(key) for key in THINKING_KEYS) and THINKING not in kinds:
                yield Damage("thinking", index, f"the template drops the thinking of {name}")


def up_to_end_token(template: Template, closing: str, own: str) -> int:
    """Length of `closing` up to and with the end-of-turn token. Where another token ends the turn (a tool call's, say):
    of what the template prints before anything follows, `own`.
    """
    for match in template.special.finditer(closing):
        if match.group() in template.stops:
            return match.end()
    shared = closing[: common_prefix(closing, own)]
    whole = [match.end() for match in template.special.finditer(shared)]
    end = len(own.rstrip()) if shared == own else max(whole, default=0)
    header = template.special.match(closing, end) if template.stops_at_headers else None
    return header.end() if header and not template.request.startswith(header.group()) else end


def _changed(message: dict[str, Any], piece: _Piece, shown: str) -> Iterator[Damage]:
    """Thinking, and text around it, inside a content of which not all is shown."""
    content = str(message.get("content"))
    if "</think>" in content and piece.kinds & {CONTENT, THINKING}:
        for part, kind in thinking_parts(content):
            if kind is not None and part not in shown:
                what, name = ("thinking", "thinking") if kind == THINKING else ("content", "some text")
                yield Damage(what, piece.index, f"the template strips {name} of message {piece.index + 1}")
