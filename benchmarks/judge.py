"""How a model does in the exam that every judge has to pass, on the questions of the demo.

    python benchmarks/judge.py MODEL [SUITE]

Prints one JSON document: the exam's figures, how often each label was the likeliest, and the tokens that went through
the model against those of all its prompts. Results that were measured stand in benchmarks/judge.md.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mlxtune.evaluate.checks.suite import read_suite
from mlxtune.evaluate.engines.request import Messages
from mlxtune.evaluate.judging.exam import examine
from mlxtune.evaluate.judging.judge import Probabilities
from mlxtune.evaluate.judging.local import LocalJudge
from mlxtune.machine import backend
from mlxtune.model.load import Loaded, load

DEMO = Path(__file__).resolve().parent.parent / "mlxtune" / "demo" / "data" / "test.jsonl"


class Watched(LocalJudge):
    """Keeps what it said, and counts the tokens of its prompts."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        self.said: Counter[str] = Counter()  # label -> how often it was the likeliest
        self.asked = 0  # tokens of all prompts

    def label_probabilities(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[Probabilities | None]:
        replies = super().label_probabilities(prompts, labels)
        for prompt, reply in zip(prompts, replies, strict=True):
            self.asked += len(self._as_asked(prompt, labels)[0])
            if reply is not None:
                self.said[labels[reply.index(max(reply))]] += 1
        return replies


def main() -> None:
    backend.prepare()
    suite = read_suite(Path(sys.argv[2]) if len(sys.argv) > 2 else DEMO)
    judge = Watched(load(sys.argv[1]))
    began = time.perf_counter()
    exam = examine(judge, suite.rows)
    figures = {
        "model": sys.argv[1],
        "prompts": len(suite.rows),
        "exam": exam.as_json(),
        "likeliest": dict(judge.said),
        "tokens_of_prompts": judge.asked,
        "tokens_computed": judge.model.tokens,
        "seconds": round(time.perf_counter() - began, 1),
        "notes": judge.notes,
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
