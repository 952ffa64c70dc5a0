"""Whether a judge can tell good from bad here, before anything that it says is believed.

Small models as judges guess, or say "A" to everything. Each is asked first about pairs whose better side is known: the
reference of a prompt against what is surely worse.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.judging.judge import RUBRIC, Judge
from mlxtune.evaluate.judging.verdicts import Pair, first_rate, judge_pairs

PAIRS = 20  # of an exam
LEAST = 5  # pairs without which there is none
RIGHT = 0.8  # share of pairs on which the better side must be preferred
CONSISTENT = 0.6  # share of pairs on which both orders must have the same decision


@dataclass(frozen=True)
class Exam:
    """How a judge did."""

    pairs: int  # that it was asked about; 0: the suite has too few references
    right: int  # on which it prefers the better side
    consistent: int  # on which both orders have the same decision
    failed: int  # on which its reply could not be read
    first: float | None  # share of decisions for what is shown first; None: there was none

    @property
    def passed(self) -> bool:
        return self.pairs > 0 and self.right >= RIGHT * self.pairs and self.consistent >= CONSISTENT * self.pairs

    @property
    def sentence(self) -> str:
        """What is to be said of it, in one line."""
        if not self.pairs:
            return f"the judge cannot be examined: fewer than {LEAST} prompts have a reference that can be made worse"
        facts = f"{self.right} of {self.pairs} right, {self.consistent} the same in both orders"
        if self.failed:
            facts += f", {self.failed} replies that cannot be read"
        if self.passed:
            return f"the judge passed its exam: {facts}"
        return f"this judge cannot tell good from bad here ({facts}; {RIGHT:.0%} and {CONSISTENT:.0%} are needed)"

    def as_json(self) -> dict[str, Any]:
        counted = {"pairs": self.pairs, "right": self.right, "consistent": self.consistent, "failed": self.failed}
        return {**counted, "first_position": self.first, "passed": self.passed}


def examine(
    judge: Judge, rows: Sequence[SuiteRow], rubric: str = RUBRIC, seed: int = 0, known: Sequence[Pair] = ()
) -> Exam:
    """Ask a judge about pairs whose better side is known. Raises UserError as the judge does.

    known: such pairs, their "tuned" side better; (): they are made of the references of the suite's rows.
    """
    pairs = list(known) or exam_pairs(rows, seed)
    if not pairs:
        return Exam(0, 0, 0, 0, None)
    verdicts = judge_pairs(judge, pairs, rubric)
    read = [verdict for verdict in verdicts if not verdict.failed]
    return Exam(
        pairs=len(verdicts),
        right=sum(verdict.preference > 0.5 for verdict in read),
        consistent=sum(verdict.consistent for verdict in read),
        failed=len(verdicts) - len(read),
        first=first_rate(verdicts),
    )


def exam_pairs(rows: Sequence[SuiteRow], seed: int = 0) -> list[Pair]:
    """Pairs whose "tuned" side is a reference and whose "base" side is worse: another prompt's reference, the first
    half of it, nothing, its sentences or words shuffled; as even as can be. [] where there would be fewer than LEAST.
    """
    chance = random.Random(seed)
    known = [row for row in rows if row.reference and row.reference.strip()]
    chance.shuffle(known)
    references = [row.reference or "" for row in known]
    ways: list[Callable[[int], str]] = [
        lambda place: references[(place + 1) % len(references)],
        lambda place: references[place][: len(references[place]) // 2].rstrip(),
        lambda place: "",
        lambda place: _shuffled(references[place], chance),
    ]
    pairs: list[Pair] = []
    # First each prompt with one way of damage, then each with the next: few prompts give many pairs.
    for turn in range(len(ways)):
        for place, row in enumerate(known):
            worse = ways[(place + turn) % len(ways)](place)
            if len(pairs) < PAIRS and _plain(worse) != _plain(references[place]):
                pairs.append(Pair(row.id, row.messages, base=worse, tuned=references[place], sample=turn))
    return pairs if len(pairs) >= LEAST else []


def _shuffled(text: str, chance: random.Random) -> str:
    """Its sentences in another order; of one sentence, its words."""
    parts = re.split(r"(?<=[.!?])\s+", text.strip())
    if len(parts) < 3:
        parts = text.split()
    before = list(parts)
    chance.shuffle(parts)
    return " ".join(parts if parts != before else reversed(parts))


def _plain(text: str) -> str:
    return " ".join(text.split())
