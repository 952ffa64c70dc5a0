"""The checks of a suite, asked of training answers: a model can hardly be more consistent than what it learns from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.messages import WEIGHTS
from mlxtune.data.rows.readers import Bad
from mlxtune.evaluate.checks.check import Check, SuiteRow
from mlxtune.evaluate.checks.words import without_thought
from mlxtune.evaluate.engines.request import Answer


@dataclass
class Share:
    """How many training answers pass a check."""

    check: str  # its name
    passed: float = 0.0  # how many do; the sum of their scores where it is graded
    of: int = 0  # how many it was asked of
    failed: list[int] = field(default_factory=list)  # rows whose answer does not

    def __str__(self) -> str:
        passed = f"{self.passed:,.0f}" if self.passed == int(self.passed) else f"{self.passed:,.1f}"
        return f"of {self.of:,} training answers {passed} pass {self.check}"


def checks_on_data(records: Iterable[Record | Bad], checks: Sequence[Check]) -> list[Share]:
    """The share of answers that pass each of a suite's checks for all rows: those that look at an answer alone.

    What compares an answer with a reference is left out (here the answer is the reference), and so is what a training
    answer cannot show, such as whether it was ended. Texts, rows that cannot be read, answers without weight and those
    that only call tools are none.
    """
    shares = {check.name: Share(check.name) for check in checks if check.rule.of_data and not check.rule.of_reference}
    for record in records:
        if isinstance(record, Bad) or record.messages is None:
            continue
        for place, message in enumerate(record.messages):
            unlearned = any(message.get(name) == 0 for name in WEIGHTS)
            if message["role"] != "assistant" or not message["content"] or unlearned:
                continue
            row = SuiteRow(f"{record.row}.{place}", record.messages[:place], record.tools)
            answer = Answer(row.id, 0, without_thought(str(message["content"])), "", "stop", 0)
            for check in checks:
                if check.name in shares and (score := check.score(answer, row)) is not None:
                    shares[check.name].passed += score
                    shares[check.name].of += 1
                    if score < 1:
                        shares[check.name].failed.append(record.row)
    return list(shares.values())
