"""What a making will ask and how long that will take, before it is begun."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.make.engine import Opened

MEASURED = 8  # requests that are answered to measure how long one takes, at most


@dataclass(frozen=True)
class Estimate:
    """What is to be expected of a making."""

    # Requests, about.
    requests: int
    # Tokens of all answers, about: those of the measured answers, else as many as an answer may have.
    tokens: int
    # Whether answers were measured.
    measured: int
    # About how long; None where nothing was measured.
    seconds: float | None


def estimate(engine: Opened, first: Sequence[Request], requests: int, most_tokens: int) -> Estimate:
    """first: the requests that will be asked first; requests: how many in all, about; most_tokens: of an answer.

    Only a model on this machine is asked: a server's answers may cost money.
    """
    if engine.kind != "model" or not first:
        return Estimate(requests, requests * most_tokens, 0, None)
    answering = engine()
    batch = answering.plan(first[:MEASURED])[0]
    began = time.perf_counter()
    answers: list[Answer] = answering.answers([first[place] for place in batch])
    took = time.perf_counter() - began
    tokens = sum(answer.tokens for answer in answers)
    each = requests / len(answers)
    return Estimate(requests, round(tokens * each), len(answers), took * each)
