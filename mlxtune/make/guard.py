"""Keeps what is made away from a suite that will judge what is trained on it.

A row that says what a prompt of the suite says teaches the answer by heart. So a text is refused that is nearly such a
prompt (ROUGE-L above 0.7), or has a run of 8 words (20 letters of Chinese) in common with
one, as a longer text that quotes it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxtune.data.survey.words import LETTERS, UNSPACED, WORDS
from mlxtune.evaluate.checks.suite import read_prompts
from mlxtune.evaluate.checks.words import words_of
from mlxtune.make.pool import Pool

NEAR = 0.7  # ROUGE-L above which two texts are nearly the same
RUN = 8  # words in a row; of scripts whose letters count as words so many as say as much
SPEAKERS = ("user", "tool")  # whose texts of a suite are guarded: many rows rightly share a system prompt


class Guard:
    """What must not be made again. Without texts it refuses nothing."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._pool = Pool(dict.fromkeys(texts))
        self._runs: dict[tuple[str, ...], int] = {}  # a run of words -> the first text that has it
        for number, text in enumerate(self._pool.texts):
            for run in _runs(text):
                self._runs.setdefault(run, number)

    @staticmethod
    def of(avoid: Path | None) -> Guard:
        """avoid: the file of a suite, or the name of one of mlxtune's own; None for none. Raises UserError for what is
        none.
        """
        if avoid is None:
            return Guard()
        messages = [message for prompt in read_prompts(avoid) for message in prompt]
        return Guard(str(message.get("content") or "") for message in messages if message["role"] in SPEAKERS)

    def __len__(self) -> int:
        """How many texts are guarded."""
        return len(self._pool)

    def why(self, text: str) -> str | None:
        """Why a text is too near to what is guarded, for a person; None where it is not."""
        for run in _runs(text):
            if run in self._runs:
                return f'"{" ".join(run)}" is also in: {_short(self._pool.texts[self._runs[run]])}'
        score, which = self._pool.nearest(text)
        if score > NEAR:
            return f"ROUGE-L {score:.2f} to: {_short(self._pool.texts[which])}"
        return None

    def why_any(self, messages: Sequence[dict[str, Any]]) -> str | None:
        """The same of a conversation: of the first of its messages that is too near; the system prompt aside."""
        for message in messages:
            if message["role"] not in ("system", "developer"):
                found = self.why(str(message.get("content") or ""))
                if found is not None:
                    return found
        return None


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    """The run of words at each place of a text that is long enough: RUN words, or 20 Chinese letters."""
    words = words_of(text)
    end, length = 0, 0
    for place, word in enumerate(words):
        while length < RUN * LETTERS and end < len(words):
            length += _length(words[end])
            end += 1
        if length < RUN * LETTERS:
            return
        yield tuple(words[place:end])
        length -= _length(word)


def _length(word: str) -> int:
    """A word has the length LETTERS, a letter that counts as one the length WORDS."""
    return WORDS if UNSPACED.match(word) else LETTERS


def _short(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:77]}..."
