"""The page of a data set, as `mlxtune data check --html` writes it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mlxtune.data.survey.report import SEVERITIES
from mlxtune.report.html import Html
from mlxtune.report.page import Section, page
from mlxtune.report.secrets import masked
from mlxtune.report.sections import data
from mlxtune.report.surveyed import Surveyed
from mlxtune.report.tables import Kind, callout

KINDS: dict[str, Kind] = {"error": "bad", "warning": "warning", "note": "neutral"}


def of_data(name: str, model: str, found: Surveyed) -> str:
    """A whole page. name: of the data; model: whose tokens the rows are made of, as it was named."""
    body = Section("data", "The rows", data.of_survey(found))
    record = {"data": name, "model": model, **found.told}
    return page(f"Data: {masked(name)}", _lead(model, found.told), [body], record)


def _lead(model: str, told: dict[str, Any]) -> Html:
    """How many rows there are, and how grave what was found is."""
    rows = ", ".join(f"{split['rows']:,} rows in {masked(name)}" for name, split in told["splits"].items())
    said = f"{rows}, as the tokenizer of {masked(model)} makes them tokens. "
    counts = Counter(finding["severity"] for finding in told["findings"])
    if not counts:
        return callout("good", said, "Nothing looks wrong.")
    listed = ", ".join(f"{counts[name]} {name}{'s' * (counts[name] > 1)}" for name in SEVERITIES if counts[name])
    gravest = next(name for name in SEVERITIES if counts[name])
    return callout(KINDS[gravest], said, f"What looks wrong: {listed}.")
