"""The section of curves: loss, learning rate, gradient norm, speed and memory, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlxtune.report.drawing.figure import Mark
from mlxtune.report.drawing.plots import Line, curves
from mlxtune.report.drawing.thinning import Point
from mlxtune.report.html import Html, joined, tag
from mlxtune.report.page import Section
from mlxtune.report.run_record import RunRecord, number_of
from mlxtune.report.sections.preferences import preferred
from mlxtune.report.series import checks_of, half_life
from mlxtune.report.tables import folded

GIGABYTE = 1e9  # as `mlxtune_convert.sizes` counts
MUCH = 5.0  # the highest loss over the lowest: where it is more, the low ones can be told apart on a logarithmic scale
MOST_CHECKS = 12  # that are drawn: colours and styles are not enough for more
STYLES = ("solid", "dashed")


def section(record: RunRecord, series: Mapping[str, Sequence[Point]]) -> Section | None:
    """series: the curves' points, as `series.of_run` gives them."""
    if not record.train and not record.evaluations:
        return None
    drawn = [_loss(record, series), preferred(record, series), _checks(record, series)]
    smaller = [
        _alone("Learning rate", "rate", series["lr"]),
        _norm(record, series["grad_norm"]),
        _alone("Speed", "tokens of rows a second", series["tokens_per_second"]),
        _memory(record, series["peak_bytes"]),
    ]
    there = [one for one in smaller if one is not None]
    return Section("curves", "Curves", joined(drawn, tag("div", there, class_="pair") if there else None))


def _loss(record: RunRecord, series: Mapping[str, Sequence[Point]]) -> Html:
    half = half_life(len(record.train))
    lines = [
        Line("training", series["loss"], "faint"),
        Line(f"training, running mean (half of its weight is on the last {half} steps)", series["smoothed_loss"]),
        Line("held-out rows", series["validation"], "points", rank=1),
    ]
    lines = [line for line in lines if line.points]
    marks = _loss_marks(record)
    values = [value for line in lines for _, value in line.points if value is not None]
    log = None
    if values and min(values) > 0 and max(values) > MUCH * min(values):
        drawn = curves("Loss, logarithmic", "step", record.loss_unit, lines, marks, log=True)
        log = folded("The same on a logarithmic scale", drawn)
    return joined(curves("Loss", "step", record.loss_unit, lines, marks), log)


def _loss_marks(record: RunRecord) -> list[Mark]:
    """Where the run went on, the best step, and what the loss was before."""
    begins = sorted({event["step"] for event in record.of_kind("begin") if event["step"] > 0})
    marks = [Mark(f"went on after step {step:,}", step, None) for step in begins[-5:]]
    if record.base_loss is not None:
        marks.append(Mark(f"before the first step: {record.base_loss:.4f}", None, record.base_loss))
    if record.best is not None:
        step, loss = record.best["step"], number_of(record.best, "loss")
        marks.append(Mark(f"best: {loss:.4f} at step {step:,}", step, loss))
    return marks


def _checks(record: RunRecord, series: Mapping[str, Sequence[Point]]) -> Html | None:
    """What the checks of train.sample_prompts said during the run."""
    names = checks_of(record)
    lines = []
    for rank, name in enumerate(names[:MOST_CHECKS]):
        points = [(step, None if value is None else 100 * value) for step, value in series[f"check {name}"]]
        lines.append(Line(name, points, "solid" if rank < MOST_CHECKS // 2 else "dashed", rank))
    if not lines:
        return None
    more = len(names) - len(lines)
    said = tag("p", f"{more} more checks are in events.jsonl.", class_="dim") if more else None
    return joined(curves("Checks of train.sample_prompts during the run", "step", "percent", lines), said)


def _alone(title: str, y: str, points: Sequence[Point], marks: Sequence[Mark] = ()) -> Html | None:
    if not any(value is not None for _, value in points):
        return None
    return curves(title, "step", y, [Line(title.lower(), points)], marks)


def _norm(record: RunRecord, points: Sequence[Point]) -> Html | None:
    clip = record.setting("train.clip_norm")
    values = [value for _, value in points if value is not None]
    marks = []
    if isinstance(clip, int | float) and clip > 0 and values and clip < 2 * max(values):
        marks = [Mark(f"clipped to {clip:g}", None, clip)]
    return _alone("Gradient norm", "before clipping", points, marks)


def _memory(record: RunRecord, points: Sequence[Point]) -> Html | None:
    predicted = number_of(record.begun, "predicted_bytes")
    marks = [] if predicted is None else [Mark(f"predicted: {predicted / GIGABYTE:.3g}", None, predicted / GIGABYTE)]
    scaled = [(step, None if value is None else value / GIGABYTE) for step, value in points]
    return _alone("Peak of memory so far", "gigabytes", scaled, marks)
