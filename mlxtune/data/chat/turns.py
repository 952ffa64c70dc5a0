"""Where each turn stands in a rendered conversation, found by construction.

The conversation is rendered a second time with every text replaced by a mark, a private-use character that occurs
nowhere else. The text between marks is the template's own. For example (ChatML; U and A are marks):

    text      <|im_start|>user\\nhello there<|im_end|>\\n<|im_start|>assistant\\nhi<|im_end|>\\n
    marked    <|im_start|>user\\nU<|im_end|>\\n<|im_start|>assistant\\nA<|im_end|>\\n
    pieces    before `<|im_start|>user\\n`                   U  after `<|im_end|>\\n<|im_start|>assistant\\n`
              before `<|im_end|>\\n<|im_start|>assistant\\n`  A  after `<|im_end|>\\n`
    request                          `<|im_start|>assistant\\n`  what the template prints to ask: prompt, not learned
    learned                                                    `hi<|im_end|>`

*The walk* goes through `text` piece by piece: first what the template prints `before`, then the real content, then what
it prints `after`. This gives each message's exact place; a user's text takes part as one opaque piece, and nothing that
it contains can be mistaken for a turn.

*What is learned*: around a turn's content stands template text. The part that the template also prints when it asks the
model for the turn is prompt; the rest, up to and with the end-of-turn token, is what the model must produce.

*A thought* has a mark of its own, and neighbouring marks of one message are one piece (Qwen3):

    text      ...<|im_start|>assistant\\n<think>\\nwhy\\n</think>\\n\\nhi<|im_end|>\\n
    marked    ...<|im_start|>assistant\\n<think>\\nT\\n</think>\\n\\nA<|im_end|>\\n
    pieces    before `...<|im_start|>assistant\\n<think>\\n`  T and A  after `<|im_end|>\\n`
    request   `<|im_start|>assistant\\n`
    learned   `<think>\\n` before the piece, the piece `why\\n</think>\\n\\nhi`, and `<|im_end|>` behind it

*A tool call*: the template may print quote signs around the mark that the real arguments do not have. See `pieces`.

*A turn that the template rewrites* does not fit the marked rendering. Then that turn alone is replaced by a mark. See
`single_replacement`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlxtune.data.chat import damage, single_replacement
from mlxtune.data.chat.conversation import Conversation
from mlxtune.data.chat.damage import Damage
from mlxtune.data.chat.marks import CALLS, CONTENT, KEPT, kind_of, unused_marks, with_marks
from mlxtune.data.chat.pieces import Piece, cut_at_marks, trimmed_ways
from mlxtune.data.chat.turn_ends import up_to_end_token
from mlxtune.data.template.probes import ASSISTANT, MARKS
from mlxtune.data.template.template import Messages, Template
from mlxtune.data.template.texts import common_prefix, common_suffix


@dataclass
class LocatedTurns:
    """A rendered conversation."""

    text: str  # what the template prints
    # (message index, start, end) of the characters that the model must produce, in the text's order
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)  # what of the messages is not printed


def locate(template: Template, messages: Messages, tools: Any = None) -> LocatedTurns:
    """Render a conversation and find its turns. Raises TemplateError when the template refuses it, or when a turn's
    place is not certain.
    """
    return RenderedConversation(template, messages, tools).located()


class RenderedConversation(Conversation):
    """A conversation and its text, rendered once."""

    def __init__(self, template: Template, messages: Messages, tools: Any) -> None:
        super().__init__(template, messages, tools)
        self.text = self.whole(len(messages))

    def located(self) -> LocatedTurns:
        """The spans of all assistant turns, and what of the messages is not printed."""
        out = LocatedTurns(self.text)
        marked = self.marked_whole(len(self.messages))
        pieces = cut_at_marks(marked, self.owners)
        if marked:  # else the template refuses marks, and what it drops is not known
            out.damage += damage.of_pieces(self, self.text, pieces)
        places = self.walk(pieces)
        if not places:
            out.spans = self.replaced_one_by_one()
            return out
        seen: set[int] = set()
        for number, (piece, (start, end)) in enumerate(zip(pieces, places, strict=True)):
            message = self.messages[piece.index]
            if message["role"] != "assistant":
                continue
            out.damage += damage.of_content(message, piece, self.text[start:end])
            previous_end = places[number - 1][1] if number else 0
            next_start = places[number + 1][0] if number + 1 < len(places) else len(self.text)
            learned_start = start
            # Only a message's first piece has a header before it. A later one, such as a content that the template
            # prints behind the tools' results, begins with itself.
            if piece.index not in seen:
                learned_start -= self.learned_before_content(piece.index, self.text[previous_end:start])
            learned_end = end + self.learned_after_content(piece, self.text[end:next_start])
            out.spans.append((piece.index, learned_start, learned_end))
            seen.add(piece.index)
        return out

    # The walk.

    def walk(self, pieces: list[Piece]) -> list[tuple[int, int]]:
        """[start, end) of each piece in the text, by walking text and marked rendering side by side; none when they
        part. Puts right what the pieces say of the template text behind them.
        """
        places: list[tuple[int, int]] = []
        at = 0
        for number, piece in enumerate(pieces):
            shared = common_prefix(self.text[at : at + len(piece.before)], piece.before)
            if shared < len(piece.before) - piece.tolerance:
                return []
            start = at + shared
            end = self.end_of(piece, start)
            if end is None:
                return []
            piece.after = piece.after[piece.dropped_quotes :]
            if number + 1 < len(pieces):
                pieces[number + 1].before = piece.after
            if not piece.is_followed(self.text, end):
                return []
            places.append((start, end))
            at = end
        if places and at + len(pieces[-1].after) == len(self.text):
            return places
        return []

    def end_of(self, piece: Piece, start: int) -> int | None:
        """Where a piece that begins at `start` ends; None where that is not found. Sets its `dropped_quotes`."""
        message = self.messages[piece.index]
        if piece.kinds == {CONTENT}:
            for shown in trimmed_ways(message.get("content") or ""):
                if self.text.startswith(shown, start) and piece.is_followed(self.text, start + len(shown)):
                    return start + len(shown)
        return self.end_by_what_follows(piece, start)

    def end_by_what_follows(self, piece: Piece, start: int) -> int | None:
        """The same for a piece that is printed in another form, a call's arguments say: when this piece alone is
        replaced by marks, what follows it stays as it is.
        """
        message, marks = self.messages[piece.index], self.marks[piece.index]
        kinds = {min(kind, CALLS) for kind in piece.kinds}
        alone = with_marks(message, marks, kinds)
        single = self.attempt([*self.messages[: piece.index], alone, *self.messages[piece.index + 1 :]])
        last_mark = max(single.rfind(mark) for mark in marks)
        if last_mark < 0:
            return None
        after = single[last_mark + 1 :]
        shared = common_suffix(self.text[start:], after)
        dropped = len(after) - shared
        if dropped > piece.tolerance:
            return None
        piece.dropped_quotes = dropped
        return len(self.text) - shared

    # Where the walk does not fit.

    def replaced_one_by_one(self) -> list[tuple[int, int, int]]:
        """The spans of all turns, each of them found by itself. Raises TemplateError when one is not certain."""
        spans = []
        for index, message in enumerate(self.messages):
            if message["role"] == "assistant":
                spans.append((index, *single_replacement.span_of(self, self.text, index)))
        spans.sort(key=lambda span: span[1:])
        self.prove(spans)
        return spans

    def prove(self, spans: list[tuple[int, int, int]]) -> None:
        """Raise TemplateError unless every text of a context message is shown to stand outside the spans: by place, in
        a rendering in which these texts are marks and the turns are as they are.
        """
        mixed: Messages = []
        has_context_text = False
        for message, marked in zip(self.messages, self.marked, strict=True):
            if message["role"] == "assistant":
                mixed.append(message)
            else:
                mixed.append(marked)
                has_context_text = has_context_text or bool(message["content"])
        places = self.walk(cut_at_marks(self.attempt(mixed), self.owners))
        for index, start, end in spans:
            if has_context_text and not places:
                raise self.uncertain(index)
            for context_start, context_end in places:
                meets = context_start < end and start < context_end
                if meets and context_start < context_end:
                    raise self.uncertain(index)

    # What is learned around a content.

    def learned_before_content(self, index: int, opening: str) -> int:
        """How many characters before a turn's content the model must produce itself.

        opening: the template text between the message before and the content. What the template prints when it asks
        for this turn is prompt.
        """
        role_before = self.messages[index - 1]["role"] if index else ""
        key = (role_before, opening)
        lengths = self.template.prompt_lengths
        if key not in lengths:
            lengths[key] = self.prompt_length(self.marked[:index], opening)
        return len(opening) - lengths[key]

    def prompt_length(self, earlier: Messages, opening: str) -> int:
        """How many characters of `opening` the template prints when it asks for a turn.

        earlier: the messages before the turn, with marks.
        """
        silent = MARKS.split(self.attempt(earlier))[-1]  # what is printed behind their last text
        asked = MARKS.split(self.attempt(earlier, prompt=True))[-1]
        if silent == asked:
            return self.header_length(earlier, opening)
        request = asked[common_prefix(silent, asked) :]
        shared = self.template.shared_start(asked, opening)
        if shared < len(asked) and request in opening:
            return opening.rindex(request) + len(request)  # the turn before ends otherwise when another follows it
        return shared

    def header_length(self, earlier: Messages, opening: str) -> int:
        """The same for a template that prints nothing to ask with: all that stands before a plain turn's content."""
        marks = unused_marks(ASSISTANT, earlier)
        before = [with_marks(message, its_marks) for message, its_marks in zip(earlier, marks, strict=True)]
        plain = self.attempt([*before, {"role": "assistant", "content": ASSISTANT}])
        if ASSISTANT not in plain:
            return len(opening)
        header = MARKS.split(plain.partition(ASSISTANT)[0])[-1]
        return common_prefix(header, opening)

    def learned_after_content(self, piece: Piece, closing: str) -> int:
        """How many characters after a piece the model must produce.

        closing: the template text up to the next piece.
        """
        if any(stop in closing for stop in self.template.stops):
            return up_to_end_token(self.template, closing, "")
        # Another token may end this turn, such as that of a tool call. When the message is the last one, the text
        # behind it ends with that token.
        kinds = {min(kind, CALLS) for kind in piece.kinds}
        alone: dict[str, Any] = {"content": ""}
        for key, value in self.marked[piece.index].items():
            if key in KEPT or kind_of(key) in kinds:
                alone[key] = value
        closing_alone = MARKS.split(self.attempt([*self.marked[: piece.index], alone]))[-1]
        return up_to_end_token(self.template, closing, closing_alone[piece.dropped_quotes :])
