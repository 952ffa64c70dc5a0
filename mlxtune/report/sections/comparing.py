"""Runs beside each other: their curves over one another, what they were told otherwise, and what came of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlxtune_convert.sizes import size

from mlxtune.durations import clock
from mlxtune.report import series
from mlxtune.report.comparing.evaluations import side_by_side
from mlxtune.report.comparing.names import names
from mlxtune.report.comparing.settings import MISSING, differing
from mlxtune.report.drawing.plots import Line, curves
from mlxtune.report.drawing.thinning import Point
from mlxtune.report.evaluations import Evaluated, evaluations_of
from mlxtune.report.html import Child, Html, joined, tag
from mlxtune.report.page import Section
from mlxtune.report.run_record import RunRecord, number_of, points_of, read_run
from mlxtune.report.secrets import masked
from mlxtune.report.sections.memory_time import sum_of
from mlxtune.report.tables import callout, table

MOST_RUNS = 6  # on one page: as many as there are colours, and more curves over each other nobody can tell apart
STYLES: tuple[Literal["solid", "dashed", "dotted"], ...] = ("solid", "dashed", "dotted")
LONGEST_VALUE = 300  # letters of a setting's value
UNKNOWN = "-"


@dataclass(frozen=True)
class Other:
    """A run that another one is compared with."""

    record: RunRecord  # what its folder tells
    evaluations: Sequence[Evaluated] = ()  # of the adapter that it holds

    @classmethod
    def read(cls, folder: Path) -> Other:
        """With the evaluations in it and beside it. Raises UserError where the folder is no run at all."""
        return cls(read_run(folder), evaluations_of(folder).evaluations)


def section(record: RunRecord, evaluations: Sequence[Evaluated], others: Sequence[Other]) -> Section | None:
    """None where there is no other run. evaluations: of `record`."""
    if not others:
        return None
    records = [record, *(other.record for other in others)]
    called = names([one.folder for one in records])
    half = series.half_life(max(len(one.train) for one in records))
    training = [series.smoothed(series.stepwise(one.train, "loss"), half) for one in records]
    smoothed = f"Training loss of all runs, running means (half of the weight is on the last {half} steps)"
    units = dict.fromkeys(one.loss_unit for one in records)
    unit = ", or ".join(units)
    body = joined(
        _warnings(called[1:], records[1:]),
        _outcomes(called, records),
        _other_losses(records),
        _other_rows(records),
        _curves("Validation loss of all runs", called, [points_of(one.evaluations, "loss") for one in records], unit),
        _curves(smoothed, called, training, unit),
        _settings(called, [one.config for one in records]),
        side_by_side(called, [evaluations, *(other.evaluations for other in others)]),
    )
    return Section("comparing", f"{len(records)} runs compared", body)


def as_json(record: RunRecord, others: Sequence[Other]) -> list[dict[str, Any]]:
    """The other runs, for programs."""
    records = [other.record for other in others]
    called = names([one.folder for one in (record, *records)])[1:]
    return [
        {
            "name": name,
            "state": one.state,
            "step": one.step,
            "base_loss": one.base_loss,
            "best_loss": None if one.best is None else number_of(one.best, "loss"),
            "warnings": one.warnings,
        }
        for name, one in zip(called, records, strict=True)
    ]


def _warnings(called: Sequence[str], others: Sequence[RunRecord]) -> list[Html]:
    """What is missing of the others; what is of the page's own run stands at its beginning."""
    return [
        callout("warning", f"{name}: {warning}")
        for name, one in zip(called, others, strict=True)
        for warning in one.warnings
    ]


def _outcomes(called: Sequence[str], records: Sequence[RunRecord]) -> Html:
    """A row for each number, a column for each run."""
    rows: list[list[Child]] = [
        ["state", *(one.state for one in records)],
        ["steps", *(f"{one.step:,} of {one.steps:,}" if one.steps else f"{one.step:,}" for one in records)],
        ["validation loss before the first step", *(_loss(one.base_loss) for one in records)],
        ["best validation loss", *(_best(one) for one in records)],
        ["last training loss", *(_last(one) for one in records)],
        *_accuracies(records),
        ["tokens learnt from", *(_sum(one, "supervised_tokens", "{:,.0f}".format) for one in records)],
        ["time in steps", *(_sum(one, "seconds", clock) for one in records)],
        ["most memory", *(_memory(one) for one in records)],
    ]
    return table("What came of each run", ["", *called], rows, numbers=range(1, len(called) + 1))


