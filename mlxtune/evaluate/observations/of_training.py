"""What shows beside the answers: the data they were learned from, the loss, and what was forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlxtune.data.rows.formats import Record
from mlxtune.data.survey.refusals import refuses
from mlxtune.evaluate.checks.overlap import rouge_l
from mlxtune.evaluate.checks.words import words_of
from mlxtune.evaluate.observations.of_run import of_kind
from mlxtune.evaluate.observations.seen import OFTEN, TWICE, Observation, Seen

FELL = 0.05  # of the validation loss, from which it is said to have fallen
FLAT_PROMPTS = 20  # without which checks that do not move say little
ROOM = 0.95  # mean score from which a check has no room to get better
ALIKE = 0.9  # ROUGE-L from which an answer is a training answer
LEAST_WORDS = 8  # of an answer that may be one: short ones are alike by chance
MOST_TRAINED = 2_000  # training answers that answers are compared with


def observed(seen: Seen) -> Iterator[Observation]:
    yield from _by_heart(seen)
    yield from _style(seen)
    yield from _system(seen)
    yield from _forgets(seen)


def _by_heart(seen: Seen) -> Iterator[Observation]:
    """Answers that are a training answer to another question, where the reference is not."""
    trained = list(_answered(seen.trained))[:MOST_TRAINED]
    texts = [answer for _, answer in trained]
    if not texts:
        return
    found = []
    for row, given in zip(seen.rows, seen.by_row(seen.final), strict=True):
        text = given[0].text
        if len(words_of(text)) < LEAST_WORDS or refuses(text):  # refusals are alike, and an observation of their own
            continue
        alike = rouge_l(text, texts) >= ALIKE
        is_right = rouge_l(row.reference, texts) >= ALIKE if row.reference else alike & False
        question = str(row.messages[-1].get("content") or "").split()
        others = [trained[place][0].split() != question for place in (alike & ~is_right).nonzero()[0]]
        if others and all(others):
            found.append(row.id)
    rate = len(found) / len(seen.rows)
    if rate >= OFTEN and len(found) >= TWICE:
        measure = f"{len(found)} of {len(seen.rows)} answers are the training answer to another question"
        fix = "fewer train.epochs, a smaller lora.rank, more rows; train.neftune_alpha"
        limit = f"{OFTEN:.0%} of the prompts, ROUGE-L {ALIKE:g} or more"
        yield Observation("learned by heart", measure, rate, OFTEN, limit, fix, tuple(found[:5]))


def _answered(records: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """(Question, answer) of every training answer."""
    for record in records:
        question = ""
        for message in record.messages or []:
            if message["role"] == "user":
                question = str(message.get("content") or "")
            elif message["role"] == "assistant" and message.get("content"):
                yield question, str(message["content"])


def _style(seen: Seen) -> Iterator[Observation]:
    """The loss fell, and no check is better for it."""
    losses = [loss for _, loss in of_kind(seen.events, "eval")]
    open_checks = {name: one for name, one in seen.checks.items() if "verdict" in one and one["base"] < ROOM}
    if len(losses) < 2 or not open_checks or len(seen.rows) < FLAT_PROMPTS:
        return
    fell = 1 - min(losses[1:]) / losses[0] if losses[0] > 0 else 0.0
    if fell < FELL or any(one["difference"] > 0 for one in open_checks.values()):
        return
    names = ", ".join(open_checks)
    measure = f"the validation loss fell by {fell:.0%}, and no check rose ({names}; {len(seen.rows)} prompts)"
    fix = "the rows teach how answers sound, not what is checked: fewer and better rows that show it"
    limit = f"the loss fell by {FELL:.0%} or more"
    yield Observation("style without substance", measure, fell, FELL, limit, fix)


def _system(seen: Seen) -> Iterator[Observation]:
    known = {_system_of(record.messages or []) for record in seen.trained}
    if not known:
        return
    strange = [row.id for row in seen.rows if _system_of(row.messages) not in known]
    rate = len(strange) / len(seen.rows)
    if rate < OFTEN or len(strange) < TWICE:
        return
    measure = f"{len(strange)} of {len(seen.rows)} prompts have a system prompt (or none) that no training row has"
    fix = "the same system prompt in both: `system:` in the suite's suite.yaml, or in the rows of data.path"
    limit = f"{OFTEN:.0%} of the prompts"
    yield Observation("system prompt mismatch", measure, rate, OFTEN, limit, fix, tuple(strange[:5]))


def _system_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """In one spacing; "" for none."""
    if messages and messages[0]["role"] in ("system", "developer"):
        return " ".join(str(messages[0].get("content") or "").split())
    return ""


def _forgets(seen: Seen) -> Iterator[Observation]:
    if seen.forgetting is None:
        return
    for flag in seen.forgetting["flagged"]:
        fix = seen.forgetting["fix"]
        yield Observation("narrow: it forgot", flag["measure"], flag["value"], flag["threshold"], flag["limit"], fix)
