"""What tuning unlearned: the drift from the base, the rise of the loss on general text, and what is flagged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxtune.report.evaluations import Evaluated
from mlxtune.report.html import Child, Html, joined
from mlxtune.report.page import Section
from mlxtune.report.sections.one_by_one import notes_of, one_by_one
from mlxtune.report.tables import callout, facts


def section(evaluations: Sequence[Evaluated]) -> Section | None:
    body = one_by_one(evaluations, _drawn)
    return None if body is None else Section("forgetting", "What was forgotten", body)


def _drawn(evaluation: Evaluated) -> Html | None:
    found = evaluation.summary.get("forgetting")
    if not isinstance(found, dict):
        return None
    flags: list[Child] = []
    for flag in found["flagged"]:
        flags.append(callout("bad", f"{flag['measure']} (said from: {flag['limit']}). Likely fix: {found['fix']}."))
    if not flags:
        flags.append(callout("good", "No measure reached its threshold."))
    return joined(*flags, _measures(found), notes_of(found.get("notes", ())))


def _measures(found: Mapping[str, Any]) -> Html:
    drift, loss = found["drift"], found["loss"]
    low, high = drift["kl_interval"]
    least, most = drift["agreement_interval"]
    below, above = loss["interval"]
    kl = f"{drift['kl']:.4f} nats a token (95% interval {low:.4f} to {high:.4f})"
    values: dict[str, Child] = {
        "drift from the base, KL(base || tuned)": kl,
        "the same most likely token": f"{drift['agreement']:.1%} of the time (95% interval {least:.1%} to {most:.1%})",
        f"loss on {loss['of']}": f"{loss['base']:.3f} before, {loss['tuned']:.3f} after, nats a token",
        "difference of that loss": f"{loss['difference']:+.3f} (95% interval {below:+.3f} to {above:+.3f})",
    }
    caption = f"On the base's own answers to {found['prompts']} general prompts, {found['tokens']:,} tokens"
    return facts(caption, values)
