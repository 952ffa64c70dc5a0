"""Answers by an engine to given prompts (distillation): filtered by rules, and of several the best.

    prompts -> k answers each -> (critique -> revision) -> filters -> checks, majority -> judge -> rows, pairs

Prompts are asked in portions, until as many rows as are wanted are sure; a judge only chooses among what is left, so it
is asked once, at the end, when the engine is not needed any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlxtune_convert.files import json_text, new_file

from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.evaluate.judging.report import Judging
from mlxtune.make.answer_filters import MOST_WORDS, Made, wrong_with
from mlxtune.make.best_of import Narrowed, best_of, contests, kinds_of, narrowed
from mlxtune.make.by_hand import Leaves
from mlxtune.make.critique import critique_prompt, finds_nothing, revision_prompt
from mlxtune.make.folder import PAIRS, UNASKED, VERDICTS, Failed, Making, Rejected, Row, Spent, Yield
from mlxtune.make.guard import Guard
from mlxtune.make.judged import verdicts_on
from mlxtune.make.portions import asked_about, portions

PORTION = 64  # prompts that are asked about at a time, at most: many enough to fill batches


@dataclass(frozen=True)
class WantedAnswers:
    """What is wanted of the answers."""

    # The prompts, with their checks.
    rows: Sequence[SuiteRow]
    # Rows to keep at most; None: one for each prompt.
    count: int | None = None
    # Answers to each prompt, of which the best is kept.
    samples: int = 1
    # Who chooses where rules do not; None: nobody.
    judge: Judging | None = None
    # What is shown to be worse goes into pairs.jsonl.
    pairs: bool = False
    # By which answers are criticised and revised; none: they stay as they are.
    principles: Sequence[str] = ()
    # Words that an answer may have.
    least_words: int = 1
    # Words that an answer may have.
    most_words: int = MOST_WORDS
    # A person writes them: nothing is filtered, and what is empty was skipped.
    by_hand: bool = False
    # A held-out suite that no prompt, and no answer, may be near to.
    guard: Guard = field(default_factory=Guard)


@dataclass(frozen=True)
class Draft:
    """An answer on its way."""

    # The prompt.
    row: SuiteRow
    # As the engine gave it at first.
    first: Answer
    # As it is now.
    answer: Answer
    # What is wrong with the first one; "" where nobody asked.
    critique: str = ""

    @property
    def parents(self) -> dict[str, Any]:
        """What a revised answer was made from, for its row."""
        return {"draft": {"answer": self.first.text, "critique": self.critique}} if self.critique else {}


@dataclass(frozen=True)
class Decided:
    """A prompt of which a row will be kept."""

    # The prompt.
    row: SuiteRow
    # The answers that passed the filters.
    drafts: list[Draft]
    # What the checks and their agreement leave of them.
    found: Narrowed

    @property
    def answers(self) -> list[Answer]:
        return [draft.answer for draft in self.drafts]


def make_answers(making: Making, wanted: WantedAnswers) -> dict[str, Any]:
    """Ask, choose, and write the files of the making. Returns its document."""
    making.guard = wanted.guard
    decided: list[Decided] = []
    total = len(wanted.rows) if wanted.count is None else min(wanted.count, len(wanted.rows))
    stopped = ""
    for portion in _portions(wanted):
        if len(decided) >= total:
            break
        try:
            drafts = _drafts(making, wanted, [row for row in portion if _may_be_asked(making, wanted, row)])
        except Spent as spent:
            stopped = str(spent)
            break
        except Leaves:
            stopped = "the editor was left without saving; the same command goes on"
            break
        for row in portion:
            one = _decided(making, wanted, row, [draft for draft in drafts if draft.row is row])
            if one is not None and len(decided) < total:
                decided.append(one)
                making.counted = len(decided)
    if len(decided) < total:
        stopped = stopped or making.spent
    pairs = _keep_the_best(making, wanted, decided)
    if wanted.pairs and making.out is not None:
        with new_file(making.out / PAIRS, force=True) as file:
            for pair in pairs:
                file.write(json_text(pair) + "\n")
    document = making.finish(Yield("answers", total), stopped)
    thoughts = sum(bool(answer.thought) for one in decided for answer in one.answers)
    if thoughts:
        document["notes"].append(f"{thoughts} answers came after a thought: rows have the answer, the journal both")
    if wanted.pairs:
        document["pairs"] = len(pairs)
    return document


def answer_requests(rows: Sequence[SuiteRow], samples: int) -> list[Request]:
    """What the engine is asked first. The ids are those of the prompts, as an evaluation's: its answers fit."""
    return [Request(row.id, row.messages, None, sample) for row in rows for sample in range(samples)]


