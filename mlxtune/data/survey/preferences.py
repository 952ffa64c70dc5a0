"""Pairs and rated answers: whether they contradict each other, and what else than quality they may teach.

Four pairs about one prompt and the answers A, B, C, as (chosen, rejected):

    1  A B    contradicted by 3
    2  B C    C is chosen in 4, and rejected here: fine where somebody ranked C between others, else a slip
    3  B A    contradicted by 1
    4  C D    as 2

Of each pair three hashes are kept, and no text.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlxtune.data.chat.renderer import Row
from mlxtune.data.dataset import duplicates
from mlxtune.data.dataset.beginnings import common, first_target
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.sides import Side
from mlxtune.data.rows.two_sides import Messages, TwoSides, answer_of, prompt_of, side_of

# The share of pairs of which the chosen answer is the longer one, from which length itself is preferred. A judge that
# prefers long answers, and people who do, are the usual reason; a model then learns to be long (Park et al. 2024,
# arXiv:2403.19159).
LONGER = 0.6
LEAST_PAIRS = 20  # pairs of which a share says something
SUPERVISED, PAIRS, RATED = "conversations", "pairs", "rated answers"  # kinds of rows


@dataclass
class Preferences:
    """What is known of the pairs and rated answers of one split."""

    kinds: Counter[str] = field(default_factory=Counter)  # rows of each kind
    good: int = 0  # rated answers with a thumb up
    bad: int = 0  # with a thumb down
    used: int = 0  # pairs that are trained on
    chosen_tokens: int = 0  # that the model must produce, of the chosen answers of these
    rejected_tokens: int = 0  # of their rejected answers
    longer: int = 0  # of these, the chosen answer has more of them
    shorter: int = 0  # it has fewer
    whole_tokens: int = 0  # of both sides of these, each with its prompt
    computed_tokens: int = 0  # of the same, what both begin with counted once
    # Of each answer, one for a rated row and two for a pair:
    prompts: array[int] = field(default_factory=lambda: array("Q"))  # hash of what it answers
    answers: array[int] = field(default_factory=lambda: array("Q"))  # hash of itself
    is_better: array[int] = field(default_factory=lambda: array("B"))  # 1: chosen, or good
    rows: array[int] = field(default_factory=lambda: array("Q"))  # place of its row in `SplitSurvey.names`

    def add(self, row: Record | TwoSides, place: int) -> None:
        """Count one row as it stands. place: of its name."""
        if isinstance(row, TwoSides):
            self.kinds[PAIRS] += 1
            self._keep(row.prompt, row.preferred, row.chosen.tools, True, place)
            self._keep(row.prompt, row.less_preferred, row.chosen.tools, False, place)
            return
        if row.side not in (Side.GOOD, Side.BAD):
            self.kinds[SUPERVISED] += 1
            return
        self.kinds[RATED] += 1
        is_good = row.side == Side.GOOD
        self.good += is_good
        self.bad += not is_good
        self._keep(prompt_of(row), answer_of(row), row.tools, is_good, place)

    def _keep(self, prompt: Messages, answer: Messages, tools: Any, is_better: bool, place: int) -> None:
        self.prompts.append(_hash([prompt, tools]))
        self.answers.append(_hash(answer))
        self.is_better.append(is_better)
        self.rows.append(place)

    def add_used(self, parts: Sequence[Row]) -> None:
        """Count the examples of a row that is trained on; of a rated one there is nothing to compare."""
        targets: Counter[str] = Counter()  # of each side
        firsts: dict[str, Row] = {}  # the first example of each side
        for row in parts:
            assert row.example is not None
            side = side_of(row.record)
            targets[side] += int(np.asarray(row.example.mask[1:]).sum())
            firsts.setdefault(side, row)
        if "chosen" not in firsts:
            return
        tokens = sum(len(row.example.ids) for row in parts if row.example is not None)
        chosen, rejected = targets["chosen"], targets["rejected"]
        self.used += 1
        self.chosen_tokens += chosen
        self.rejected_tokens += rejected
        self.longer += chosen > rejected
        self.shorter += chosen < rejected
        self.whole_tokens += tokens
        self.computed_tokens += tokens - _shared(firsts["chosen"], firsts["rejected"])

    def contradicted(self) -> tuple[set[int], set[int]]:
        """(Places of rows that another row contradicts, places of rows of which an answer stands on the other side of
        another row as well).
        """
        better: set[tuple[int, int]] = set()  # (prompt, answer)
        worse: set[tuple[int, int]] = set()
        for prompt, answer, is_better in zip(self.prompts, self.answers, self.is_better, strict=True):
            (better if is_better else worse).add((prompt, answer))
        pairs = self._pairs()
        ordered = set(pairs.values())
        against: set[int] = set()
        for place, (prompt, chosen, rejected) in pairs.items():
            if chosen != rejected and (prompt, rejected, chosen) in ordered:
                against.add(place)
        both_ways: set[int] = set()
        for prompt, answer, place in zip(self.prompts, self.answers, self.rows, strict=True):
            if (prompt, answer) not in better or (prompt, answer) not in worse:
                continue
            if place not in pairs:
                against.add(place)  # one answer, rated good here and bad there
            elif pairs[place][1] != pairs[place][2]:  # of equal sides that is said already
                both_ways.add(place)
        return against, both_ways - against

    def _pairs(self) -> dict[int, tuple[int, int, int]]:
        """The place of a pair's row -> its prompt, chosen and rejected answer."""
        found: dict[int, tuple[int, int, int]] = {}
        for number in range(1, len(self.rows)):
            if self.rows[number] == self.rows[number - 1]:
                place, prompt = self.rows[number], self.prompts[number]
                found[place] = (prompt, self.answers[number - 1], self.answers[number])
        return found

    @property
    def share_longer(self) -> float | None:
        """Of the used pairs whose answers have different lengths, the share in which the chosen one is the longer;
        None: there are none.
        """
        different = self.longer + self.shorter
        return self.longer / different if different else None

    def length_bias(self) -> tuple[str, str] | None:
        """(Code of a finding, what it says) where lengths tell which answer is chosen; None where they do not."""
        share = self.share_longer
        if share is None or self.longer + self.shorter < LEAST_PAIRS:
            return None
        means = f"{self.chosen_tokens / self.used:,.1f} tokens against {self.rejected_tokens / self.used:,.1f}"
        if share > LONGER:
            return "longer", f"the chosen answer is longer in {share:.0%} of them ({means})"
        if share < 1 - LONGER:
            return "shorter", f"the chosen answer is shorter in {1 - share:.0%} of them ({means})"
        return None

    def one_sided(self) -> str:
        """What is said where all rated answers have the same thumb; "" where they do not."""
        return one_sided(self.good, self.bad) if self.kinds[RATED] else ""

    def as_json(self) -> dict[str, Any]:
        """Counts; {} where there are neither pairs nor rated answers."""
        if not self.kinds[PAIRS] and not self.kinds[RATED]:
            return {}
        share = self.share_longer
        used = max(1, self.used)
        return {
            "pairs": self.kinds[PAIRS],
            "pairs_used": self.used,
            "good": self.good,
            "bad": self.bad,
            "chosen_tokens": round(self.chosen_tokens / used, 2),
            "rejected_tokens": round(self.rejected_tokens / used, 2),
            "chosen_longer": None if share is None else round(share, 4),
            "tokens": self.whole_tokens,
            "computed_tokens": self.computed_tokens,
        }


