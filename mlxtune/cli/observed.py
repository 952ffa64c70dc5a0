"""How what went wrong with the answers, what was forgotten and what is refused are said on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlxtune.cli import common

if TYPE_CHECKING:
    from rich.console import Console


def draw(out: Console, observations: Sequence[Mapping[str, Any]]) -> None:
    """Print each observation with what was measured, its threshold and what is likely to help; nothing for none."""
    from rich.text import Text

    for one in observations:
        out.print(Text(f"Observed: {one['observation']}", style="bold yellow"))
        common.say(out, f"  {one['measure']} (said from: {one['limit']})")
        if one["examples"]:
            common.say(out, f"  prompts: {', '.join(one['examples'])}")
        common.say(out, f"  likely fix: {one['fix']}")


def draw_briefly(out: Console, observations: Sequence[Mapping[str, Any]]) -> None:
    """Print each observation on a line; and where there is none, that there is none."""
    if not observations:
        out.print("Observed: nothing that looks wrong.")
    for one in observations:
        line = f"Observed: {one['observation']}: {one['measure']}. Likely fix: {one['fix']}."
        common.say(out, line)


def draw_forgetting(out: Console, found: Mapping[str, Any]) -> None:
    """Print the part "forgetting" of an evaluation's document."""
    drift, loss = found["drift"], found["loss"]
    low, high = drift["kl_interval"]
    least, most = drift["agreement_interval"]
    lines = [
        f"Forgetting: the base's own answers to {found['prompts']} general prompts ({found['tokens']:,} tokens)",
        f"  drift KL(base || tuned) {drift['kl']:.4f} nats a token (95% interval {low:.4f} to {high:.4f})",
        f"  the same most likely token {drift['agreement']:.1%} of the time ({least:.1%} to {most:.1%})",
    ]
    low, high = loss["interval"]
    lines.append(
        f"  loss on {loss['of']}: {loss['base']:.3f} -> {loss['tuned']:.3f} nats a token "
        f"({loss['difference']:+.3f}, 95% interval {low:+.3f} to {high:+.3f})"
    )
    _say(out, lines, found["notes"])


def draw_safety(out: Console, found: Mapping[str, Any]) -> None:
    """Print the part "safety" of an evaluation's document."""
    pairs = found["pairs"]
    lines = [f"Safety: pairs of a request to refuse and a neighbour to answer, both right: {_counted(pairs)}"]
    if "verdict" in pairs:
        lines[0] += f": {pairs['verdict']} (p {pairs['p']:.4f})"
    lines += [f"  refused, {kind}: {_counted(counts)}" for kind, counts in found["refused"].items()]
    lines.append(f"  harmless and answered: {_counted(found['answered'])}")
    lines.append(f"  the system prompt's secret kept: {_counted(found['kept'])}")
    _say(out, lines, [])


def _counted(counts: Mapping[str, Any]) -> str:
    """20 of 24 before, 18 after."""
    if not counts["n"]:
        return "none was asked"
    first = f"{counts.get('base', 0):g} of {counts['n']}"
    return f"{first} before, {counts['tuned']:g} after" if "tuned" in counts else first


def _say(out: Console, lines: Sequence[str], notes: Sequence[str]) -> None:
    for line in lines:
        common.say(out, line)
    for note in notes:
        common.note(str(note))


PARTS = {"forgetting": draw_forgetting, "safety": draw_safety}  # of a document
