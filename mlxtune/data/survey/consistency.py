"""How the conversations of one source are written, and whether those of another are written otherwise.

A model that is shown two manners learns to choose between them by what it sees in the question. Where the two are two
sources (a folder of terse answers, another of long ones with headings) that is rarely meant.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxtune.data.rows.formats import Record
from mlxtune.data.survey.subjects import first_question, is_question
from mlxtune.data.survey.words import word_count

LEAST = 20  # conversations from which on a source has a manner
FAR_SHARE = 0.5  # between two shares: a difference to speak of
FAR_TIMES = 4.0  # between the usual lengths of two sources' answers: the same
# A heading, an item, a table, a block of code, bold letters.
MARKDOWN = re.compile(r"^(?:#{1,6} |[-*+] |\d+[.)] |\|.*\|)|```|\*\*\S", re.MULTILINE)
QUARTERS = (25, 50, 75)  # percent of the answers


@dataclass
class Style:
    """How the conversations of one split are written."""

    conversations: int = 0  # with a question of a user
    questions: int = 0  # whose first turn asks; the others order or state
    with_system: int = 0  # that begin with a system prompt
    answers: int = 0  # of the assistant, in all conversations
    marked: int = 0  # answers with Markdown
    words: Counter[int] = field(default_factory=Counter)  # answers of so many words

    def add(self, record: Record) -> None:
        """Count one row; a text has no manner."""
        messages = record.messages or []
        question = first_question(record)
        if not question:
            return
        self.conversations += 1
        self.questions += is_question(question)
        self.with_system += messages[0]["role"] in ("system", "developer")
        for message in messages:
            answer = str(message["content"] or "")
            if message["role"] == "assistant" and answer.strip():
                self.answers += 1
                self.marked += MARKDOWN.search(answer) is not None
                self.words[word_count(answer)] += 1

    def shares(self) -> dict[str, float]:
        """What is there -> in which share of the conversations, or of the answers."""
        conversations, answers = max(1, self.conversations), max(1, self.answers)
        return {
            "questions": self.questions / conversations,
            "system prompts": self.with_system / conversations,
            "answers with Markdown": self.marked / answers,
        }

    def words_at(self, percent: int) -> int:
        """So many percent of the answers have at most this number of words; 0 where there is no answer."""
        counted = 0
        for words, count in sorted(self.words.items()):
            counted += count
            if 100 * counted >= percent * self.answers:
                return words
        return 0

    def as_json(self) -> dict[str, Any]:
        questions, systems, markdown = self.shares().values()
        return {
            "conversations": self.conversations,
            "answers": self.answers,
            "questions": round(questions, 4),
            "system_prompts": round(systems, 4),
            "markdown": round(markdown, 4),
            "answer_words": {str(percent): self.words_at(percent) for percent in QUARTERS},
        }


def differences(styles: Mapping[str, Style]) -> dict[str, list[str]]:
    """Name of a source -> how it is written otherwise than the first one; sources of few conversations aside.

    styles: of the sources by name, in their order.
    """
    known = {name: style for name, style in styles.items() if style.conversations >= LEAST}
    found: dict[str, list[str]] = {}
    if len(known) < 2:
        return found
    first, *others = known
    for name in others:
        said = _differences(known[name], known[first], first)
        if said:
            found[name] = said
    return found


def _differences(style: Style, other: Style, other_name: str) -> list[str]:
    said = []
    other_shares = other.shares()
    for what, share in style.shares().items():
        if abs(share - other_shares[what]) > FAR_SHARE:
            said.append(f"{what}: {share:.0%}, in {other_name} {other_shares[what]:.0%}")
    words, other_words = style.words_at(50), other.words_at(50)
    if max(words, other_words) > FAR_TIMES * max(1, min(words, other_words)):
        said.append(f"usual words of an answer: {words:,}, in {other_name} {other_words:,}")
    return said
