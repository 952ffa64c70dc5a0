"""What went wrong, with its likely cause and the key to turn: of the run itself, and of its evaluations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlxtune.config.resolve import Config
from mlxtune.evaluate.observations.observe import observations_of_run
from mlxtune.evaluate.observations.of_run import data_of
from mlxtune.report.evaluations import Evaluated
from mlxtune.report.html import Child, Html, joined, prose, tag
from mlxtune.report.page import Section
from mlxtune.report.run_record import RunRecord, in_home
from mlxtune.report.secrets import masked
from mlxtune.report.sections.one_by_one import title_of
from mlxtune.report.tables import callout

KEY = re.compile(rf"\b(?:{'|'.join(Config.model_fields)})\.[a-z_]+\b")  # a key of a run's configuration
ANCHOR = "observations"
TEXTS = ("observation", "measure", "limit", "fix")  # that every observation has
NOTED_NOTHING = (
    "This run noted nothing of its rows, for an older version of mlxtune made it: what would follow from them "
    "(too few, cut, repeated, another chat template) was not looked for."
)
NOTHING = (
    "Nothing was found that looks wrong. That says only that no threshold was reached: whether the answers are good, "
    "an evaluation says."
)


def lead(record: RunRecord | None, evaluations: Sequence[Evaluated]) -> Html | None:
    """What stands at the top of the page where something looks wrong: a loss that fell does not show it."""
    names: dict[str, None] = {}
    for one, _ in _found(record, evaluations):
        names.setdefault(str(one["observation"]))
    if not names:
        return None
    where = tag("a", "Observations", href=f"#{ANCHOR}")
    return callout("warning", f"This looks wrong: {', '.join(names)}. Under ", where, " stands what is likely to help.")


def section(record: RunRecord | None, evaluations: Sequence[Evaluated]) -> Section:
    """record: the run; None: the page is of an evaluation alone."""
    parts: list[Child] = [_drawn(one, record, seen_in) for one, seen_in in _found(record, evaluations)]
    for evaluation in evaluations:
        if _of(evaluation) is None:
            parts.append(callout("warning", f"The observations of {evaluation.name} are damaged and not shown."))
    if not parts:
        parts.append(callout("neutral", NOTHING))
    if record is not None and not data_of(record.events):
        parts.append(callout("neutral", NOTED_NOTHING))
    return Section(ANCHOR, "Observations", joined(*parts))


def _found(record: RunRecord | None, evaluations: Sequence[Evaluated]) -> list[tuple[Mapping[str, Any], str]]:
    """(What was observed, in which evaluation), of the run itself first and in "". What an evaluation observed of the
    run's events is not told again.
    """
    found: list[tuple[Mapping[str, Any], str]] = []
    if record is not None:
        found += [(one, "") for one in observations_of_run(record.events)]
    known = {one["observation"] for one, _ in found}
    for evaluation in evaluations:
        for one in _of(evaluation) or ():
            if one["observation"] not in known:
                found.append((one, title_of(evaluation)))
    return found


def _of(evaluation: Evaluated) -> list[Mapping[str, Any]] | None:
    """The observations of an evaluation; None where somebody damaged them."""
    found = evaluation.summary.get("observations", [])
    is_whole = isinstance(found, list) and all(isinstance(one, dict) and _is_whole(one) for one in found)
    return found if is_whole else None


def _is_whole(one: Mapping[str, Any]) -> bool:
    """Whether an observation has what is shown of it, in texts."""
    return "examples" in one and all(isinstance(one.get(name), str) for name in TEXTS)


def _drawn(one: Mapping[str, Any], record: RunRecord | None, seen_in: str) -> Html:
    """One observation. seen_in: the evaluation that it is of; "": the run itself."""
    fix = str(one["fix"])
    examples = ", ".join(map(str, one["examples"])) if isinstance(one["examples"], list) else ""
    return callout(
        "warning",
        tag("p", tag("strong", str(one["observation"])), f" ({seen_in})" if seen_in else None),
        tag("p", prose(f"{one['measure']}. "), tag("span", f"Said from: {one['limit']}.", class_="dim")),
        tag("p", f"Prompts: {examples}.", class_="dim") if examples else None,
        tag("p", tag("strong", "Likely fix: "), prose(KEY.sub(r"`\g<0>`", fix)), "."),
        _values(fix, record),
    )


def _values(fix: str, record: RunRecord | None) -> Html | None:
    """What the keys of a fix were set to in this run."""
    if record is None:
        return None
    values = []
    for key in dict.fromkeys(KEY.findall(fix)):
        value = record.setting(key)
        if isinstance(value, str | int | float):
            values.append(f"{key}: {in_home(masked(str(value))) or 'not set'}")
    return tag("p", f"In this run: {'; '.join(values)}.", class_="dim") if values else None
