"""One check, made of what a suite says, and asked about a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxtune.evaluate.checks.arguments import Place
from mlxtune.evaluate.checks.check import Check, SuiteRow
from mlxtune.evaluate.checks.kinds import read_checks
from mlxtune.evaluate.checks.sandbox.sandbox import Programs
from mlxtune.evaluate.engines.request import Answer

HERE = Path(__file__).resolve().parent
QUESTION = "Which city is it?\nA) London\nB) Paris\nC) Paris, Texas\nD) Rome"
ROW = SuiteRow("1", [{"role": "user", "content": QUESTION}], reference="B")


def answer_of(text: str, **others: Any) -> Answer:
    return Answer("1", 0, text, "", others.get("finish", "stop"), others.get("tokens", 9))


def check_of(written: Any) -> Check:
    (check,) = read_checks([written], Place(HERE, Programs()), [], {})
    return check


def score(written: Any, text: str, row: SuiteRow = ROW, **others: Any) -> float | None:
    return check_of(written).score(answer_of(text, **others), row)
