"""What the sections on evaluations share: one evaluation after the other, and a damaged one costs no other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlxtune.errors import UserError
from mlxtune.report.evaluations import Evaluated, side_of
from mlxtune.report.html import Html, joined, tag
from mlxtune.report.secrets import masked
from mlxtune.report.tables import callout

# What reading a summary raises that somebody changed by hand: it is JSON, and may hold anything anywhere.
DAMAGED = (UserError, KeyError, TypeError, ValueError, AttributeError, IndexError)


def one_by_one(evaluations: Sequence[Evaluated], drawn: Callable[[Evaluated], Html | None]) -> Html | None:
    """What `drawn` makes of each, those without anything to show left out; None where that is all of them.

    Where several are shown, each stands under its name.
    """
    parts = []
    for evaluation in evaluations:
        try:
            part = drawn(evaluation)
        except DAMAGED as error:
            reason = error.message if isinstance(error, UserError) else "it holds something else than was written"
            part = callout("warning", f"{evaluation.name} cannot be shown here: {reason}.")
        if part is not None:
            parts.append((evaluation, part))
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0][1]
    return joined(*(tag("section", tag("h3", title_of(evaluation)), part) for evaluation, part in parts))


def title_of(evaluation: Evaluated) -> str:
    """The suite, and the folder where there is one."""
    suite = suite_of(evaluation)
    if evaluation.path is None or evaluation.path.name == suite:
        return suite
    return f"{suite} ({masked(evaluation.path.name)})"


def suite_of(evaluation: Evaluated) -> str:
    """What was asked, by name."""
    suite = evaluation.summary.get("suite")
    name = suite.get("name") if isinstance(suite, dict) else None
    return masked(name if isinstance(name, str) else evaluation.name)


def names_of(summary: Mapping[str, Any]) -> tuple[str, str]:
    """What the two sides are called: before and after, where the tuned model is compared with its own base, else base
    and tuned as the command says.
    """
    base, tuned = side_of(summary, "base"), side_of(summary, "tuned")
    first, second = base.get("digests"), tuned.get("digests")
    if isinstance(first, dict) and isinstance(second, dict):
        is_its_base = first.get("model") == second.get("model") and first.get("adapter") is None
        if is_its_base and second.get("adapter") is not None:
            return "before", "after"
    return "base", "tuned"


def sides_line(summary: Mapping[str, Any]) -> str:
    """Who answered, in words; "" where the summary does not say."""
    parts = []
    for side, name in zip(("base", "tuned"), names_of(summary), strict=True):
        described = side_of(summary, side)
        who = described.get("model") or described.get("server") or described.get("replay")
        if who:
            adapter = described.get("adapter")
            tuned = f" with {masked(str(adapter))}" if adapter else ""
            parts.append(f"{name}: {masked(str(who))}{tuned}")
    return "; ".join(parts)


def notes_of(notes: Sequence[Any]) -> Html | None:
    """What must be known beside the numbers."""
    if not notes:
        return None
    return tag("ul", [tag("li", masked(str(note))) for note in notes], class_="notes")


def counted(n: int, what: str) -> str:
    """1 prompt, 24 prompts."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"
