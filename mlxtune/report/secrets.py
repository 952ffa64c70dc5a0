"""Secrets in the texts of other people, hidden: a page is sent by mail and put on walls.

What is a secret is what `data check` takes for one (`lint.SECRETS`). A text is masked before it is cut or divided into
words: half of a key is a key that no pattern finds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlxtune.data.survey.lint import SECRETS

SHOWN = 4  # first characters of a secret, by which its owner knows it again
HIDDEN = "…"
# A pattern of `SECRETS` may end before the secret does (AKIA and 16 letters): what goes on without a gap is of it.
_WHOLE = re.compile(rf"(?:{SECRETS.pattern})[\w-]*")
_QUOTE = re.compile(r"\\*['\"]")  # it may be escaped
_KEY_BEGINS = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_KEY_ENDS = re.compile(r"-----END [A-Z ]*PRIVATE KEY-----")
_KEY_GOES_ON = re.compile(r"(?:\s|\\[nr])*[A-Za-z0-9+/]{16}")  # base 64; line ends may be written as in JSON


def masked(text: str) -> str:
    """A text with each secret in it replaced by its first characters and "…".

    `password = "correct-horse"` becomes `password = "…"`, AKIA and what follows `AKIA…`, and of a private key its first
    line stays. A masked text stays as it is when it is masked again.
    """
    return _WHOLE.sub(_hidden, _without_private_keys(text))


def masked_values(value: Any) -> Any:
    """The same of all texts in a value of JSON, keys among them."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {masked(str(key)): masked_values(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [masked_values(one) for one in value]
    return value


def _hidden(found: re.Match[str]) -> str:
    secret = found[0]
    if found["assigned"]:
        return found["assigned"] + HIDDEN + _QUOTE.findall(found["assigned"])[-1]
    if _KEY_BEGINS.match(secret):
        return secret
    return secret[:SHOWN] + HIDDEN


def _without_private_keys(text: str) -> str:
    """The text without what stands between the first and the last line of a private key. One that was cut has no last
    line, and goes on to the end of the text.
    """
    last_end = max((end.start() for end in _KEY_ENDS.finditer(text)), default=0)
    kept, done = [], 0
    while begin := _KEY_BEGINS.search(text, done):
        kept.append(text[done : begin.end()])
        done = begin.end()
        end = _KEY_ENDS.search(text, done) if done <= last_end else None
        if end is not None:
            kept.append(HIDDEN)
            done = end.start()
        elif _KEY_GOES_ON.match(text, done):
            kept.append(HIDDEN)
            done = len(text)
    kept.append(text[done:])
    return "".join(kept)
