"""A survey as one JSON document."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np

from mlxtune.config.resolve import Config
from mlxtune.data.dataset.batches import DEFAULT_ROWS
from mlxtune.data.survey import subjects
from mlxtune.data.survey.split_survey import SplitSurvey

SEVERITIES = ("error", "warning", "note")  # as findings are listed
FEW = 0.01  # a kind of task below this share of the conversations counts as missing
QUANTILES = (5, 25, 50, 75, 95, 99)  # of the lengths, in percent
MOST_ANSWERS = 20  # numbers of answers per row that are listed
BARS = 12  # bins of the histogram, about


def report(splits: dict[str, SplitSurvey], config: Config) -> dict[str, Any]:
    """{"splits": facts by name, "findings": first the errors, then warnings, then notes, the frequent ones first}."""
    findings = []
    for split in splits.values():
        findings += [finding.as_json() for finding in split.findings.values()]
    findings.sort(key=lambda finding: (SEVERITIES.index(finding["severity"]), -finding["count"]))
    return {"splits": {name: _facts(split, config) for name, split in splits.items()}, "findings": findings}


def _facts(split: SplitSurvey, config: Config) -> dict[str, Any]:
    prefix = len(split.prefix) if split.prefix is not None and split.examples > 1 else 0
    turns = {}
    for kind, count in split.kinds.counts.items():
        turns[kind] = {"count": count, "rows": split.kinds.rows[kind]}
    return {
        "file": split.file,
        "sample": split.sample,
        "rows": split.rows,
        "formats": dict(split.formats),
        "outcomes": _most_first(split.outcomes),
        "held_out": split.held_out,
        "examples": split.examples,
        "tokens": split.tokens,
        "supervised_tokens": split.targets,
        "conversations": asdict(split.expansion) if split.expansion.rows else {},
        "turns": turns,
        "preferences": split.preferences.as_json(),
        "lengths": _lengths(split.lengths, config.data.max_tokens),
        "roles": _most_first(split.roles),
        "answers_per_row": {str(answers): count for answers, count in sorted(split.answers.items())[:MOST_ANSWERS]},
        "system_prompts": {
            "distinct": len(split.systems.keys() - {None}),
            "rows_without": split.systems[None],
        },
        "tasks": _most_first(split.tasks),
        "tasks_missing": _missing_tasks(split.tasks, split.english),
        "kinds": _most_first(split.talks),
        "style": split.style.as_json() if split.style.conversations else {},
        "made": _most_first(split.made),
        "scripts": _most_first(split.scripts),
        "shared_prefix_tokens": prefix,
        "shared_prefix_saves": round(_saved_by_prefix(split, prefix, config), 4),
        "steps_per_epoch": _steps_per_epoch(split, config),
    }


def _most_first(counts: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in counts.most_common() if count}


def _missing_tasks(tasks: Counter[str], english: int) -> list[str]:
    """What hardly any question asks for; few conversations say nothing, nor do those that are not English.

    english: conversations that are.
    """
    few = tasks.total() * FEW
    if few < 1 or english * 2 <= tasks.total():
        return []
    return [name for name in subjects.ALL_TASKS if tasks[name] < few]


def _saved_by_prefix(split: SplitSurvey, prefix: int, config: Config) -> float:
    """The share of all tokens that need not be computed where each batch computes the shared prefix once."""
    if not split.tokens:
        return 0.0
    batch = config.train.batch_rows or DEFAULT_ROWS
    return prefix * split.examples * (batch - 1) / batch / split.tokens


def _steps_per_epoch(split: SplitSurvey, config: Config) -> int:
    section = config.train
    if section.batch_tokens:
        per_step = section.batch_tokens * section.accumulate
        known = split.preferences
        tokens = split.tokens - known.whole_tokens + known.computed_tokens  # of a pair what is computed counts
        return -(-tokens * split.trained // max(1, len(split.used_hashes)) // per_step)
    per_step = (section.batch_rows or DEFAULT_ROWS) * section.accumulate
    return -(-split.trained // per_step)


def _lengths(counts: Counter[int], limit: int) -> dict[str, Any]:
    """How long the uncut examples are, in tokens. counts: examples of each length; limit: data.max_tokens."""
    known = sorted(counts.items())
    lengths = np.repeat(np.array([length for length, _ in known], np.int64), [count for _, count in known])
    quantiles, cut_share = {}, 0.0
    if len(lengths):
        quantiles = {str(percent): int(np.quantile(lengths, percent / 100)) for percent in QUANTILES}
        cut_share = float((lengths > limit).mean())
    return {
        "quantiles": quantiles,
        "longest": int(lengths.max(initial=0)),
        "cut_share": cut_share,
        "max_tokens": limit,
        "histogram": _histogram(lengths),
    }


def _histogram(lengths: np.ndarray, bars: int = BARS) -> list[list[int]]:
    """[from, to, examples] of equally wide bins of tokens; the last one holds the few that are far longer.

    lengths: [N]. The width of a bin is 1, 2 or 5 times a power of ten, the smallest that needs fewer than `bars` bins
    up to the usual lengths. For 99 examples of up to 300 tokens and one of 4000: bins of 50, the last from 400 to 4000.
    """
    if not len(lengths):
        return []
    usual = int(min(lengths.max(), 1.3 * np.quantile(lengths, 0.99)))
    width = _bin_width(usual, bars)
    starts = list(range(0, usual + 1, width))
    ends = [start - 1 for start in starts[1:]]
    ends.append(max(int(lengths.max()), starts[-1] + width - 1))
    bins = []
    for start, end in zip(starts, ends, strict=True):
        bins.append([start, end, int(((lengths >= start) & (lengths <= end)).sum())])
    return bins


def _bin_width(usual: int, bars: int) -> int:
    power = 1
    while True:
        for width in (power, 2 * power, 5 * power):
            if usual // width < bars:
                return width
        power *= 10
