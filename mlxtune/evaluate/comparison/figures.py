"""How the numbers of a comparison are written, the same on a terminal and on a page.

A check that passes or fails has shares and points (92.0%, +8.3); one that is graded has scores (0.671, +0.083).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def share(check: Mapping[str, Any], value: float) -> str:
    """A mean score. check: as `summary.check_results` gives it."""
    return f"{value:.3f}" if check["graded"] else f"{value:.1%}"


def points(check: Mapping[str, Any], difference: float) -> str:
    """A difference of two of them, with its sign."""
    return f"{difference:+.3f}" if check["graded"] else f"{100 * difference:+.1f}"


def interval(check: Mapping[str, Any]) -> str:
    """The 95% interval of the difference; of the mean where one side alone was asked."""
    written = points if "verdict" in check else share
    return " to ".join(written(check, end) for end in check["interval"])


def shows_from(check: Mapping[str, Any]) -> str:
    """The smallest difference that so many prompts show."""
    smallest = check["smallest_difference"]
    return "nothing" if smallest is None else points(check, smallest).removeprefix("+")


def p_value(p: float) -> str:
    return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"
