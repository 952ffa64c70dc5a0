"""The curves of a preference run beside its loss: accuracy, margin and rewards, in training and on held-out rows.

A reward is what the objective wants to be large for a good answer; a margin, the chosen answer's minus the rejected
one's; accuracy, the share of pairs that are told apart, by what the objective compares (`train.preference.tally`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlxtune.config.preference import WITHOUT_REFERENCE
from mlxtune.report.drawing.figure import Mark
from mlxtune.report.drawing.plots import Line, curves
from mlxtune.report.drawing.thinning import Point
from mlxtune.report.html import Html, joined, tag
from mlxtune.report.run_record import RunRecord
from mlxtune.report.series import half_life, of_held_out, smoothed

FROM_REFERENCE = (
    "Rewards say how much likelier an answer became since the run began: above 0 it is likelier now, below 0 less "
    "likely. What a run is after is the distance of the two; where both fall, the chosen answers are forgotten too."
)
FROM_MODEL = (
    "This objective has no reference: a reward is the answer's log-probability per token, times beta. What a run is "
    "after is the distance of the two."
)


def preferred(record: RunRecord, series: Mapping[str, Sequence[Point]]) -> Html | None:
    """None for a run without them. series: the curves' points, as `series.of_run` gives them."""
    half = half_life(len(record.train))
    begins_at_0 = record.setting("preference.loss") not in WITHOUT_REFERENCE
    marks = [Mark("at the beginning: 0", None, 0.0)] if begins_at_0 else []
    drawn = []
    accuracy = _lines(series, "accuracy", "in training", half, factor=100)
    if accuracy:
        title = "How often the chosen answer is preferred"
        drawn.append(curves(title, "step", "percent", accuracy, [Mark("chance: 50", None, 50.0)]))
    margin = _lines(series, "margin", "in training", half)
    if margin:
        drawn.append(curves("Margin between chosen and rejected", "step", "reward", margin, marks))
    rewards = _lines(series, "reward_chosen", "chosen", half)
    rewards += _lines(series, "reward_rejected", "rejected", half, rank=2)
    if rewards:
        said = FROM_REFERENCE if begins_at_0 else FROM_MODEL
        drawn.append(curves("Rewards of both sides", "step", "reward", rewards, marks))
        drawn.append(tag("p", said, class_="dim"))
    return joined(*drawn) if drawn else None


def _lines(
    series: Mapping[str, Sequence[Point]], name: str, called: str, half: int, factor: float = 1, rank: int = 0
) -> list[Line]:
    """The running mean of a number of the steps, and the same number on held-out rows. factor: it is drawn times that;
    rank: of the first one's colour.
    """
    lines = []
    if series.get(name):
        lines.append(Line(f"{called}, running mean", _times(smoothed(series[name], half), factor), "solid", rank))
    if series.get(of_held_out(name)):
        lines.append(Line(f"{called}, held-out rows", _times(series[of_held_out(name)], factor), "points", rank + 1))
    return lines


def _times(points: Sequence[Point], factor: float) -> list[Point]:
    return [(step, None if value is None else factor * value) for step, value in points]
