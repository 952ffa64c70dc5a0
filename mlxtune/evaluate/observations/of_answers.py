"""What the answers themselves show."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator

from mlxtune.data.rows.formats import Record
from mlxtune.data.survey.lint import seems_cut_off
from mlxtune.data.survey.refusals import refuses
from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.checks.on_data import Share as OnData
from mlxtune.evaluate.checks.on_data import checks_on_data
from mlxtune.evaluate.checks.texts import repeats
from mlxtune.evaluate.checks.words import words_of
from mlxtune.evaluate.engines.request import Answer
from mlxtune.evaluate.observations.seen import FREQUENT, LEAST_RISE, OFTEN, ROSE, Observation, Seen, named, share
from mlxtune.evaluate.statistics.proportions import wilson

VERBOSE = 1.5  # times as many words as the reference has, in the median
LEAST_WORDS = 8  # of a reference that an answer's length is held against: "Paris." in a sentence is not verbose
LEAST_PROMPTS = 5  # from which a median or a share of checks is looked at
POOR = 0.5  # share of programs that pass
MIXED = (0.05, 0.95)  # share of answers in a format between which it is neither learned nor left alone
FORMATS = ("json", "schema", "xml", "tool_call")  # kinds of checks that ask for a format

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
# Words with a capital inside a sentence: a small letter, a digit or a comma stands before it.
_NAME = re.compile(r"(?<=[^\W\d_A-Z][ ,] )[A-Z][^\W\d_]+|(?<=[^\W\d_A-Z] )[A-Z][^\W\d_]+")
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
# What chat templates write around turns, where it is no special token of the model and so stands in the answer.
_MARKS = re.compile(
    r"<\|[\w ]{1,30}\|>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>|^#{2,3} (?:Instruction|Response|Input):"
    r"|^(?:User|Human|Assistant|<\w+_turn>):",
    re.MULTILINE,
)


def observed(seen: Seen) -> Iterator[Observation]:
    yield from _refuses(seen)
    yield from _verbose(seen)
    yield from _code(seen)
    yield from _format(seen)
    yield from _invents(seen)
    yield from _repetitive(seen)
    yield from _cut_sentences(seen)
    yield from _template(seen)


def _is_to_be_answered(row: SuiteRow) -> bool:
    """Its reference is no refusal, or a check wants none; where neither is there, a refusal may be right."""
    if any(check.name.startswith("no_refusal") for check in row.checks):
        return True
    return row.reference is not None and not refuses(row.reference)


def _refuses(seen: Seen) -> Iterator[Observation]:
    found = share(seen, lambda answer, row: refuses(answer.text), _is_to_be_answered)
    if not found.rose and not (found.base is None and found.is_frequent):
        return
    refusals = [record.row for record in seen.trained if any(map(refuses, _answers_of(record)))]
    fix = "add rows that answer many kinds of questions (data.sources; `mlxtune data check` names the missing kinds)"
    if refusals:
        fix += f"; {len(refusals)} of {len(seen.trained):,} training rows refuse (rows {named(refusals)})"
    limit, threshold = (FREQUENT, OFTEN) if found.base is None else (ROSE, LEAST_RISE)
    measure = f"refusals of what has an answer: {found.figures}"
    value = found.final - (found.base or 0.0)
    yield Observation("refuses basic questions", measure, value, threshold, limit, fix, found.examples)


def _verbose(seen: Seen) -> Iterator[Observation]:
    ratios, examples = [], []
    for row, given in zip(seen.rows, seen.by_row(seen.final), strict=True):
        words = len(words_of(row.reference or ""))
        if words >= LEAST_WORDS:
            ratio = statistics.fmean(len(words_of(answer.text)) for answer in given) / words
            ratios.append(ratio)
            if ratio > VERBOSE:
                examples.append(row.id)
    fix = "add rows with short answers"
    lengths = [len(words_of(text)) for record in seen.trained for text in _answers_of(record)]
    if lengths:
        fix += f": the median of the training answers is {statistics.median(lengths):.0f} words"
    if len(ratios) >= LEAST_PROMPTS and (ratio := statistics.median(ratios)) > VERBOSE:
        measure = f"answers have {ratio:.1f} times the words of their references (median of {len(ratios)} prompts)"
        limit = f"more than {VERBOSE:g} times"
        yield Observation("too verbose", measure, ratio, VERBOSE, limit, fix, tuple(examples[:5]))
        return
    cut = share(seen, lambda answer, row: answer.finish == "length" and not repeats(answer.text))
    if cut.rose:
        value = cut.final - (cut.base or 0.0)
        measure = f"cut by --max-tokens without a loop: {cut.figures}"
        yield Observation("too verbose", measure, value, LEAST_RISE, ROSE, fix, cut.examples)


def _code(seen: Seen) -> Iterator[Observation]:
    fix = "add rows with programs that run; try those that are there by a suite of them with the check `code`"
    for name, result in seen.checks.items():
        if name.partition("-")[0] != "code" or result["n"] < LEAST_PROMPTS:
            continue
        rate = result[seen.final]
        if rate < POOR or result.get("verdict") == "worse":
            before = "" if seen.final == "base" else f", of the base's {result['base']:.0%}"
            measure = f"{rate:.0%} of the programs for {result['n']} prompts pass {name}{before}"
            failed = tuple(one.id for one in seen.scores if one.check == name and _fails(one.tuned or one.base))[:5]
            limit = f"fewer than {POOR:.0%}, or shown to be worse"
            yield Observation("poor code", measure, rate, POOR, limit, fix, failed)


def _fails(scores: list[float]) -> bool:
    return min(scores) < 1


def _format(seen: Seen) -> Iterator[Observation]:
    checks = {check.name: check for row in seen.rows for check in row.checks}
    for name, result in seen.checks.items():
        if name.partition("-")[0] not in FORMATS or result["graded"] or result["n"] < LEAST_PROMPTS:
            continue
        rate, n = result[seen.final], result["n"]
        on_data = checks_on_data(seen.trained, [checks[name]])
        measure = f"{rate:.0%} of the answers to {n} prompts pass {name}"
        learned = on_data[0].passed / on_data[0].of if on_data and on_data[0].of else None
        if learned is not None:
            measure += f", of the training answers {learned:.0%}"
        is_mixed = MIXED[0] < rate < MIXED[1]
        is_below_data = learned is not None and wilson(rate * n, n)[1] < learned
        if is_mixed or is_below_data:
            limit = f"between {MIXED[0]:.0%} and {MIXED[1]:.0%}, or fewer than of the training answers"
            failed = tuple(one.id for one in seen.scores if one.check == name and _fails(one.tuned or one.base))[:5]
            yield Observation("inconsistent format", measure, rate, MIXED[1], limit, _format_fix(on_data), failed)


def _format_fix(on_data: list[OnData]) -> str:
    fix = "one prompt and one format in all rows; add rows with the cases that fail"
    if on_data and on_data[0].failed:
        fix += f"; mend the training rows that fail themselves (rows {named(on_data[0].failed)})"
    return fix


def _invents(seen: Seen) -> Iterator[Observation]:
    """Numbers and names that stand neither in the prompt nor in the reference."""
    if seen.final == "base":
        return  # nothing says whether that is more than usual
    found = share(seen, _has_unknown, lambda row: bool(row.reference) and "```" not in (row.reference or ""))
    if found.rose:
        value = found.final - (found.base or 0.0)
        measure = f"numbers or names that stand neither in prompt nor reference: {found.figures}"
        fix = (
            "tuning on answers cannot mend this: put the facts into the prompt (retrieval) and check what comes out; "
            "fewer facts in the data that the base does not know teach it less to invent"
        )
        name = "hallucinated numbers or names"
        yield Observation(name, measure, value, LEAST_RISE, ROSE, fix, found.examples)


def _has_unknown(answer: Answer, row: SuiteRow) -> bool:
    given = " ".join(str(message.get("content") or "") for message in row.messages) + " " + (row.reference or "")
    known_words, known_numbers = set(words_of(given)), set(_NUMBER.findall(given))
    text = _CODE.sub(" ", answer.text)
    if any(number not in known_numbers for number in _NUMBER.findall(text)):
        return True
    return any(name.lower() not in known_words for name in _NAME.findall(text))


def _repetitive(seen: Seen) -> Iterator[Observation]:
    found = share(seen, lambda answer, row: repeats(answer.text))
    if found.is_frequent or found.rose:
        measure = f"a passage that repeats without end: {found.figures}"
        fix = (
            "lower train.lr, fewer train.epochs, more varied rows; see whether the end of answers is trained "
            "(`mlxtune data check`: no end)"
        )
        limit = f"{FREQUENT}, or {ROSE}"
        yield Observation("repetitive", measure, found.final, OFTEN, limit, fix, found.examples)


def _cut_sentences(seen: Seen) -> Iterator[Observation]:
    """The model ends answers itself, in the middle: what it learns from rows that were shortened."""
    whole = [row.id for row in seen.rows if not seems_cut_off(row.reference or "")]
    kept = set(whole)
    found = share(
        seen, lambda answer, row: answer.finish == "stop" and seems_cut_off(answer.text), lambda row: row.id in kept
    )
    if found.is_frequent or found.rose:
        measure = f"answers that the model ended inside a sentence: {found.figures}"
        cut = [record.row for record in seen.trained if any(map(seems_cut_off, _answers_of(record)))]
        fix = "raise data.max_tokens: longer rows are shortened (`mlxtune data check` counts them)"
        if cut:
            fix += f"; {len(cut)} training rows end so themselves (rows {named(cut)})"
        limit = f"{FREQUENT}, or {ROSE}"
        yield Observation("truncated learning", measure, found.final, OFTEN, limit, fix, found.examples)


def _template(seen: Seen) -> Iterator[Observation]:
    marks = share(seen, lambda answer, row: bool(_MARKS.search(answer.text)))
    fix = (
        "the same chat template in training and here: `mlxtune data show` prints a row as it is trained, "
        "data.template chooses another one"
    )
    if marks.is_frequent or marks.rose:
        measure = f"marks of a chat template in the text: {marks.figures}"
        limit = f"{FREQUENT}, or {ROSE}"
        yield Observation("wrong template", measure, marks.final, OFTEN, limit, fix, marks.examples)
        return
    endless = share(seen, lambda answer, row: answer.finish == "length")
    if endless.of >= LEAST_PROMPTS and endless.final == 1 and endless.rose:
        measure = f"no answer is ended by the model: {endless.figures}"
        limit = f"all answers are cut, and {ROSE}"
        yield Observation("wrong template", measure, 1.0, 1.0, limit, fix, endless.examples)


def _answers_of(record: Record) -> list[str]:
    messages = record.messages or []
    return [str(message.get("content") or "") for message in messages if message["role"] == "assistant"]
