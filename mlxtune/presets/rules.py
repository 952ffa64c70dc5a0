"""Rules of thumb: what follows from how many rows there are, from what they are for, and from the model's size.

They are where to begin, not what is best: `mlxtune report` says what a run shows, and which key to turn then.

    rows            epochs   rank   ends early
    fewer than 500  3        8      where 3 evaluations in a row are not better
    up to 5,000     2        16     no
    more            1        32     no

Few rows are learned by heart before they are learned from, so their update is small and watched; of many rows each need
come but once. Code and documents hold more to learn than a form or a tone does, so their rank is twice as high.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mlxtune.config.schema import LoraSection, TrainSection
from mlxtune.presets.wanted import Goal, Wanted

FEW, MANY = 500, 5_000  # rows
VERY_FEW = 50  # rows, that no rule helps
MORE_TO_LEARN: frozenset[Goal] = frozenset(("code", "documents"))
SCALE = 2  # lora.alpha over lora.rank
LEAST_RANK = 8  # a smaller update saves next to nothing
# QLoRA's rates (Dettmers et al. 2023, arXiv:2305.14314, table 9): 2e-4 up to 13 billion parameters, 1e-4 from 33 on.
RATE, RATE_OF_LARGE, LARGE = 2e-4, 1e-4, 30e9
# Smaller models want more: in 16 steps one of 135 million parameters came from a validation loss of 3.46 to 2.70 at
# 1e-4, to 1.74 at 8e-4 (benchmarks/results.md, rates of B).
RATE_OF_SMALL, SMALL = 5e-4, 1e9
IN_FULL = 0.1  # the rate of layers that are trained in full (lora.train_also), in that of an update
STEP_ROWS = (16, 8, 4)  # rows of an optimizer step, the first that leaves enough steps
ENOUGH_STEPS = 30
PATIENCE = 3  # evaluations
EVALUATIONS = 8  # of a run, about
LEAST_STEPS = 5  # between two evaluations
WARMUP = 0.1  # of the steps, at most


@dataclass(frozen=True)
class Advice:
    """What the rules say of one run."""

    settings: dict[str, Any]  # section.key -> value; the batches are not among them
    step_rows: int  # rows of an optimizer step
    why: dict[str, str] = field(default_factory=dict)  # section.key -> a sentence
    warnings: list[str] = field(default_factory=list)  # what a person must know, a sentence each


def advice(
    wanted: Wanted, parameters: int, in_full: bool = False, own: Mapping[str, Any] = MappingProxyType({})
) -> Advice:
    """The settings to begin with. parameters: of the model; in_full: whether layers are trained in full as well; own:
    section.key -> value of what was set by hand, from which the rest follows (alpha from the rank, warmup from the
    steps).
    """
    rows = wanted.rows
    if rows < FEW:
        epochs, rank = 3, LEAST_RANK
    elif rows <= MANY:
        epochs, rank = 2, 2 * LEAST_RANK
    else:
        epochs, rank = 1, 4 * LEAST_RANK
    more_to_learn = wanted.goal in MORE_TO_LEARN
    if more_to_learn:
        rank *= 2
    rank = own.get("lora.rank", rank)
    epochs = own.get("train.epochs", epochs)
    step_rows = _step_rows(rows * epochs)
    is_own_step = "train.batch_rows" in own or "train.accumulate" in own
    if is_own_step:
        step_rows = own.get("train.batch_rows", 1) * own.get("train.accumulate", 1)
        if "train.accumulate" not in own:
            step_rows *= max(1, _step_rows(rows * epochs) // step_rows)
    steps = own.get("train.steps", max(1, math.ceil(max(1, -(-rows // step_rows)) * epochs)))
    rate, about_rate = _rate(parameters)
    settings: dict[str, Any] = {
        "lora.rank": rank,
        "lora.alpha": SCALE * rank,
        "train.epochs": epochs,
        "train.lr": rate * IN_FULL if in_full else rate,
    }
    if "train.steps" in own:
        del settings["train.epochs"]
    times = "once" if epochs == 1 else f"{epochs} times"
    why = {
        "lora.rank": f"{rows:,} rows{f' for the goal {wanted.goal}' if more_to_learn else ''}: "
        "more rows, and more to learn of each, take a higher rank.",
        "train.epochs": f"Each of the {rows:,} rows is seen {times}.",
    }
    if about_rate:
        why["train.lr"] = about_rate
    if in_full:
        why["train.lr"] = "Layers that are trained in full (lora.train_also) want a tenth of an adapter's rate."
    if step_rows < STEP_ROWS[0] and not is_own_step:
        why["train.accumulate"] = f"A step has {step_rows} rows: with more, so few rows would give too few steps."
    _set_pace(settings, steps)
    evaluations = steps // max(1, own.get("train.eval_every", settings.get("train.eval_every", 1)))
    is_own_length = "train.steps" in own or "train.epochs" in own
    if rows < FEW and not (is_own_length and evaluations <= PATIENCE):  # of so few none can be one too many
        settings["train.patience"] = PATIENCE
        why["train.patience"] = f"The run ends when {PATIENCE} evaluations in a row are not better."
    return Advice(settings, step_rows, why, _warnings(wanted))


def _rate(parameters: int) -> tuple[float, str]:
    """(the peak learning rate of an adapter, why it is not the usual one; "": it is). parameters: 0 where not known."""
    if 0 < parameters < SMALL:
        return RATE_OF_SMALL, "A model of less than a billion parameters wants a higher rate than larger ones."
    if parameters >= LARGE:
        return RATE_OF_LARGE, "A model of 30 billion parameters and more wants half the usual rate (QLoRA, table 9)."
    return RATE, ""


def _step_rows(rows_seen: int) -> int:
    for size in STEP_ROWS:
        if rows_seen >= ENOUGH_STEPS * size:
            return size
    return STEP_ROWS[-1]


def _set_pace(settings: dict[str, Any], steps: int) -> None:
    """Warmup and evaluations for a run that is too short for the defaults."""
    usual = TrainSection()
    warmup = max(1, int(WARMUP * steps))
    if warmup < usual.warmup_steps:
        settings["train.warmup_steps"] = warmup
    between = max(LEAST_STEPS, steps // EVALUATIONS)
    if between < usual.eval_every:
        settings["train.eval_every"] = between


def _warnings(wanted: Wanted) -> list[str]:
    found = []
    if wanted.rows < VERY_FEW:
        found.append(
            f"{wanted.rows} rows are very few: the model will repeat them rather than learn from them. Some hundred "
            "are a beginning (`mlxtune make` makes more)."
        )
    elif wanted.rows < FEW:
        found.append(
            f"{wanted.rows} rows are few, so overfitting is likely: the training loss goes on falling while the "
            "validation loss rises. The best adapter is kept, but more rows help more than any setting."
        )
    if wanted.goal == "documents":
        found.append(
            "Tuning teaches how to answer, and facts only roughly: where answers must be right, have the document in "
            "the prompt as well."
        )
    return found


def differing(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of some settings that are not the schema's defaults."""
    defaults = {"lora": LoraSection(), "train": TrainSection()}
    kept = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        if section not in defaults or getattr(defaults[section], name) != value:
            kept[key] = value
    return kept
