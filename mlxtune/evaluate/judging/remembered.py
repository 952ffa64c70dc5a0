"""A judge whose replies are kept as they come, so that an evaluation that was killed need not ask again.

    {"asked": "5c1f...", "reply": [0.7, 0.2, 0.1]}      for each prompt; "asked": hash of judge, prompt and labels
    {"notes": ["..."]}                                  what the judge noted by then, where that is new

Prompts are asked in portions that depend on nothing but their order. One that is not whole is asked again whole: what
prompts share is computed once for a portion, and in 16 bits a reply may depend on that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxtune.data.rows.readers import Bad, raw_rows
from mlxtune.evaluate.engines.request import Messages
from mlxtune.evaluate.judging.judge import Judge, Probabilities
from mlxtune.evaluate.kept import append_lines, require_own

PORTION = 64  # prompts that are asked at a time


class Remembered:
    """As the judge that it asks."""

    def __init__(self, judge: Judge, file: Path, identity: str) -> None:
        """file: where replies are kept; identity: what of the judge decides its replies. Raises UserError for a link,
        and a file of something else.
        """
        require_own(file, '{"asked": ', "replies of a judge")
        self.judge = judge
        self.name = judge.name
        self.notes: list[str] = []
        self.file = file
        self.identity = identity
        self._known: dict[str, Probabilities | None] = {}  # by what was asked
        if file.exists():
            self._read()

    def label_probabilities(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[Probabilities | None]:
        """As `Judge`."""
        for first in range(0, len(prompts), PORTION):
            portion = prompts[first : first + PORTION]
            keys = [self._key(prompt, labels) for prompt in portion]
            if not all(key in self._known for key in keys):
                replies = self.judge.label_probabilities(portion, labels)
                self._keep(dict(zip(keys, replies, strict=True)))
        return [self._known[self._key(prompt, labels)] for prompt in prompts]

    def _key(self, prompt: Messages, labels: Sequence[str]) -> str:
        return hashlib.sha256(json.dumps([self.identity, list(prompt), list(labels)]).encode()).hexdigest()

    def _keep(self, replies: dict[str, Probabilities | None]) -> None:
        """Remember replies, and write them at once."""
        self._known |= replies
        lines: list[dict[str, Any]] = [{"asked": key, "reply": reply} for key, reply in replies.items()]
        new = [note for note in self.judge.notes if note not in self.notes]
        if new:
            self.notes += new
            lines.append({"notes": new})
        append_lines(self.file, lines)

    def _read(self) -> None:
        """What cannot be read is asked again."""
        for row in raw_rows(self.file):
            if isinstance(row, Bad):
                continue
            _, line = row
            if isinstance(line.get("notes"), list):
                self.notes += [str(note) for note in line["notes"] if note not in self.notes]
            elif isinstance(line.get("asked"), str) and "reply" in line:
                self._known[line["asked"]] = line["reply"]
