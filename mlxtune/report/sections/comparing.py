"""Runs beside each other: their curves over one another, what they were told otherwise, and what came of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

from mlxtune_convert.sizes import size

from mlxtune.durations import clock
from mlxtune.evaluate.comparison.folder import Evaluation
from mlxtune.report.comparing.evaluations import side_by_side
from mlxtune.report.comparing.names import names
from mlxtune.report.comparing.outcome import Outcome, outcome
from mlxtune.report.comparing.settings import MISSING, differing
from mlxtune.report.drawing.plots import Line, curves
from mlxtune.report.html import Child, Html, joined, tag
from mlxtune.report.page import Section
from mlxtune.report.run_record import RunRecord
from mlxtune.report.secrets import masked
from mlxtune.report.tables import callout, table
from mlxtune.train.events import Event

MOST_RUNS = 6  # on one page: as many as there are colours, and more curves over each other nobody can tell apart
STYLES: tuple[Literal["solid", "dashed", "dotted"], ...] = ("solid", "dashed", "dotted")
LONGEST_VALUE = 300  # letters of a setting's value


def section(
    record: RunRecord, others: Sequence[RunRecord], evaluations: Sequence[Sequence[Evaluation]] = ()
) -> Section | None:
    """None where there is no other run. evaluations: those of each run, of `record` first."""
    if not others:
        return None
    records = [record, *others]
    called = names([one.folder for one in records])
    outcomes = [outcome(one.events) for one in records]
    body = joined(
        _outcomes(called, records, outcomes),
        _other_rows(outcomes),
        _curves("Validation loss of all runs", called, [_losses(one.events, "eval") for one in records]),
        _curves("Loss of the training steps of all runs, smoothed", called, [_smoothed(one.events) for one in records]),
        _settings(called, [one.config for one in records]),
        side_by_side(called, evaluations) if evaluations else None,
    )
    return Section("comparing", f"{len(records)} runs compared", body)


def _outcomes(called: Sequence[str], records: Sequence[RunRecord], outcomes: Sequence[Outcome]) -> Html:
    """A row for each number, a column for each run."""
    rows: list[list[Child]] = [["state", *(one.state for one in records)]]
    rows.append(["steps", *(_steps(one) for one in outcomes)])
    rows.append(["best validation loss", *(_best(one) for one in outcomes)])
    rows.append(["last training loss", *(_loss(one.train_loss) for one in outcomes)])
    rows.append(["tokens learnt from", *("-" if one.tokens is None else f"{one.tokens:,}" for one in outcomes)])
    rows.append(["time in steps", *("-" if one.seconds is None else clock(one.seconds) for one in outcomes)])
    rows.append(["most memory", *("-" if one.peak_bytes is None else size(one.peak_bytes) for one in outcomes)])
    return table("What came of each run", ["", *called], rows, numbers=range(1, len(called) + 1))


def _steps(one: Outcome) -> str:
    if one.steps is None:
        return "-"
    return str(one.steps) if one.planned is None else f"{one.steps} of {one.planned}"


def _best(one: Outcome) -> str:
    return "-" if one.best_loss is None else f"{_loss(one.best_loss)} (step {one.best_step})"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _other_rows(outcomes: Sequence[Outcome]) -> Html | None:
    """A warning where validation losses are of other rows: the smaller one is not the better one."""
    counts = {one.valid_tokens for one in outcomes if one.valid_tokens is not None}
    if len(counts) < 2:
        return None
    return callout(
        "warning",
        "The validation losses are not of the same tokens (other rows, another template or another tokenizer): their "
        "sizes cannot be compared, their courses can.",
    )


def _validation(record: RunRecord) -> list[Point]:
    return points_of(record.evaluations, "loss")


def _training(record: RunRecord) -> list[Point]:
    """Smoothed, all runs alike: by how many steps is a matter of the longest of them."""
    return series.smoothed(series.stepwise(record.train, "loss"), series.half_life(len(record.train)))


def _curves(title: str, called: Sequence[str], points: Sequence[Sequence[tuple[float, float]]]) -> Html | None:
    """All runs on the same axes; told apart by line styles and by colours. None where no run has a point."""
    lines = [
        Line(name, some, STYLES[number % len(STYLES)], number)
        for number, (name, some) in enumerate(zip(called, points, strict=True))
        if some
    ]
    return curves(title, "step", "loss (nats a token)", lines) if lines else None


def _settings(called: Sequence[str], configs: Sequence[dict[str, Any]]) -> Html:
    unknown = [name for name, config in zip(called, configs, strict=True) if not config]
    found = differing([config for config in configs if config])
    rows: list[list[Child]] = []
    for key, values in found.items():
        shown = iter(values)
        rows.append([tag("code", key), *(_value(next(shown)) if config else "not known" for config in configs)])
    notes = [callout("warning", f"{name}: its configuration cannot be read.") for name in unknown]
    if not rows:
        return joined(notes, tag("p", "No setting differs between runs whose configuration is known."))
    return joined(notes, table("Settings that differ", ["", *called], rows))


def _value(value: Any) -> Html:
    if value is MISSING:
        return tag("span", "not there", class_="dim")
    text = masked(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return tag("code", text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…")
