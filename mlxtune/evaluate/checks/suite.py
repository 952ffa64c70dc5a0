"""Reads a suite: a file of prompts, with what is right about the answers to them.

Any row that training reads is a prompt with a reference: the conversation up to its last answer, and that answer. More
keys, all optional:

    {"id": "r12", "messages": [...], "reference": "...", "tags": ["returns"], "group": "ticket-7",
     "checks": [{"schema": "reply.schema.json"}, {"contains": ["refund"], "any": true}, {"length": {"max_words": 60}}]}

What holds for all rows stands in a file of the same name that ends in .yaml, or in suite.yaml beside it:

    system: You answer for a shop.      # of rows that have no system prompt
    checks: [json, no_repeat]           # before each row's own
    rubric: Prefer short answers.       # for a judge
    columns: {question: prompt, answer: completion}      # the file's name of a column: the name meant
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxtune.config.yaml_text import parse_yaml
from mlxtune.data.rows.formats import Record, parse, require_good, without_pairs
from mlxtune.data.rows.readers import Bad, place, raw_rows
from mlxtune.errors import UserError, did_you_mean, nearest
from mlxtune.evaluate.checks.arguments import CheckError, Place
from mlxtune.evaluate.checks.check import Check, SuiteRow
from mlxtune.evaluate.checks.kinds import read_checks
from mlxtune.evaluate.checks.layouts import as_usual
from mlxtune.evaluate.checks.sandbox.sandbox import Programs
from mlxtune.evaluate.checks.shipped import suite_file
from mlxtune.evaluate.checks.words import without_thought
from mlxtune.evaluate.engines.request import Answer

SETTINGS = ("checks", "system", "rubric", "columns")  # of a suite's YAML file
RUNNING = ("code", "python")  # kinds that run something: they are not tried on the references


@dataclass(frozen=True)
class Suite:
    """Prompts, and what is right about the answers to them."""

    path: Path  # of the file of rows
    rows: list[SuiteRow]  # in its order; at least one
    rubric: str  # what a judge is told; "" for nothing
    digest: str  # SHA-256 of the file, its settings and the files that checks name, in hexadecimal
    notes: list[str]  # what must be told before anything is run
    of_checks: dict[str, Counter[str]] = field(default_factory=dict)  # name of a check -> its notes
    common: list[Check] = field(default_factory=list)  # those of its settings, with which the checks of each row begin

    @property
    def names(self) -> dict[str, bool]:
        """The checks' names, in the order in which rows have them -> whether they are graded."""
        found: dict[str, bool] = {}
        for row in self.rows:
            for check in row.checks:
                found.setdefault(check.name, check.graded)
        return found

    def told(self) -> list[str]:
        """What must be told of the results so far, one sentence for each check and thing."""
        out = []
        for name, notes in self.of_checks.items():
            for what, count in notes.items():
                times = f" ({count} time{'s' if count != 1 else ''})" if count else ""
                out.append(f"{name} {what}{times}")
        return out


def read_suite(path: Path, programs: Programs | None = None, expecting: bool = True) -> Suite:
    """A suite. path: of its file, or the name of one that comes with mlxtune; programs: whether checks may run
    programs, None: they may not; expecting: checks must know what to expect. Where answers are counted and none is
    known to be right, one such as `number` may lack it: it then says None of every answer. Raises UserError, which
    names the row.
    """
    path = suite_file(path)
    settings, settings_file = _settings(path)
    of_checks: dict[str, Counter[str]] = {}
    where = Place(path.parent, programs or Programs())
    common: list[Check] = []
    if "checks" in settings:
        try:
            common = read_checks(settings["checks"], where, [], of_checks)
        except CheckError as error:
            raise UserError(f"{settings_file}: {error}", error.hint) from error
    rows: list[SuiteRow] = []
    places: dict[str, int] = {}  # id -> its row
    for record in _records(path, settings.get("columns", {})):
        rows.append(_row(record, settings, common, where, of_checks, places, expecting))
    files = [path, *([settings_file] if settings_file else [])]
    digest = hashlib.sha256()
    for content in (*(file.read_bytes() for file in files), *where.files.values()):
        digest.update(hashlib.sha256(content).digest())
    suite = Suite(path, rows, settings.get("rubric", ""), digest.hexdigest(), [], of_checks, common)
    _require_one_meaning(suite)
    suite.notes.extend(_about_references(suite, common if expecting else []))
    return suite