def one_sided(good: int, bad: int) -> str:
    """The same of so many good and bad answers."""
    if good and bad:
        return ""
    return "all are rated good" if good else "all are rated bad"


def preference_lines(told: dict[str, Any]) -> dict[str, str]:
    """For people: what is counted -> how many. told: as `Preferences.as_json` gives it."""
    lines: dict[str, str] = {}
    if not told:
        return lines
    if told["pairs"]:
        lines["pairs"] = f"{told['pairs']:,}, of which {told['pairs_used']:,} are used"
    if told["pairs_used"]:
        lines["answers"] = (
            f"chosen {told['chosen_tokens']:,.1f} tokens on average, rejected {told['rejected_tokens']:,.1f}"
        )
        if told["chosen_longer"] is not None:
            lines["answers"] += f"; of different lengths, {told['chosen_longer']:.0%} of the chosen are the longer"
        lines["computed"] = (
            f"{told['computed_tokens']:,} of the {told['tokens']:,} tokens of both sides: what both begin with is "
            "computed once"
        )
    if told["good"] or told["bad"]:
        lines["rated"] = f"{told['good']:,} good, {told['bad']:,} bad"
    return lines


def _shared(chosen: Row, rejected: Row) -> int:
    """Tokens before the answers that both sides begin with."""
    assert chosen.example is not None and rejected.example is not None
    alike = common(np.asarray(chosen.example.ids), np.asarray(rejected.example.ids))
    before = min(first_target(chosen.example), first_target(rejected.example))
    return min(alike, before - 1)


def _hash(content: Any) -> int:
    return duplicates.hash_of(json.dumps(content, sort_keys=True, ensure_ascii=False, default=str))
