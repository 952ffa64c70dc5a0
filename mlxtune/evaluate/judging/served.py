"""A server as a judge: the chances of its labels where it tells them, else its reply, read strictly.

The reply has to be [[A]] and nothing else. Anything else is a failure that is counted; no default stands for it, and
nothing is searched for in prose. Where the server gives `top_logprobs`, they say how likely each label was there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlxtune.evaluate.engines.request import Messages
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.evaluate.engines.server import AT_ONCE, THOUGHT, Server
from mlxtune.evaluate.judging.judge import Probabilities

TOKENS = 16  # of a reply: more than [[A]] takes
TOLD = 20  # likeliest tokens that are asked for at each place
SEEN = 0.5  # together, below which what the labels have is no verdict
TEMPLATE_MARK = re.compile(r"<(?=\|)")  # how most special tokens begin; whose the server takes, is not known
JOINER = "\u2060"  # put behind it; it has no width


class ServedJudge(Server):
    """A server that is asked to judge. Raises UserError where it does not answer, or has not the model."""

    def __init__(self, address: str, allow_remote: bool = False) -> None:
        super().__init__(address, Sampling(max_tokens=TOKENS), allow_remote)
        self.require_there()  # now: it is asked only when all is answered, hours later perhaps

    def label_probabilities(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[Probabilities | None]:
        """As `Judge`. Raises UserError where no server answers."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda prompt: self._judged(prompt, labels), prompts))

    def _judged(self, prompt: Messages, labels: Sequence[str]) -> Probabilities | None:
        messages = [{**one, "content": TEMPLATE_MARK.sub(f"<{JOINER}", str(one["content"]))} for one in prompt]
        asked = {"model": self.model, "messages": messages, "max_tokens": TOKENS, "temperature": 0.0, "stream": False}
        reply = self._call("/chat/completions", {**asked, "logprobs": True, "top_logprobs": TOLD})
        try:
            choice = reply["choices"][0]
            said = strictly(str(choice["message"].get("content") or ""), labels)
            told = None if said is None else _told(choice, labels)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            return None
        if said is not None and told is None:
            self._say(f"{self.url} does not tell how likely a reply was: each counts as certain")
        return told or said


def strictly(text: str, labels: Sequence[str]) -> Probabilities | None:
    """All for the label that a reply consists of, a thought before it aside; None for any other reply."""
    text = THOUGHT.sub("", text, count=1).strip()
    for place, label in enumerate(labels):
        if text == f"[[{label}]]":
            return [float(other == place) for other in range(len(labels))]
    return None


def _told(choice: dict[str, Any], labels: Sequence[str]) -> Probabilities | None:
    """The labels' chances by `logprobs`, at the last place whose own token is a label: before it may stand a thought.
    None where they are not told.
    """
    content = (choice.get("logprobs") or {}).get("content") or []
    for place in reversed(content):
        if _bare(place["token"]) not in labels:
            continue
        chances = dict.fromkeys(labels, 0.0)
        for other in place.get("top_logprobs") or []:
            if _bare(other["token"]) in chances:
                chances[_bare(other["token"])] += math.exp(min(0.0, float(other["logprob"])))
        total = sum(chances.values())
        if total < SEEN:
            return None
        return [chance / total for chance in chances.values()]
    return None


def _bare(token: str) -> str:
    """Without brackets, and without how tokenizers write a blank."""
    return token.strip(" \t\r\n[]▁Ġ")
