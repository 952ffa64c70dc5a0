"""The sections on evaluations, in their order, and the page of one evaluation that has no run."""

from __future__ import annotations

from collections.abc import Sequence

from mlxtune.report.evaluations import Evaluated, without_secrets
from mlxtune.report.html import joined, tag
from mlxtune.report.page import Section, page
from mlxtune.report.sections import answers, benchmarks, better, checks, forgetting, judge, observations, safety
from mlxtune.report.sections.one_by_one import sides_line, title_of


def sections(evaluations: Sequence[Evaluated], with_answers: bool = True) -> list[Section]:
    """with_answers: what the models said is shown as well."""
    found = [
        answers.section(evaluations) if with_answers else None,
        checks.section(evaluations),
        judge.section(evaluations),
        forgetting.section(evaluations),
        safety.section(evaluations),
        benchmarks.section(evaluations),
    ]
    return [section for section in found if section is not None]


def page_of(evaluation: Evaluated, with_answers: bool = True) -> str:
    """The whole page of one evaluation, as `mlxtune eval --html` writes it."""
    evaluation = without_secrets(evaluation)
    said = better.lead([evaluation])
    alone = tag("p", "One model alone was asked: nothing is compared.")
    lead = joined(
        tag("p", sides_line(evaluation.summary)), said if said else alone, observations.lead(None, [evaluation])
    )
    shown = [*sections([evaluation], with_answers), observations.section(None, [evaluation])]
    return page(f"Evaluation {title_of(evaluation)}", lead, shown, {"evaluation": dict(evaluation.summary)})