def expected_requests(wanted: WantedAnswers) -> int:
    """How many requests there are at most, where every prompt gives a row."""
    rows = len(wanted.rows) if wanted.count is None else asked_about(wanted.count, wanted.rows, PORTION)
    return rows * wanted.samples * (3 if wanted.principles else 1)


def _portions(wanted: WantedAnswers) -> Iterator[Sequence[SuiteRow]]:
    """Of a person one prompt is asked at a time: they may leave after any."""
    return portions(wanted.rows, 1 if wanted.by_hand else PORTION)


def _may_be_asked(making: Making, wanted: WantedAnswers, row: SuiteRow) -> bool:
    """Whether a prompt is asked at all; one that is not is rejected."""
    if row.tools:
        making.reject(Rejected({"id": row.id, "messages": row.messages}, "tools"))
        return False
    why = wanted.guard.why_any(row.messages)
    if why is not None:
        making.reject(Rejected({"id": row.id, "messages": row.messages}, "guarded", why))
    return why is None


def _drafts(making: Making, wanted: WantedAnswers, rows: Sequence[SuiteRow]) -> list[Draft]:
    """The answers to some prompts, revised where that is wanted. What the engine failed at is not there. Raises Spent
    where nothing may be asked any more.
    """
    by_id = {row.id: row for row in rows}
    if not rows:
        return []
    drafts = []
    for one in making.ask(answer_requests(rows, wanted.samples)):
        row = by_id[one.id]
        if isinstance(one, Answer):
            drafts.append(Draft(row, one, _stripped(one)))
        elif one.why != UNASKED:
            making.reject(Rejected({"id": row.id, "sample": one.sample, "messages": row.messages}, "failed", one.why))
    return _revised(making, wanted.principles, drafts) if wanted.principles else drafts