def _accuracies(records: Sequence[RunRecord]) -> list[list[Child]]:
    """How often the kept adapter of a preference run tells the held-out answers apart; [] where no run is one."""
    found = [None if one.best is None else number_of(one.best, "accuracy") for one in records]
    if not any(value is not None for value in found):
        return []
    return [["accuracy on held-out pairs", *(UNKNOWN if value is None else f"{value:.1%}" for value in found)]]


def _loss(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}"


def _best(record: RunRecord) -> str:
    if record.best is None:
        return UNKNOWN
    return f"{_loss(number_of(record.best, 'loss'))} (step {record.best['step']:,})"


def _last(record: RunRecord) -> str:
    losses = [loss for _, loss in points_of(record.train, "loss") if loss is not None]
    return _loss(losses[-1] if losses else None)


def _sum(record: RunRecord, name: str, written: Any) -> str:
    """The sum of a number of all steps; UNKNOWN where no step has it."""
    if all(number_of(event, name) is None for event in record.train):
        return UNKNOWN
    return str(written(sum_of(record.train, name)))


def _memory(record: RunRecord) -> str:
    peaks = [number for _, number in points_of(record.train, "peak_bytes") if number is not None]
    return size(int(max(peaks))) if peaks else UNKNOWN


def _other_rows(records: Sequence[RunRecord]) -> Html | None:
    """A warning where validation losses are of other rows: the smaller one is not the better one."""
    rows = {one for one in map(_validation_rows, records) if one is not None}
    tokens = {number_of(one.evaluations[-1], "tokens") for one in records if one.evaluations} - {None}
    if len(rows) < 2 and len(tokens) < 2:
        return None
    return callout(
        "warning",
        "The validation losses are not of the same examples (other rows, another template or another tokenizer): "
        "how high they are cannot be compared, only how they go.",
    )


def _other_losses(records: Sequence[RunRecord]) -> Html | None:
    """A warning where losses are of different objectives: they are different numbers."""
    objectives = dict.fromkeys(str(one.setting("preference.loss") or "supervised") for one in records)
    if len(objectives) < 2:
        return None
    return callout(
        "warning",
        f"The runs have different objectives ({', '.join(objectives)}): their losses are different things, and cannot "
        "be compared; accuracies can.",
    )


def _validation_rows(record: RunRecord) -> str | None:
    """The digest of the held-out examples; None: unknown."""
    digests = record.begun.get("digests")
    found = digests.get("valid") if isinstance(digests, Mapping) else None
    return found if isinstance(found, str) else None


def _curves(title: str, called: Sequence[str], points: Sequence[Sequence[Point]], unit: str) -> Html | None:
    """All runs on the same axes, told apart by line styles and by colours; unit: of the values. None where no run has a
    point.
    """
    lines = []
    for number, (name, some) in enumerate(zip(called, points, strict=True)):
        if some:
            lines.append(Line(name, some, STYLES[number % len(STYLES)], number))
    return curves(title, "step", unit, lines) if lines else None


def _settings(called: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> Html:
    """The settings in which runs differ whose configuration is known; of the others that it is not."""
    known = [(name, config) for name, config in zip(called, configs, strict=True) if config]
    notes = [
        callout("warning", f"The settings of {name} are not known.")
        for name, config in zip(called, configs, strict=True)
        if not config
    ]
    if len(known) < 2:
        return joined(notes)
    rows: list[list[Child]] = [
        [key, *map(_value, values)] for key, values in differing([config for _, config in known]).items()
    ]
    if not rows:
        return joined(notes, tag("p", "No setting differs."))
    return joined(notes, table("Settings that differ", ["key", *(name for name, _ in known)], rows))


def _value(value: Any) -> str:
    """A setting for people."""
    if value is MISSING:
        return "no key of its version"
    if value is None or value == "":
        return UNKNOWN
    text = masked(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"
