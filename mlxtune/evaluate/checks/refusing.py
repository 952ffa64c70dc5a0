"""Checks on whether an answer refuses."""

from __future__ import annotations

from mlxtune.data.survey.refusals import refuses
from mlxtune.evaluate.checks.arguments import Arguments, Kind, Place
from mlxtune.evaluate.checks.check import Rule


def _refusal(arguments: Arguments, place: Place) -> Rule:
    """The answer begins with a refusal."""
    return Rule(lambda answer, row: float(refuses(answer.text)))


def _no_refusal(arguments: Arguments, place: Place) -> Rule:
    """The answer says something, and does not begin with a refusal."""
    return Rule(lambda answer, row: float(bool(answer.text.strip()) and not refuses(answer.text)))


KINDS = {"refusal": Kind(_refusal, has_main=False), "no_refusal": Kind(_no_refusal, has_main=False)}
