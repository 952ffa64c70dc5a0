"""What went wrong, with its likely cause and the key to turn: of the run itself, and of its evaluations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlxtune.config.resolve import Config
from mlxtune.evaluate.observations.observe import observations_of_run
from mlxtune.evaluate.observations.of_run import data_of
from mlxtune.report.evaluations import Evaluated
from mlxtune.report.html import Child, Html, joined, tag
from mlxtune.report.page import Section
from mlxtune.report.run_record import RunRecord
from mlxtune.report.secrets import masked
from mlxtune.report.sections.one_by_one import DAMAGED, title_of
from mlxtune.report.tables import callout

KEY = re.compile(rf"\b(?:{'|'.join(Config.model_fields)})\.[a-z_]+\b")  # a key of a run's configuration
NOTHING = (
    "Nothing was found that looks wrong. That says only that no threshold was reached: whether the answers are good, "
    "an evaluation says."
)


def section(record: RunRecord | None, evaluations: Sequence[Evaluated]) -> Section:
    """record: the run; None: the page is of an evaluation alone."""
    of_run = [] if record is None else observations_of_run(record.events)
    known = {one["observation"] for one in of_run}
    parts: list[Child] = [_drawn(one, record, "") for one in of_run]
    for evaluation in evaluations:
        try:
            parts += [
                _drawn(one, record, title_of(evaluation))
                for one in evaluation.summary.get("observations", ())
                if one["observation"] not in known  # the evaluation saw the run's events too
            ]
        except DAMAGED:
            parts.append(callout("warning", f"The observations of {evaluation.name} are damaged and not shown."))
    if not parts:
        parts.append(callout("neutral", NOTHING))
    if record is not None and not data_of(record.events):
        text = (
            "This run noted nothing of its rows, for an older version of mlxtune made it: what would follow from them "
            "(too few, cut, repeated, another chat template) was not looked for."
        )
        parts.append(callout("neutral", text))
    return Section("observations", "Observations", joined(*parts))


def _drawn(one: Mapping[str, Any], record: RunRecord | None, seen_in: str) -> Html:
    """One observation. seen_in: the evaluation that it is of; "": the run itself."""
    fix = str(one["fix"])
    examples = ", ".join(map(str, one["examples"]))
    return callout(
        "warning",
        tag("p", tag("strong", str(one["observation"])), f" ({seen_in})" if seen_in else None),
        tag("p", str(one["measure"]), ". ", tag("span", f"Said from: {one['limit']}.", class_="dim")),
        tag("p", f"Prompts: {examples}.", class_="dim") if examples else None,
        tag("p", tag("strong", "Likely fix: "), _with_keys(fix), "."),
        _values(fix, record),
    )


def _with_keys(text: str) -> list[Child]:
    """A sentence with the keys in it set apart."""
    parts: list[Child] = []
    end = 0
    for found in KEY.finditer(text):
        parts += [text[end : found.start()], tag("code", found[0])]
        end = found.end()
    return [*parts, text[end:]]


def _values(fix: str, record: RunRecord | None) -> Html | None:
    """What the keys of a fix were set to in this run."""
    if record is None:
        return None
    values = []
    for key in dict.fromkeys(KEY.findall(fix)):
        value = record.setting(key)
        if isinstance(value, str | int | float):
            values.append(f"{key}: {masked(str(value)) or 'not set'}")
    return tag("p", f"In this run: {'; '.join(values)}.", class_="dim") if values else None
