"""All kinds of checks, and how one of them is read from what a suite says.

To add a kind:
1. write it in the module of its family: a function of its arguments that gives a `Rule`, with a docstring that says
   when an answer passes, and a line in that module's KINDS;
2. add texts with the right answer to the table of tests/test_checks.py, hostile ones too, and each wrong argument with
   the words of its error.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from mlxtune.errors import did_you_mean
from mlxtune.evaluate.checks import (
    choices,
    code,
    languages,
    numbers,
    own,
    patterns,
    refusing,
    similar,
    structures,
    texts,
    tool_calls,
)
from mlxtune.evaluate.checks.arguments import Arguments, CheckError, Kind, Place
from mlxtune.evaluate.checks.check import Check, Rule, Score, SuiteRow
from mlxtune.evaluate.engines.request import Answer


def _all(arguments: Arguments, place: Place) -> Rule:
    """Each check of a list passes. One number for a prompt instead of several shows more with the same prompts."""
    given = arguments.given.get("all")
    if not isinstance(given, list) or not given:
        raise CheckError("all must be a list of checks")
    rules = []
    for written in given:
        kind, values = _taken_apart(written)
        rule = KINDS[kind].build(Arguments(kind, values, arguments.notes), place)
        if rule.graded:
            raise CheckError(f"{kind} is graded here, and all passes or does not", "Give it `min`, or leave it out.")
        rules.append(rule)

    def judge(answer: Answer, row: SuiteRow) -> Score:
        scores = [rule.judge(answer, row) for rule in rules]
        return None if None in scores else float(all(scores))

    of_reference, of_data = any(rule.of_reference for rule in rules), all(rule.of_data for rule in rules)
    return Rule(judge, of_reference=of_reference, of_data=of_data)


KINDS: dict[str, Kind] = {
    "all": Kind(_all),
    **texts.KINDS,
    **patterns.KINDS,
    **structures.KINDS,
    **numbers.KINDS,
    **choices.KINDS,
    **languages.KINDS,
    **refusing.KINDS,
    **similar.KINDS,
    **tool_calls.KINDS,
    **code.KINDS,
    **own.KINDS,
}


def read_checks(given: Any, place: Place, before: list[Check], notes: dict[str, Counter[str]]) -> list[Check]:
    """The checks of a list, as a row or the settings of a suite have it. before: those that the row has already, from
    which names are numbered on. notes: by the name of a check, shared by all rows. Raises CheckError.
    """
    if not isinstance(given, list):
        raise CheckError(f"checks must be a list, found {type(given).__name__}", 'Such as ["json", {"length": ...}].')
    kinds = Counter(check.name.partition("-")[0] for check in before)
    out = []
    for written in given:
        kind, values = _taken_apart(written)
        kinds[kind] += 1
        name = kind if kinds[kind] == 1 else f"{kind}-{kinds[kind]}"
        of_name = notes.setdefault(name, Counter())
        rule = KINDS[kind].build(Arguments(kind, values, of_name), place)
        out.append(Check(name, rule, of_name))
    return out


def _taken_apart(written: Any) -> tuple[str, dict[str, Any]]:
    """(kind, arguments by name) of a check as it is written. Raises CheckError."""
    if isinstance(written, str):
        written = {written: True}
    if not isinstance(written, dict) or not written or not all(isinstance(key, str) for key in written):
        raise CheckError(f"a check must be a name, or an object with one, found {str(written)[:60]!r}", _all_kinds())
    named = [key for key in written if key in KINDS]
    if not named:
        raise CheckError(f"unknown check {next(iter(written))!r}", did_you_mean(next(iter(written)), KINDS))
    kind = named[0]
    if len(named) > 1:
        raise CheckError(f"{' and '.join(named)} stand in one check", "Make each an object of its own.")
    main, others = written[kind], {key: value for key, value in written.items() if key != kind}
    known = KINDS[kind]
    values = dict(others)
    if main is True or main is None:
        pass
    elif isinstance(main, dict) and not (known.main_is_mapping and not _are_arguments(main, known, kind)):
        for key, value in main.items():
            if key in values:
                raise CheckError(f"{key} of {kind} is given twice")
            values[key] = value
    elif not known.has_main:
        raise CheckError(f"{kind} takes no value of its own, found {str(main)[:60]!r}", _options(kind))
    else:
        values[kind] = main
    allowed = {*known.options, *([kind] if known.has_main else [])}
    unknown = [key for key in values if key not in allowed]
    if unknown:
        raise CheckError(f"{kind} has no argument {unknown[0]!r}", _options(kind))
    return kind, values


def _are_arguments(main: dict[str, Any], known: Kind, kind: str) -> bool:
    """Whether a mapping holds the arguments of a kind, rather than being its main argument."""
    return bool(main) and main.keys() <= {*known.options, kind}


def _options(kind: str) -> str:
    options = KINDS[kind].options
    return f"{kind} takes: {', '.join(options)}." if options else f'Write it as "{kind}".'


def _all_kinds() -> str:
    return f"There are: {', '.join(KINDS)}."
