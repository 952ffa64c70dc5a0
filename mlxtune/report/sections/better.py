"""Whether tuning made it better, in one sentence with numbers: what stands first on a page that has an evaluation.

test.jsonl, 24 prompts: better in json (0.0% before, 95.8% after, 95% interval of the difference +79.2 to +99.0
points); no difference shown in length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxtune.evaluate.comparison import figures
from mlxtune.evaluate.comparison.overlap import CHOSEN, LEARNED
from mlxtune.report.evaluations import Evaluated
from mlxtune.report.html import Html, joined, tag
from mlxtune.report.sections.one_by_one import DAMAGED, counted, names_of, suite_of
from mlxtune.report.tables import Kind, callout

MOST_CHECKS = 3  # of one verdict, that are told with their numbers


def lead(evaluations: Sequence[Evaluated]) -> Html | None:
    """A boxed sentence for each evaluation that compares two sides; None where none does."""
    boxes = []
    for evaluation in evaluations:
        try:
            verdicts = _verdicts(evaluation.summary)
            if verdicts:
                known = [*_known_prompts(evaluation.summary), *_untrusted_judge(evaluation.summary)]
                kind = "warning" if known else _kind(verdicts)
                boxes.append(callout(kind, _sentence(evaluation, verdicts), *known))
        except DAMAGED:
            continue  # the sections say which evaluation is damaged
    return joined(*boxes) if boxes else None


def _known_prompts(summary: Mapping[str, Any]) -> list[Html]:
    """What takes from the worth of the numbers: prompts that were trained on, or that chose the checkpoint."""
    notes = [str(note) for note in summary.get("notes", ())]
    return [tag("p", f"But {note}.") for note in notes if note.endswith((LEARNED, CHOSEN))]


def _untrusted_judge(summary: Mapping[str, Any]) -> list[Html]:
    """That a judge who compared the answers passed no exam: `--anyway` shows what it says all the same."""
    judge = summary.get("judge")
    if not isinstance(judge, dict) or "win_rate" not in judge or judge["exam"]["passed"]:
        return []
    exam = judge["exam"]
    if not exam["pairs"]:
        return [tag("p", "But there was nothing to examine the judge on.")]
    facts = f"{exam['right']} of {exam['pairs']} right, {exam['consistent']} the same in both orders"
    return [tag("p", f"But the judge failed its exam ({facts}).")]


def _verdicts(summary: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Verdict -> the checks that it is of; a judge's pairs count as one."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, check in summary["checks"].items():
        if "verdict" in check:
            found.setdefault(check["verdict"], {})[name] = check
    judge = summary.get("judge")
    if isinstance(judge, dict) and "win_rate" in judge:
        found.setdefault(judge["verdict"], {})["the judge"] = judge
    return found


def _kind(verdicts: Mapping[str, Any]) -> Kind:
    if "worse" in verdicts:
        return "bad" if "better" not in verdicts else "warning"
    return "good" if "better" in verdicts else "neutral"


def _sentence(evaluation: Evaluated, verdicts: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    names = names_of(evaluation.summary)
    parts = []
    for verdict in ("better", "worse"):
        if verdict in verdicts:
            told = [_told(name, check, names) for name, check in list(verdicts[verdict].items())[:MOST_CHECKS]]
            more = len(verdicts[verdict]) - MOST_CHECKS
            also = f" and {more} more" if more > 0 else ""
            parts.append(f"{verdict} in {', '.join(told)}{also}")
    others = [name for verdict, checks in verdicts.items() if verdict not in ("better", "worse") for name in checks]
    if others:
        named = ", ".join(others[:MOST_CHECKS])
        also = f" and {len(others) - MOST_CHECKS} more" if len(others) > MOST_CHECKS else ""
        parts.append(f"no difference shown in {named}{also}")
    return f"{suite_of(evaluation)}, {counted(evaluation.summary['n'], 'prompt')}: {'; '.join(parts)}."


def _told(name: str, check: Mapping[str, Any], names: tuple[str, str]) -> str:
    """A check's name with its numbers."""
    if "win_rate" in check:
        low, high = check["interval"]
        return f"{name} (wins {check['win_rate']:.1%}, 95% interval {low:.1%} to {high:.1%})"
    before, after = figures.share(check, check["base"]), figures.share(check, check["tuned"])
    unit = "" if check["graded"] else " points"
    interval = figures.interval(check)
    return f"{name} ({before} {names[0]}, {after} {names[1]}; 95% interval of the difference {interval}{unit})"