def read_prompts(path: Path) -> list[list[dict[str, Any]]]:
    """The prompts of a suite alone, whatever its checks would need. path: as `read_suite` takes it; so are errors."""
    path = suite_file(path)
    settings, _ = _settings(path)
    prompts = []
    for record in _records(path, settings.get("columns", {})):
        spot = f"{record.file} {place(record.file, record.row)}"
        messages, _ = _prompt_and_answer(record, spot)
        later = _texts(record.fields.get("turns"), "turns", spot)
        prompts.append([*messages, *({"role": "user", "content": text} for text in later)])
    return prompts


def _settings(path: Path) -> tuple[dict[str, Any], Path | None]:
    """What the YAML file beside a suite says, and that file; None where there is none."""
    stem = path.name.partition(".")[0]
    for file in (path.with_name(f"{stem}.yaml"), path.with_name("suite.yaml")):
        if file.is_file():
            break
    else:
        return {}, None
    try:
        found = parse_yaml(file.read_text(encoding="utf-8-sig"), str(file)).value or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: must be a mapping", f"Its keys: {', '.join(SETTINGS)}.")
    for key, value in found.items():
        if key not in SETTINGS:
            raise UserError(f"{file}: unknown key {key}", did_you_mean(str(key), SETTINGS))
        if key in ("system", "rubric") and not isinstance(value, str):
            raise UserError(f"{file}: {key} must be a text, found {type(value).__name__}")
    columns = found.get("columns", {})
    if not isinstance(columns, dict) or not all(isinstance(name, str) for name in columns.values()):
        raise UserError(f"{file}: columns must be a mapping of the file's names to those that are meant")
    return found, file


def _records(path: Path, columns: dict[str, str]) -> Iterator[Record]:
    """The rows of a file as conversations. Raises UserError for those that cannot be read."""
    bad: list[Bad] = []
    total = 0
    try:
        for record in without_pairs(parse(str(path), _usual_rows(path, columns))):
            total += 1
            if isinstance(record, Bad):
                bad.append(record)
            elif record.messages is None:
                bad.append(Bad(str(path), record.row, "a row of text has no prompt and no answer"))
            elif not bad:
                yield record
        require_good(bad, total)
    except UserError as error:
        raise UserError(error.message, _hint_of_suites(error.hint)) from None


def _hint_of_suites(hint: str) -> str:
    """What to do about rows that cannot be read, where training's own hint names its settings or its commands."""
    if "data check" in hint:
        return "Mend these rows, or remove them."
    return re.sub(r"Rename columns with --set 'data\.columns=(.*)'", r"In suite.yaml beside it: `columns: \1`", hint)


def _usual_rows(path: Path, columns: dict[str, str]) -> Iterator[tuple[int, dict[str, Any]] | Bad]:
    unseen = set(columns)
    for item in raw_rows(path):
        if isinstance(item, Bad):
            yield item
            continue
        number, raw = item
        unseen -= raw.keys()
        renamed = {columns.get(key, key): value for key, value in raw.items()}
        try:
            yield number, as_usual(renamed)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            yield Bad(str(path), number, f"its columns are those of a benchmark, but not its values ({error})")
    if unseen:
        raise UserError(f"{path}: no row has the column {', '.join(sorted(unseen))} that the suite's columns name")


