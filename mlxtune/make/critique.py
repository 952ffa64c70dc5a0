"""Answer, criticise by principles, revise: an engine's answer made better by the engine itself.

As in Constitutional AI (Bai et al. 2022, arXiv:2212.08073), but with the user's own principles, one a line of a file:

    # for a support desk
    Say what the customer can do next.
    No more than five sentences.

Three requests a row: the answer, what is wrong with it, the answer anew. Where nothing is wrong, the second is the
last, and the answer stays. What all prompts share stands first in each, so that it is computed once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxtune.data.rows.readers import whole_text
from mlxtune.errors import UserError
from mlxtune.evaluate.engines.request import Messages
from mlxtune.evaluate.judging.judge import as_text

LONGEST = 20_000  # characters of the principles: more would leave small models no room for the answer
NOTHING = re.compile(r"\W*nothing\W*", re.IGNORECASE)  # the reply that finds no fault


def read_principles(file: Path) -> list[str]:
    """The principles of a file, one a line; empty lines and those that begin with # are none. Raises UserError."""
    text = whole_text(file, "--critique")
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise UserError(f"--critique {file} has no principle", "Write one a line, such as: Say what to do next.")
    if len(text) > LONGEST:
        raise UserError(f"--critique {file} has {len(text):,} characters; {LONGEST:,} are allowed", "Shorten it.")
    return found


def critique_prompt(principles: Sequence[str], question: Messages, answer: str) -> list[dict[str, Any]]:
    """What is wrong with an answer? One message of the user: some templates refuse any other."""
    told = (
        "Below are a request and an answer to it. An answer has to keep to these principles:\n"
        f"{_numbered(principles)}\n\n"
        "Name what in the answer does not keep to them, each with its number, in five sentences at most. Reply with "
        "the one word nothing if the answer keeps to all of them. Do not write the answer anew."
    )
    return _prompt([told, f"Request:\n{as_text(question)}", f"Answer:\n{answer}"])


def finds_nothing(critique: str) -> bool:
    """Whether a critique says that nothing is wrong."""
    return NOTHING.fullmatch(critique.strip()) is not None


def revision_prompt(principles: Sequence[str], question: Messages, answer: str, critique: str) -> list[dict[str, Any]]:
    """The answer anew, without what the critique names."""
    told = (
        "Below are a request, an answer to it, and what is wrong with that answer. Write the answer anew so that it "
        f"keeps to these principles:\n{_numbered(principles)}\n\n"
        "Reply with the new answer alone, in the language of the request, as if it were the first: do not speak of the "
        "old one or of the criticism."
    )
    texts = [f"Request:\n{as_text(question)}", f"Answer:\n{answer}", f"What is wrong with it:\n{critique}"]
    return _prompt([told, *texts])


def _numbered(principles: Sequence[str]) -> str:
    return "\n".join(f"{number}. {text}" for number, text in enumerate(principles, 1))


def _prompt(parts: Sequence[str]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "\n\n".join(parts)}]
