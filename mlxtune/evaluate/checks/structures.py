"""Checks on the form of an answer: JSON, JSON of a schema, XML."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any
from xml.parsers import expat

from mlxtune.evaluate.checks.arguments import Arguments, CheckError, Kind, Place
from mlxtune.evaluate.checks.blocks import blocks_in
from mlxtune.evaluate.checks.check import Meanings, Rule, Score, SuiteRow
from mlxtune.evaluate.checks.json_texts import NotJson, find_json, read_json
from mlxtune.evaluate.checks.schemas import Schema
from mlxtune.evaluate.engines.request import Answer

DEEPEST = 200  # elements inside of one another


def _json(arguments: Arguments, place: Place) -> Rule:
    """The whole answer is JSON; with `loose` one fenced block, or the first object or list in it, is enough."""
    read = find_json if arguments.flag("loose") else read_json

    def judge(answer: Answer, row: SuiteRow) -> Score:
        try:
            read(answer.text)
        except NotJson:
            return 0.0
        return 1.0

    return Rule(judge, meanings=_meanings(read))


def _schema(arguments: Arguments, place: Place) -> Rule:
    """The answer is JSON that a JSON Schema (2020-12, unless it names another) accepts: the schema, or a file of it."""
    schema = Schema(_schema_given(arguments, place), arguments.notes)
    read = find_json if arguments.flag("loose") else read_json

    def judge(answer: Answer, row: SuiteRow) -> Score:
        try:
            return float(schema.accepts(read(answer.text)))
        except NotJson:
            return 0.0

    return Rule(judge, meanings=_meanings(read))


def _meanings(read: Callable[[str], Any]) -> Callable[[Answer, SuiteRow], Meanings]:
    """What the JSON of an answer says, however it is spaced and whatever the order of its keys."""

    def meanings(answer: Answer, row: SuiteRow) -> Meanings:
        try:
            return frozenset([json.dumps(read(answer.text), sort_keys=True)])
        except NotJson:
            return frozenset()

    return meanings


def _schema_given(arguments: Arguments, place: Place) -> Any:
    given = arguments.given.get("schema")
    if isinstance(given, dict):
        return given
    name = arguments.text("schema")
    try:
        return read_json(place.read(name).decode("utf-8-sig"))
    except (NotJson, UnicodeDecodeError) as error:
        raise CheckError(f"{name} is not JSON ({error})") from error


def _xml(arguments: Arguments, place: Place) -> Rule:
    """The whole answer is well-formed XML; with `loose` one fenced block is enough. `root` names its first element,
    `elements` those that must be in it.
    """
    loose = arguments.flag("loose")
    root = arguments.text("root", "")
    needed = set(arguments.texts("elements")) if arguments.has("elements") else set()

    def judge(answer: Answer, row: SuiteRow) -> Score:
        candidates = [answer.text.strip()]
        blocks = [block.text.strip() for block in blocks_in(answer.text) if loose and block.is_closed]
        if len(blocks) == 1:
            candidates += blocks
        for text in candidates:
            elements = elements_of(text)
            if elements and (not root or next(iter(elements)) == root) and needed <= elements.keys():
                return 1.0
        return 0.0

    return Rule(judge)


class _Refused(Exception):
    """The XML has what no answer needs."""


def elements_of(text: str) -> Counter[str]:
    """The names of the elements of an XML text, the outermost first; none where it is not well-formed.

    A document type is refused: it can define entities, of which a few lines stand for gigabytes, or for a file.
    """
    found: Counter[str] = Counter()
    depth = 0

    def begin(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        found[name] += 1
        if depth > DEEPEST:
            raise _Refused

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1

    def refuse(*_: Any) -> None:
        raise _Refused

    parser = expat.ParserCreate("UTF-8")
    parser.StartElementHandler, parser.EndElementHandler = begin, end
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(text.encode(), True)
    except (expat.ExpatError, _Refused, UnicodeEncodeError):
        return Counter()
    return found


KINDS = {
    "json": Kind(_json, ("loose",), has_main=False),
    "schema": Kind(_schema, ("loose",), main_is_mapping=True),
    "xml": Kind(_xml, ("loose", "root", "elements"), has_main=False),
}