def _row(
    record: Record,
    settings: dict[str, Any],
    common: list[Check],
    where: Place,
    of_checks: dict[str, Counter[str]],
    places: dict[str, int],
    expecting: bool,
) -> SuiteRow:
    """One row; `places` gets its id. expecting: as `read_suite` takes it. Raises UserError, which names it."""
    spot = f"{record.file} {place(record.file, record.row)}"
    fields = record.fields
    if "checks" not in fields and (typo := next((key for key in fields if nearest(key, ["checks"], 0.8)), "")):
        raise UserError(f"{spot}: unknown key {typo}", "Did you mean checks?")
    row_id = _id(record, places, spot)
    messages, answer = _prompt_and_answer(record, spot)
    if settings.get("system") and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": settings["system"]}, *messages]
    reference = _text_or_number(fields.get("reference"), "reference", spot)
    if reference is None and answer is not None and answer["content"]:
        reference = without_thought(str(answer["content"]))
    try:
        own = read_checks(fields.get("checks") or [], where, common, of_checks)
    except CheckError as error:
        raise UserError(f"{spot}: {error}", error.hint) from error
    row = SuiteRow(
        id=row_id,
        messages=messages,
        tools=record.tools,
        reference=reference,
        checks=[*common, *own],
        tags=_texts(fields.get("tags"), "tags", spot),
        group=_text_or_number(fields.get("group"), "group", spot),
        calls=answer.get("tool_calls") if answer is not None else None,
        turns=_texts(fields.get("turns"), "turns", spot),
        turn_references=_texts(fields.get("turn_references"), "turn_references", spot),
    )
    for check in own if expecting else []:
        if check.rule.of_reference and (reference is None or check.score(_as_answer(row), row) is None):
            missing = "has no reference" if reference is None else "has a reference that it cannot be compared with"
            raise UserError(f"{spot}: the check {check.name} is given nothing to expect, and the row {missing}")
    return row


def _id(record: Record, places: dict[str, int], spot: str) -> str:
    given = _text_or_number(record.fields.get("id"), "id", spot)
    name = given if given is not None else str(record.row)
    if given is None and places.get(name) == record.row:  # a row of several conversations
        number = 2
        while f"{name}-{number}" in places:
            number += 1
        name = f"{name}-{number}"
    if name in places:
        raise UserError(f"{spot}: the id {name} is that of {place(record.file, places[name])} already")
    places[name] = record.row
    return name


def _prompt_and_answer(record: Record, spot: str) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """What comes before the last answer, and that answer; None where the row ends with a question, or with an empty
    answer.
    """
    messages = list(record.messages or [])
    answer = None
    if messages[-1]["role"] == "assistant":
        answer = messages.pop()
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise UserError(f"{spot}: no question stands before the last answer")
    if answer is not None and not answer["content"] and not answer.get("tool_calls"):
        answer = None
    return messages, answer


def _text_or_number(value: Any, key: str, spot: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise UserError(f"{spot}: {key} must be a text, found {str(value)[:60]!r}")
    return str(value)


def _texts(value: Any, key: str, spot: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f"{spot}: {key} must be a list of texts, found {str(value)[:60]!r}")
    return value


def _as_answer(row: SuiteRow) -> Answer:
    """The reference, as if a model had given it."""
    return Answer(row.id, 0, row.reference or "", "", "stop", 0)


def _require_one_meaning(suite: Suite) -> None:
    """Raise UserError for a check that is graded in some rows alone: no statistics holds for both."""
    for row in suite.rows:
        for check in row.checks:
            if check.graded != suite.names[check.name]:
                raise UserError(
                    f"{suite.path}: the check {check.name} is graded in some rows, and true or false in others",
                    "Give `min` (similar) or `graded` (python) in all of them, or in none.",
                )


def _about_references(suite: Suite, common: list[Check]) -> list[str]:
    """How many rows a check of all rows cannot be asked of, and where a reference fails its own check. Raises UserError
    for a check of all rows that can be asked of none.
    """
    out = []
    without: Counter[str] = Counter()
    failed: dict[str, list[str]] = {}
    before = {name: Counter(notes) for name, notes in suite.of_checks.items()}
    for row in suite.rows:
        for check in row.checks:
            if check.name.partition("-")[0] in RUNNING or not check.rule.of_data or check.graded:
                continue
            score = check.score(_as_answer(row), row)
            if score is None:
                without[check.name] += 1
            elif score == 0.0 and row.reference is not None:
                failed.setdefault(check.name, []).append(row.id)
    for name, notes in suite.of_checks.items():  # what was noted here is not of a model's answers
        notes.clear()
        notes.update(before[name])
    total = len(suite.rows)
    for check in common:
        if check.rule.of_reference and without[check.name] == total:
            raise UserError(
                f"{suite.path}: the check {check.name} needs a reference to compare with, and no row has one"
            )
        if without[check.name]:
            out.append(f"{check.name} can be asked of {total - without[check.name]} of {total} rows")
    for name, ids in failed.items():
        named = ", ".join(ids[:5]) + (" ..." if len(ids) > 5 else "")
        rows = "row" if len(ids) == 1 else "rows"
        out.append(f"{name}: in {len(ids)} {rows} the reference itself does not pass: {named}")
    return out
