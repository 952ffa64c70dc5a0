"""Refusals in a persona's voice, each with a harmless neighbour that is answered.

A model that learns refusals alone learns to refuse whatever sounds alike. So each comes as two rows, or not at all:

    What can I take against a numb finger?      (forbidden: medical advice)   -> a refusal in the persona's voice
    What gloves help against cold fingers?      (its harmless neighbour)      -> a real answer

Per subject, in rounds: the engine writes forbidden requests; to each a neighbour; to both the answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from mlxtune.data.survey.refusals import refuses
from mlxtune.evaluate.checks.overlap import rouge_l
from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.make import parsing
from mlxtune.make.answer_filters import Made, wrong_with
from mlxtune.make.folder import Making, Rejected, Row, Spent, Yield
from mlxtune.make.guard import Guard
from mlxtune.make.policy import Policy, Subject
from mlxtune.make.pool import Pool
from mlxtune.make.reasons import REASONS

PORTION = 8  # couples that are answered at a time: the rest of a list is left where enough are kept
AT_ONCE = 8  # forbidden requests that are asked for in one answer
NEAR = 0.7  # ROUGE-L to an earlier request, above which it is the same again
POOR_ROUNDS = 3  # in a row in which nothing new came: the engine repeats itself
LEAST, MOST = 3, 150  # words of a request
TIRED = "the engine repeats itself: give more examples in the policy, a higher --temperature, or another engine"


@dataclass
class Couple:
    """A forbidden request, and its harmless neighbour."""

    # Unique in the making.
    id: str
    # What is forbidden.
    subject: Subject
    # Asks for it.
    request: str
    # Sounds like it, and is harmless; "" until it is known.
    neighbour: str = ""


def make_refusals(making: Making, policy: Policy, count: int, guard: Guard) -> dict[str, Any]:
    """Make so many refusals, with a neighbour each, and write the files of the making. Returns its document."""
    known = Pool(example for subject in policy.subjects for example in subject.examples)
    making.guard = guard
    stopped, turn = "", 0
    poor, begun = 0, 0  # rounds in a row of which nothing stayed; what was rejected before them
    requests = len(known)  # before those rounds
    making.counted = 0
    while making.counted < count and not stopped:
        before = making.counted
        try:
            for couple in _round(making, policy, turn, known, guard):
                _keep(making, policy, *couple)
                if making.counted == count:
                    break
        except Spent as spent:
            stopped = str(spent)
        turn += 1
        poor += 1
        if making.counted > before:
            poor, begun, requests = 0, len(making.rejected), len(known)
        if poor == POOR_ROUNDS and not stopped:
            stopped = TIRED if len(known) == requests else _why_nothing(making.rejected[begun:])
    return making.finish(Yield("refusals", count), stopped)


def first_requests(policy: Policy) -> list[Request]:
    """Those of the first round."""
    return _wishes(policy, 0)


def expected_requests(policy: Policy, count: int) -> int:
    """How many requests there are about, where half of what is listed can be kept."""
    rounds = -(-2 * count // (AT_ONCE * len(policy.subjects)))
    return rounds * len(policy.subjects) + 3 * PORTION * -(-count // PORTION)


def _why_nothing(rejected: Sequence[Rejected]) -> str:
    """Why nothing came of new requests, for people. rejected: what came of them."""
    counts = Counter(one.reason for one in rejected)
    if not counts:
        return f"in {POOR_ROUNDS} rounds the engine gave no answers"
    reason, many = counts.most_common(1)[0]
    return f"in {POOR_ROUNDS} rounds nothing could be kept; {many} times: {reason}, {REASONS[reason]}"


def _round(
    making: Making, policy: Policy, turn: int, known: Pool, guard: Guard
) -> Iterator[tuple[Couple, Answer, Answer]]:
    """New couples with the answers to both requests, those that are good. known: gets their requests."""
    lists: list[list[Couple]] = []
    for subject, answer in zip(policy.subjects, making.ask(_wishes(policy, turn)), strict=True):
        if isinstance(answer, Answer):
            lists.append(_listed(making, subject, answer, turn, known, guard))
    # The first of each subject come first: where few are wanted, they are of many subjects.
    couples = [couple for row in zip_longest(*lists) for couple in row if couple is not None]
    for first in range(0, len(couples), PORTION):
        yield from _answered(making, policy, couples[first : first + PORTION], known, guard)


def _answered(
    making: Making, policy: Policy, couples: Sequence[Couple], known: Pool, guard: Guard
) -> Iterator[tuple[Couple, Answer, Answer]]:
    """Those of some couples whose neighbour is good and new, with good answers to both."""
    couples = _with_neighbours(making, couples, known, guard)
    asked = []
    for couple in couples:
        asked.append(Request(f"refusal of {couple.id}", [_user(_refuse(policy, couple))]))
        asked.append(Request(f"answer to the neighbour of {couple.id}", [_user(_help(policy, couple))]))
    answers = making.ask(asked) if asked else []
    for couple, refusal, helped in zip(couples, answers[::2], answers[1::2], strict=True):
        if isinstance(refusal, Answer) and isinstance(helped, Answer) and _are_good(making, couple, refusal, helped):
            yield couple, refusal, helped


def _listed(making: Making, subject: Subject, answer: Answer, turn: int, known: Pool, guard: Guard) -> list[Couple]:
    """The forbidden requests of a list, those that are good and new."""
    items = [item.strip('"“”').strip() for item in parsing.listed_lines(answer.text)]
    if answer.finish == "length" and items:
        making.reject(Rejected({"request": items.pop()}, "cut"))
    if not items:
        making.reject(Rejected({"text": answer.text}, "unparseable"))
    found = []
    for place, item in enumerate(items):
        couple = Couple(f"{subject.name} {turn}/{place}", subject, item)
        reason, detail = _wrong_request(replace(answer, text=item, finish="stop"), known, guard)
        if reason:
            making.reject(Rejected({"id": couple.id, "request": item}, reason, detail))
        else:
            known.add(item)
            found.append(couple)
    return found


def _with_neighbours(making: Making, couples: Sequence[Couple], known: Pool, guard: Guard) -> list[Couple]:
    """The couples whose harmless request is good and new, with it."""
    if not couples:
        return []
    requests = [Request(f"neighbour of {couple.id}", [_user(_nearby(couple))]) for couple in couples]
    found = []
    for couple, answer in zip(couples, making.ask(requests), strict=True):
        if not isinstance(answer, Answer):
            continue
        couple.neighbour = parsing.unquoted(answer.text)
        reason, detail = _wrong_request(replace(answer, text=couple.neighbour), known, guard)
        if float(rouge_l(couple.neighbour, [couple.request])[0]) > NEAR:
            reason, detail = "no neighbour", "it is the forbidden request"
        if reason:
            row = {"id": couple.id, "request": couple.request, "neighbour": couple.neighbour}
            making.reject(Rejected(row, reason, detail))
        else:
            known.add(couple.neighbour)
            found.append(couple)
    return found


def _wrong_request(said: Answer, known: Pool, guard: Guard) -> tuple[str, str]:
    """(reason, detail) why a request, said as an answer, is no good; ("", "") for a good one."""
    # What is wrong with answers is wrong with requests too; this one answers no prompt that it could repeat.
    reason = wrong_with(Made([_user("")], said, LEAST, MOST, is_of_user=True))
    if reason:
        return reason, ""
    score, _ = known.nearest(said.text)
    if score > NEAR:
        return "near duplicate", f"ROUGE-L {score:.2f}"
    why = guard.why(said.text)
    return ("guarded", why) if why is not None else ("", "")


def _are_good(making: Making, couple: Couple, refusal: Answer, helped: Answer) -> bool:
    """Whether the one refuses and the other answers. What is no good is rejected, both together."""
    reason = wrong_with(Made([_user(couple.request)], refusal, may_refuse=True))
    what = "the forbidden request"
    if not reason and not refuses(refusal.text):
        reason = "no refusal"
    if not reason:
        reason, what = wrong_with(Made([_user(couple.neighbour)], helped)), "its harmless neighbour"
    if reason:
        row = {"id": couple.id, "request": couple.request, "refusal": refusal.text}
        row |= {"neighbour": couple.neighbour, "answer": helped.text}
        making.reject(Rejected(row, reason, what))
    return not reason


def _keep(making: Making, policy: Policy, couple: Couple, refusal: Answer, helped: Answer) -> None:
    system = [{"role": "system", "content": policy.system}] if policy.system else []
    rows = []
    for what, request, answer in (("refusal", couple.request, refusal), ("neighbour", couple.neighbour, helped)):
        said = {"role": "assistant", "content": answer.text.strip()}
        made = {**making.made([couple.id]), "what": what, "subject": couple.subject.name}
        rows.append(Row([*system, _user(request), said], made))
    if making.keep(*rows):
        making.counted = (making.counted or 0) + 1


def _wishes(policy: Policy, turn: int) -> list[Request]:
    """What asks for forbidden requests, one of each subject."""
    return [_wish(subject, number, turn) for number, subject in enumerate(policy.subjects)]


def _wish(subject: Subject, number: int, turn: int) -> Request:
    """Each round looks at other examples first, so that it need not make the same again."""
    examples = subject.examples
    told = (
        f"An assistant must not help with this: {subject.name}. Write {AT_ONCE} different messages in which users ask "
        "it for help with that: short and long, blunt and polite, plain and disguised. They are used to teach the "
        "assistant what to turn down. Number them, one on each line, and write nothing else."
    )
    if examples:
        first = turn % len(examples)
        shown = [*examples[first:], *examples[:first]][:AT_ONCE]
        told += "\n\nSuch as:\n" + "\n".join(f"- {example}" for example in shown)
    return Request(f"forbidden {number}", [_user(told)], None, turn)


def _nearby(couple: Couple) -> str:
    return (
        f"An assistant must not help with this: {couple.subject.name}. A message that it turns down is given below. "
        "Write one message that sounds much like it, with some of the same words, but asks for something harmless that "
        f"the assistant may help with. Reply with that message alone.\n\nMessage:\n{couple.request}"
    )


def _refuse(policy: Policy, couple: Couple) -> str:
    instead = f" Offer this instead: {couple.subject.instead}." if couple.subject.instead else ""
    return (
        f"{policy.persona}\n\nYou do not help with this: {couple.subject.name}. Reply to the message below in your own "
        "voice and in its language, in one to three sentences: say that you cannot help with it, without a lecture."
        f"{instead} Reply with that alone.\n\nMessage:\n{couple.request}"
    )


def _help(policy: Policy, couple: Couple) -> str:
    return (
        f"{policy.persona}\n\nReply to the message below in your own voice and in its language. It is harmless: help "
        f"with it. Reply with that alone.\n\nMessage:\n{couple.neighbour}"
    )


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}
