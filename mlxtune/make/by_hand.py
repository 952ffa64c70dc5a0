"""A person as an engine: prompts are opened one after the other in an editor, and what was written there is kept.

    Within 30 days, with the receipt.
    ==== the answer stands above this line; nothing below it is kept ====
    Prompt r12. Save nothing above the line to skip it; leave without saving to stop here, and go on later.

    User: When can I return a drill?

Like any engine's, each answer is in the journal before the next prompt is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.evaluate.judging.judge import as_text

NAME = "a person"
LINE = "==== the answer stands above this line; nothing below it is kept ===="

# Shows a text in an editor: the text as it was saved, or None where the editor was left without saving.
Edit = Callable[[str], str | None]


class Leaves(KeyboardInterrupt):
    """The person goes, and may go on later. No fault of an answer: nothing that handles those must see it."""


class Person:
    """Whoever sits at the terminal, as an engine."""

    def __init__(self, edit: Edit) -> None:
        self.name = NAME
        self.notes: list[str] = []
        self._edit = edit

    def work(self) -> dict[str, int]:
        return {}

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """One at a time: what was written is on the disk before the next is asked for."""
        return [[place] for place in range(len(requests))]

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """An empty text for a prompt that is skipped. Raises Leaves where the editor is left without saving."""
        return [self._written(request) for request in requests]

    def _written(self, request: Request) -> Answer:
        text = self._edit(shown(request))
        if text is None:
            raise Leaves
        return Answer(request.id, request.sample, written_above(text), "", "stop", 0)


def shown(request: Request) -> str:
    """What the editor shows of a prompt. The first line is empty: the answer goes there."""
    how = "Save nothing above the line to skip it; leave without saving to stop here, and go on later."
    return f"\n{LINE}\nPrompt {request.id}. {how}\n\n{as_text(request.messages)}\n"


def written_above(text: str) -> str:
    """What stands above the line; all of the text where the line was taken away."""
    return text.partition(LINE)[0].strip()
