"""Conditions that an evaluation must meet, for scripts: the command ends with status 3 where one is not met.

--min-better schema=0.1    the tuned side is better by 0.1 at least, and the difference is shown
--max-worse exact=0.02     it is not worse by more than 0.02
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlxtune.errors import UserError, did_you_mean

UNMET = 3  # exit status


@dataclass(frozen=True)
class Gate:
    """One condition."""

    kind: Literal["min-better", "max-worse"]  # the option's name
    check: str  # its name in the evaluation
    limit: float  # 0 to 1: of the difference of the mean scores

    @staticmethod
    def read(kind: Literal["min-better", "max-worse"], text: str) -> Gate:
        """text: as in schema=0.1. Raises UserError for another form."""
        check, _, number = text.rpartition("=")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if not check or not 0 <= limit <= 1:
            raise UserError(f"--{kind} {text}: a check's name and a number from 0 to 1", f"As in --{kind} json=0.1")
        return Gate(kind, check, limit)

    def met(self, result: Mapping[str, Any]) -> bool:
        """result: of its check, as `summary.check_results` gives it."""
        if self.kind == "max-worse":
            return bool(result["difference"] >= -self.limit)
        return bool(result["difference"] >= self.limit and result["verdict"] == "better")

    def unmet(self, result: Mapping[str, Any]) -> str:
        """In words, why it is not met."""
        found = f"{self.check} is {result['difference']:+.3f}, {result['verdict']}"
        wanted = f"at most {self.limit:g} worse" if self.kind == "max-worse" else f"better by {self.limit:g}, and shown"
        return f"{found}; wanted is {wanted}"


def require_known(gates: Sequence[Gate], checks: Collection[str]) -> None:
    """Raise UserError for a gate on a check that the suite has not. checks: the names of those it has."""
    for gate in gates:
        if gate.check not in checks:
            raise UserError(
                f"--{gate.kind} {gate.check}: the suite has no such check", did_you_mean(gate.check, checks)
            )


def results(
    gates: Sequence[Gate], checks: Mapping[str, Mapping[str, Any]], nothing: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Of each gate whether it is met, for the document; a check that applied to no prompt meets none.

    checks: as `summary.check_results` gives them; nothing: name -> why there is none of that name, where more is known.
    """
    found = []
    for gate in gates:
        result = checks.get(gate.check)
        met = result is not None and gate.met(result)
        why = f"{gate.check} {nothing.get(gate.check, 'applied to no prompt')}"
        if result is not None:
            why = gate.unmet(result)
        entry = {"gate": gate.kind, "check": gate.check, "limit": gate.limit, "met": met}
        found.append(entry if met else {**entry, "why": why})
    return found
