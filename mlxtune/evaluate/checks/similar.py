"""Checks that compare an answer with a reference by how much they have in common."""

from __future__ import annotations

from mlxtune.evaluate.checks.arguments import Arguments, Kind, Place
from mlxtune.evaluate.checks.check import Rule, Score, SuiteRow
from mlxtune.evaluate.checks.overlap import chrf, rouge_l
from mlxtune.evaluate.engines.request import Answer

MEASURES = ["rouge-l", "chrf"]


def _similar(arguments: Arguments, place: Place) -> Rule:
    """How much the answer has in common with a text, or with the reference: `by` words in their order (rouge-l) or
    letters (chrf), from 0 to 1. With `min`: whether it is at least that.
    """
    given = arguments.texts("similar") if arguments.has("similar") else []
    measure = arguments.word("by", MEASURES, "rouge-l")
    least = arguments.number("min", 0, 0, 1) if arguments.has("min") else None

    def judge(answer: Answer, row: SuiteRow) -> Score:
        texts = given or ([] if row.reference is None else [row.reference])
        if not texts:
            return None
        if measure == "chrf":
            value = max(chrf(answer.text, text) for text in texts)
        else:
            value = float(rouge_l(answer.text, texts).max())
        return value if least is None else float(value >= least)

    return Rule(judge, graded=least is None, of_reference=not given)


KINDS = {"similar": Kind(_similar, ("by", "min"))}
