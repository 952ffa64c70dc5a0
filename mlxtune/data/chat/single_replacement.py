"""A turn's place where the walk of `turns` does not fit: that turn alone is replaced by a mark.

A template may print a turn otherwise for a mark than for the real text. This one, say, prints another header before an
answer with a comma:

    text      Q: which?\\nList: one, two<end>
    marked    Q: U\\nA: A<end>                     the text parts from it at `List: `
    single    Q: which?\\nA: A<end>                only the turn is a mark
    learned   `List: one, two<end>`

What `text` and `single` begin with is context and the turn's header, and what they end with is its closing. Where a
later message changes how the turn is printed, the same is done with the conversation up to that turn.
"""

from __future__ import annotations

from mlxtune.data.chat.conversation import Conversation
from mlxtune.data.chat.marks import CONTENT, unused_marks, with_marks
from mlxtune.data.chat.turn_ends import up_to_end_token
from mlxtune.data.template.probes import MARKS
from mlxtune.data.template.template import Messages
from mlxtune.data.template.texts import common_prefix, common_suffix


def span_of(conversation: Conversation, text: str, index: int) -> tuple[int, int]:
    """The characters [start, end) of `text`, the whole conversation, that the model must produce in turn `index`.

    Raises TemplateError when the turn's place is not certain.
    """
    following = conversation.messages[index + 1 :]
    for later in (following, []):
        span = _Replaced(conversation, text, index, later).span()
        if span is not None:
            return span
    raise conversation.uncertain(index)


class _Replaced:
    """A conversation up to a turn and with some `later` messages, all of them or none, whose turn is a mark."""

    def __init__(self, conversation: Conversation, text: str, index: int, later: Messages) -> None:
        self.conversation, self.template, self.later = conversation, conversation.template, later
        self.earlier = conversation.messages[:index]
        self.mark = conversation.marks[0][CONTENT]
        self.turn = {"role": "assistant", "content": self.mark}
        self.text = text
        if later:
            self.shown = text  # what is compared: the real rendering of the same messages
        else:
            self.shown = self.template.text(conversation.messages[: index + 1], conversation.tools)

    def span(self) -> tuple[int, int] | None:
        """The turn's characters; None where the renderings do not show it."""
        single = self.conversation.attempt([*self.earlier, self.turn, *self.later])
        before, mark, after = single.partition(self.mark)
        context_end = common_prefix(self.shown, self.conversation.attempt(self.earlier))
        start = self.prompt_end(self.template.shared_start(self.shown, before), context_end)
        end = len(self.shown) - common_suffix(self.shown[start:], after)
        if not mark or start < context_end or not self.keeps_next_text(end):
            return None
        if not self.text.startswith(self.shown[:end]):  # what comes later changes the turn
            return None
        closing = self.closing(end)
        closing_alone = "" if self.later else closing
        return start, end + up_to_end_token(self.template, closing, closing_alone)

    def prompt_end(self, header_end: int, context_end: int) -> int:
        """Where what asks for the turn ends.

        header_end: up to where the text is the same whatever the turn says; context_end: where the earlier messages
        end.
        """
        request = self.template.request
        if not request:
            return header_end
        asked = self.conversation.attempt(self.earlier, prompt=True)
        if asked and self.shown.startswith(asked):
            return len(asked)
        place = self.shown.find(request, context_end, header_end)
        if place >= 0:
            return place + len(request)
        return header_end

    def keeps_next_text(self, end: int) -> bool:
        """Whether the content of the next message stands behind the turn: else the end was found too late."""
        if not self.later:
            return True
        return str(self.later[0].get("content") or "").strip() in self.shown[end:]

    def closing(self, end: int) -> str:
        """What the template prints between the turn and the content of the next message; "" where it is not there."""
        marks = unused_marks(self.mark, self.later)
        marked = [with_marks(message, its_marks) for message, its_marks in zip(self.later, marks, strict=True)]
        behind = self.conversation.attempt([*self.earlier, self.turn, *marked]).partition(self.mark)[2]
        closing = MARKS.split(behind)[0]
        if not self.shown.startswith(closing, end):
            return ""
        return closing
