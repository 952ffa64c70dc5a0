"""What helps a run on preferences, by its objective, its rows and its keys: a key that would be refused is not named.

objective                reward at step 0    a loss of 0                  preference.beta    preference.sft
dpo, apo                 0                   answers are told apart       holds              of pairs
                                             with certainty
ipo                      0                   its goal, of healthy runs    holds              yes
kto                      0                   as of dpo                    holds              refused
simpo                    any                 as of dpo                    no reference       yes
orpo                     any                 never of itself: it has      no reference       refused
                                             the answers' own loss
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxtune.config.preference import EFFECTIVE, OBJECTIVES, WITHOUT_REFERENCE

SFT = 0.5  # preference.sft, that is proposed where it is 0


@dataclass(frozen=True)
class Remedies:
    """What may be proposed to a run."""

    objective: str = ""  # as preference.loss; "": unknown, or answers are learned as they are
    of_pairs: bool = False  # rows are pairs; else they are rated answers, or unknown
    sft: float = 0.0  # preference.sft

    @staticmethod
    def of_events(events: Sequence[Mapping[str, Any]]) -> Remedies:
        """Of what the run noted when it began last; unknown where that is nothing that we write."""
        for event in reversed(events):
            noted = event.get("preference") if event["kind"] == "begin" else None
            if isinstance(noted, dict) and noted.get("loss") in OBJECTIVES:
                sft = noted.get("sft")
                own = float(sft) if isinstance(sft, int | float) else 0.0
                return Remedies(noted["loss"], noted.get("rows") == "pairs", own)
        return Remedies()

    @property
    def has_reference(self) -> bool:
        """Whether the objective is known to compare with the model at step 0."""
        return bool(self.objective) and self.objective not in WITHOUT_REFERENCE

    @property
    def rewards_begin_at_0(self) -> bool:
        """Whether a reward below 0 is of an answer that became less likely. Of an unknown objective it is taken so."""
        return self.objective not in WITHOUT_REFERENCE

    @property
    def zero_is_certainty(self) -> bool:
        """Whether a loss near 0 means that answers are told apart with certainty: not ipo's, which is 0 at its goal,
        nor one that has the chosen answers' own loss in it. Of an unknown objective it is taken so.
        """
        return self.objective not in ("ipo", "orpo") and not self.sft

    # What helps, in words that follow "set" or stand before "keeps".

    def against_falling(self) -> str:
        """Against preferred answers that become less likely."""
        helps = ["a lower train.lr"]
        if self.has_reference:
            helps.append("a higher preference.beta")
        if self.of_pairs and self.objective in EFFECTIVE["sft"]:
            helps.append(f"a preference.sft above {self.sft:g}" if self.sft else f"preference.sft={SFT:g}")
        if not self.of_pairs and self.objective in EFFECTIVE["good_weight"]:
            helps.append("a higher preference.good_weight")
        return _one_of(helps)

    def against_certainty(self) -> str:
        """Against a loss that is 0 at once."""
        helps = ["a lower train.lr (a tenth of it, say)"]
        if self.has_reference:
            helps.append("a higher preference.beta")
        return _one_of(helps)

    def against_overfitting(self) -> str:
        """A sentence on what helps beside what helps any run."""
        if self.has_reference:
            return "a higher preference.beta holds the model near its reference"
        return "a smaller lora.rank leaves less to learn by heart"


def _one_of(helps: Sequence[str]) -> str:
    """ "this", "this or that", "this, that or another"."""
    *others, last = helps
    return f"{', '.join(others)} or {last}" if others else last