def _revised(making: Making, principles: Sequence[str], drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts after a critique of each, and a revision of those in which it finds something. One that is cut or
    empty stays as it is: the filters say what is wrong with it.
    """
    done: list[Draft] = []
    to_criticise: list[Draft] = []
    to_revise: list[Draft] = []
    for draft in drafts:
        is_whole = draft.first.finish == "stop" and bool(draft.first.text.strip())
        (to_criticise if is_whole else done).append(draft)
    prompts = [critique_prompt(principles, draft.row.messages, draft.first.text) for draft in to_criticise]
    for draft, critique in zip(to_criticise, _follow_ups(making, "critique", to_criticise, prompts), strict=True):
        if critique is None:
            continue
        said = critique.text.strip()
        if critique.finish == "length" or not said:
            making.reject(Rejected(_as_row(draft), "no critique", said))
        elif finds_nothing(said):
            done.append(draft)
        else:
            to_revise.append(replace(draft, critique=said))
    prompts = [revision_prompt(principles, one.row.messages, one.first.text, one.critique) for one in to_revise]
    for draft, answer in zip(to_revise, _follow_ups(making, "revision", to_revise, prompts), strict=True):
        if answer is not None:
            done.append(replace(draft, answer=_stripped(answer)))
    return sorted(done, key=lambda draft: draft.first.sample)


def _follow_ups(
    making: Making, what: str, drafts: Sequence[Draft], prompts: Sequence[list[dict[str, Any]]]
) -> list[Answer | None]:
    """The answers to one more prompt of each draft; None for one that has none. what: the word before their ids."""
    requests = []
    for draft, prompt in zip(drafts, prompts, strict=True):
        requests.append(Request(f"{what} of {draft.row.id}", prompt, None, draft.first.sample))
    if not requests:
        return []
    return [None if isinstance(one, Failed) else one for one in making.ask(requests)]


def _decided(making: Making, wanted: WantedAnswers, row: SuiteRow, drafts: Sequence[Draft]) -> Decided | None:
    """What is left of a prompt's answers after filters, checks and their agreement; None where nothing is."""
    good = []
    for draft in drafts:
        reason, detail = _wrong_with(wanted, draft), ""
        if not reason and (why := wanted.guard.why(draft.answer.text)) is not None:
            reason, detail = "guarded", why
        if reason:
            making.reject(Rejected(_as_row(draft), reason, detail))
        else:
            good.append(draft)
    if not good:
        return None
    if wanted.by_hand:
        return Decided(row, good, Narrowed("a person", [0], []))
    found = narrowed(row, [draft.answer for draft in good], wanted.judge is not None, wanted.samples > 1)
    if found.left:
        return Decided(row, good, found)
    for place, draft in enumerate(good):
        making.reject(Rejected(_as_row(draft), "check" if place in found.failing else found.why))
    return None


def _wrong_with(wanted: WantedAnswers, draft: Draft) -> str:
    """The reason why an answer is not kept; "" for a good one. What a person wrote is good where it is anything."""
    if wanted.by_hand:
        return "" if draft.answer.text.strip() else "skipped"
    may_refuse = "refusal" in kinds_of(draft.row)  # the row's own check wants one
    made = Made(draft.row.messages, draft.answer, wanted.least_words, wanted.most_words, may_refuse)
    return wrong_with(made)


def _keep_the_best(making: Making, wanted: WantedAnswers, decided: Sequence[Decided]) -> list[dict[str, Any]]:
    """Keep the best answer to each prompt, reject the others. Returns the rows of pairs.jsonl."""
    verdicts = None
    if wanted.judge is not None and making.out is not None:
        making.let_go()
        asked = [pair for one in decided for pair in contests(one.row, one.answers, one.found.left)]
        verdicts = verdicts_on(wanted.judge, asked, making.out / VERDICTS)
    pairs = []
    for one in decided:
        best = best_of(one.row, one.answers, one.found, verdicts)
        chosen = one.drafts[best.place]
        made = making.made([one.row.id], "", **best.scores)
        if wanted.samples > 1:
            made["chosen by"] = best.how
        made |= chosen.parents
        making.keep(Row([*one.row.messages, _said(chosen)], made))
        for place, draft in enumerate(one.drafts):
            if place != best.place:
                making.reject(Rejected(_as_row(draft), "check" if place in one.found.failing else "not the best"))
        worse = None if best.worse is None else one.drafts[best.worse]
        if worse is not None and _said(worse) != _said(chosen):  # of two equal texts nobody learns
            shown_by = "checks" if best.worse in one.found.failing else "judge"
            made = {**making.made([one.row.id], "", **best.scores), "shown by": shown_by}
            both = {"chosen": [_said(chosen)], "rejected": [_said(worse)]}
            pairs.append({"prompt": one.row.messages, **both, "made": made})
    return pairs


def _stripped(answer: Answer) -> Answer:
    """As a row has it: checks and judges must see what is learned, not a space before it."""
    return replace(answer, text=answer.text.strip())


def _said(draft: Draft) -> dict[str, Any]:
    return {"role": "assistant", "content": draft.answer.text}


def _as_row(draft: Draft) -> dict[str, Any]:
    """An answer as rejected.jsonl has it."""
    return {"id": draft.row.id, "sample": draft.first.sample, "messages": [*draft.row.messages, _said(draft)]}
