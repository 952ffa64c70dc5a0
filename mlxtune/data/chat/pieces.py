"""A marked rendering, cut at its marks: the pieces of messages, and the template's own text between them.

    marked    <|im_start|>user\\nU<|im_end|>\\n<|im_start|>assistant\\nA<|im_end|>\\n      U, A: marks
    pieces    before `<|im_start|>user\\n`                   U  after `<|im_end|>\\n<|im_start|>assistant\\n`
              before `<|im_end|>\\n<|im_start|>assistant\\n`  A  after `<|im_end|>\\n`

Where the marks stand for texts, the real text has the same text before and after. A tool call's arguments are an
object, and its mark is a text, so the template prints quote signs around the mark that the real arguments may not have:

    real      ...{"name": "f", "arguments": {"x": 1}}\\n</tool_call>
    marked    ...{"name": "f", "arguments": {"x": "C"}}\\n</tool_call>

The quote sign before C is the end of `before`, and of the `after` of the piece before: `optional_tail` characters of
that may not be there. The one behind C is the start of `after`; once the end of the real arguments is found, it is
known how many characters are not there: `dropped_quotes`, here 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby, pairwise

from mlxtune.data.chat.marks import CALLS
from mlxtune.data.template.texts import common_prefix

# Characters around a call's arguments that may depend on them. Published templates need one (a quote sign) or five
# (Gemma's, `<|"|>`) on either side; the others are room for templates that quote in a longer way.
TOLERANCE = 12


@dataclass
class Piece:
    """Neighbouring marks of one message in a marked rendering, with the template text before and after them."""

    index: int  # of the message
    kinds: set[int]  # what the marks stand for: CONTENT, THINKING, or a call (CALLS and above)
    before: str  # template text from the piece before it, or from the start
    after: str = ""  # template text up to the next piece, or to the end
    dropped_quotes: int = 0  # characters at the start of `after` that the real arguments of a call do not have
    optional_tail: int = 0  # characters at the end of `after` that the real arguments of the next piece may not have

    @property
    def tolerance(self) -> int:
        """How many characters around the piece may depend on what it stands for."""
        if max(self.kinds) >= CALLS:
            return TOLERANCE
        return 0

    def is_followed(self, text: str, at: int) -> bool:
        """Whether the template text after the piece stands in `text` at `at`."""
        shared = common_prefix(text[at : at + len(self.after)], self.after)
        return shared >= len(self.after) - self.optional_tail


def cut_at_marks(marked: str, owners: dict[str, tuple[int, int]]) -> list[Piece]:
    """The pieces of a marked rendering in the order in which the template prints them.

    owners: mark -> (index of its message, kind). Only these are marks: a real text may hold other private-use
    characters.
    """
    any_mark = re.compile(f"[{''.join(owners)}]")
    literals = any_mark.split(marked)  # one more than there are marks
    owned = [owners[mark] for mark in any_mark.findall(marked)]
    pieces: list[Piece] = []
    place = 0
    for index, group in groupby(owned, key=lambda owner: owner[0]):
        kinds = [kind for _, kind in group]
        pieces.append(Piece(index, set(kinds), before=literals[place]))
        place += len(kinds)
    for piece, follower in pairwise(pieces):
        piece.after = follower.before
        piece.optional_tail = follower.tolerance
    if pieces:
        pieces[-1].after = literals[-1]
    return pieces


def trimmed_ways(text: str) -> tuple[str, str, str, str]:
    """The forms in which templates print a text: as it is, without blanks around, before, or behind it."""
    return text, text.strip(), text.lstrip(), text.rstrip()
