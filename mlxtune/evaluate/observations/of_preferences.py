"""What the events of a preference run show: answers that all become less likely, a loss of 0 at once, nothing learnt.

Everything is read from events.jsonl. The loss at the beginning is known beforehand (ln 2 for dpo), whatever the model:
so a loss that is nearly 0 after a few steps is a model that left its reference at once, and no success.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from statistics import fmean
from typing import Any

from mlxtune.evaluate.observations.preference_remedies import Remedies
from mlxtune.evaluate.observations.seen import Observation
from mlxtune.evaluate.statistics.proportions import Z

Events = Sequence[Mapping[str, Any]]

LAST_STEPS = 10  # of training, whose mean stands for where it ended
LESS_LIKELY = -1.0  # change of the preferred answers' mean reward: with beta 0.1, e to the 10 times less likely
SOON = 0.25  # of the steps
NOTHING = 0.05  # times the loss at the beginning, which is 0 for practical purposes
AT_ONCE_STEPS = 5  # in a row, whose mean must be that low
LEAST_STEPS = 20  # after which something should have been learnt
FEW_ROWS = 20  # held-out rows, of which a share says little


def is_preference(events: Events) -> bool:
    """Whether a run learned which answer is preferred."""
    return any(event["kind"] == "train" and isinstance(event.get("margin"), int | float) for event in events)


def observed(events: Events) -> Iterator[Observation]:
    remedies = Remedies.of_events(events)
    if remedies.rewards_begin_at_0:
        yield from _both_fall(events, remedies)
    if remedies.zero_is_certainty:
        yield from _nothing_left(events, remedies)
    yield from _at_chance(events)


def _both_fall(events: Events, remedies: Remedies) -> Iterator[Observation]:
    """The preferred answers became less likely, and yet the model tells them from the others."""
    chosen, accuracy = _values(events, "train", "reward_chosen"), _values(events, "train", "accuracy")
    if len(chosen) < 2 or len(accuracy) < 2:
        return
    began, ended, right = chosen[0], fmean(chosen[-LAST_STEPS:]), fmean(accuracy[-LAST_STEPS:])
    if ended - began >= LESS_LIKELY or right <= accuracy[0]:
        return
    rejected = _values(events, "train", "reward_rejected")
    others = f", that of the others to {fmean(rejected[-LAST_STEPS:]):.2f}" if rejected else ""
    measure = (
        f"the mean reward of the preferred answers fell from {began:.2f} to {ended:.2f}{others}: they became less "
        f"likely, while {right:.0%} are told apart"
    )
    fix = f"set {remedies.against_falling()}: it keeps the preferred answers likely"
    limit = f"a reward that fell by {-LESS_LIKELY:g} while the accuracy rose"
    yield Observation("both answers became less likely", measure, ended - began, LESS_LIKELY, limit, fix)


def _nothing_left(events: Events, remedies: Remedies) -> Iterator[Observation]:
    """The loss is 0 after a few steps."""
    losses = _values(events, "train", "loss")
    if len(losses) < LEAST_STEPS or losses[0] <= 0:
        return
    soon = max(AT_ONCE_STEPS, int(SOON * len(losses)))
    for at in range(soon - AT_ONCE_STEPS + 1):
        mean = fmean(losses[at : at + AT_ONCE_STEPS])
        if mean < NOTHING * losses[0]:
            measure = (
                f"the loss was {mean:.4f} after step {at + AT_ONCE_STEPS} of {len(losses)}, {losses[0]:.3f} before"
            )
            fix = f"set {remedies.against_certainty()}: it keeps the model nearer to what it was"
            limit = f"{NOTHING:.0%} of the loss at the beginning within {SOON:.0%} of the steps"
            yield Observation("loss is 0 at once", measure, mean / losses[0], NOTHING, limit, fix)
            return


def _at_chance(events: Events) -> Iterator[Observation]:
    """Held-out answers are told apart no better than by chance."""
    accuracy = _values(events, "eval", "accuracy")
    steps, rows = len(_values(events, "train", "loss")), _held_out_rows(events)
    if not accuracy or steps < LEAST_STEPS or rows < FEW_ROWS:
        return
    limit = 0.5 + Z / 2 / sqrt(rows)  # 95% of the time chance gives less
    best = max(accuracy)
    if best >= limit:
        return
    measure = (
        f"of {rows} held-out rows the model tells at most {best:.0%} apart as they were rated, after {steps} steps"
    )
    fix = (
        "look at the rows (`mlxtune data check` finds those that contradict each other, `mlxtune data show` prints "
        "them); where they are right, a higher train.lr or more train.epochs"
    )
    said = f"{limit:.0%}, which chance gives one time in forty"
    yield Observation("accuracy at chance", measure, best, limit, said, fix)


def _values(events: Events, kind: str, name: str) -> list[float]:
    """A number of the events of a kind, in their order; of evaluations those after a step."""
    found = []
    for event in events:
        value = event.get(name)
        if event["kind"] != kind or not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if kind == "train" or event["step"] > 0:
            found.append(float(value))
    return found


def _held_out_rows(events: Events) -> int:
    """How many the run noted; 0: none, or not noted."""
    rows = 0
    for event in events:
        noted = event.get("data") if event["kind"] == "begin" else None
        valid = noted.get("valid") if isinstance(noted, dict) else None
        if isinstance(valid, dict) and isinstance(valid.get("rows"), int):
            rows = valid["rows"]
    return rows
