"""What the tasks' own metrics say of each row, as scores that are compared like those of any check.

A check is named BENCHMARK:METRIC, and BENCHMARK:METRIC:FILTER where the task looks at an answer in several ways
(gsm8k:exact_match:strict-match).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxtune.evaluate.benchmarks.package import quiet
from mlxtune.evaluate.benchmarks.tasks import Part
from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.comparison.scores import PromptScores, Side
from mlxtune.evaluate.engines.request import Answer

PER_BYTE = "log_likelihood_per_byte"  # of a text, in nats; more is better


@dataclass
class Measured:
    """One side's scores."""

    scores: dict[tuple[str, str], float] = field(default_factory=dict)  # (id of the prompt, the check's name) -> score
    answers: list[Answer] = field(default_factory=list)  # to the prompts, for people
    left_out: set[str] = field(default_factory=set)  # metrics that are no score of a row


def measure(parts: Sequence[Part], answers: Mapping[str, Answer]) -> Measured:
    """answers: of one side, by the request's id."""
    measured = Measured()
    for part in parts:
        by_place: dict[int, list[Any]] = {}
        for instance in part.task.instances:
            answer = answers[f"{part.id_of(instance.doc_id)}#{instance.idx}"]
            instance.resps = [_response(instance, answer)]
            instance.filtered_resps = {}
            by_place.setdefault(instance.doc_id, []).append(instance)
        with quiet():
            part.task.apply_filters()
            for place, instances in by_place.items():
                instances.sort(key=lambda one: one.idx)
                _measure_row(measured, part, part.id_of(place), instances)
                measured.answers.append(_for_people(part.id_of(place), instances, answers))
    return measured


def joined(measured: Mapping[Side, Measured]) -> list[PromptScores]:
    """Both sides beside each other; a row that one of them has no score of is left out."""
    base, tuned = measured["base"].scores, measured["tuned"].scores if "tuned" in measured else None
    values = [*base.items(), *(tuned or {}).items()]
    graded = {check for (_, check), value in values if value not in (0.0, 1.0)}
    found = []
    for (id, check), value in base.items():
        if tuned is None or (id, check) in tuned:
            other = None if tuned is None else [tuned[id, check]]
            found.append(PromptScores(id, check, check in graded, None, [value], other))
    return found


def prompts_of(parts: Sequence[Part]) -> list[SuiteRow]:
    """What was asked, for the record."""
    rows = []
    for part in parts:
        seen = set()
        for instance in part.task.instances:
            if instance.doc_id in seen:
                continue
            seen.add(instance.doc_id)
            messages = [{"role": "user", "content": instance.args[0]}]
            rows.append(
                SuiteRow(part.id_of(instance.doc_id), messages, reference=_target(part, instance), tags=[part.name])
            )
    return rows


def _response(instance: Any, answer: Answer) -> Any:
    """As lm_eval expects it of a model."""
    if instance.request_type == "generate_until":
        return answer.text
    value, is_greedy = json.loads(answer.text)
    return (value, is_greedy) if instance.request_type == "loglikelihood" else value


def _measure_row(measured: Measured, part: Part, id: str, instances: Sequence[Any]) -> None:
    higher = part.task.higher_is_better()
    for name in instances[0].filtered_resps:
        results = part.task.process_results(instances[0].doc, [one.filtered_resps[name] for one in instances])
        for metric, value in results.items():
            number = _number(value) if higher.get(metric, True) else None
            if instances[0].request_type == "loglikelihood_rolling" and metric == "byte_perplexity":
                metric, number = PER_BYTE, value[0] / max(1, value[1])
            check = f"{part.benchmark}:{metric}" + (f":{name}" if name != "none" else "")
            if number is None or not math.isfinite(number):
                measured.left_out.add(check)
            else:
                measured.scores[id, check] = number


def _number(value: Any) -> float | None:
    """None for what is no score of one row, as pairs are that a metric adds up over all rows first."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _for_people(id: str, instances: Sequence[Any], answers: Mapping[str, Answer]) -> Answer:
    """The text that was made, or the choice that was found most likely."""
    first = instances[0]
    if first.request_type == "generate_until":
        made = answers[f"{id}#0"]
        return Answer(id, 0, made.text, "", made.finish, made.tokens)
    if first.request_type == "loglikelihood_rolling":
        return Answer(id, 0, answers[f"{id}#0"].text, "", "stop", 0)
    best = max(instances, key=lambda one: one.resps[0][0])
    return Answer(id, 0, best.args[1].strip(), "", "stop", 0)


def _target(part: Part, instance: Any) -> str | None:
    with quiet():
        target = part.task.doc_to_target(instance.doc)
        choices = part.task.doc_to_choice(instance.doc) if part.task.config.doc_to_choice is not None else None
    if isinstance(target, int) and choices is not None and 0 <= target < len(choices):
        return str(choices[target])
    return None if isinstance(target, list) else str(target)
