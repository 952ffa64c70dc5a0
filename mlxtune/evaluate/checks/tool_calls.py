"""Which tools an answer calls, and whether they are the right ones with the right arguments.

Models write calls in a few ways; special tokens around them may be gone by the time that an answer is judged:

    <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>      Hermes, Qwen; Llama says parameters
    [{"name": "f", "arguments": {"a": 1}}]                           Mistral
    <function=f>{"a": 1}</function>                                  Llama's custom tools
    <function=f><parameter=a>1</parameter></function>                Qwen3-Coder
    [f(a=1)]                                                         Llama 3.2, Gemma: a call of Python
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlxtune.data.rows.tool_calls import parsed_arguments
from mlxtune.evaluate.checks.arguments import Arguments, CheckError, Kind, Place
from mlxtune.evaluate.checks.blocks import blocks_in
from mlxtune.evaluate.checks.check import Rule, Score, SuiteRow
from mlxtune.evaluate.checks.json_texts import values_in
from mlxtune.evaluate.checks.patterns import TOO_SLOW, TooSlow, compiled, found
from mlxtune.evaluate.checks.schemas import Schema
from mlxtune.evaluate.engines.request import Answer

MOST_CALLS = 64  # of one answer
TYPES = {"dict": "object", "float": "number", "tuple": "array"}  # Python's name of a type -> JSON Schema's
_TAGGED = re.compile(r"<function=([\w.:/-]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([\w.-]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_PYTHON = re.compile(r"\[\s*[A-Za-z_][\w.]*\(.*\)\s*\]", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """One call of a tool."""

    name: str  # of the tool
    arguments: dict[str, Any]  # by name


def calls_in(text: str) -> list[Call]:
    """The calls of an answer, in their order; none where it has none."""
    # Up to the last closing: behind it, each opening would be searched for one to the end of the text.
    tagged = [_tagged_call(match) for match in _TAGGED.finditer(text[: _behind_last("</function>", text)])]
    if tagged:
        return tagged[:MOST_CALLS]
    out: list[Call] = []
    for value in values_in(text):
        out += _calls_of(value)
    return (out or _python_calls(text))[:MOST_CALLS]


def _behind_last(closing: str, text: str) -> int:
    """The place behind the last closing of a text; 0 where there is none."""
    place = text.rfind(closing)
    return place + len(closing) if place >= 0 else 0


def _tagged_call(match: re.Match[str]) -> Call:
    name, body = match[1], match[2]
    written = _PARAMETER.findall(body[: _behind_last("</parameter>", body)])
    parameters = {key: _value_of(value) for key, value in written}
    if parameters:
        return Call(name, parameters)
    arguments = next(values_in(body), None)
    return Call(name, arguments if isinstance(arguments, dict) else {})


def _value_of(text: str) -> Any:
    """What a parameter's text is: JSON, where it is that, else text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _calls_of(value: Any) -> Iterator[Call]:
    """The calls that a JSON value holds: an object with a name and arguments, or a list of them."""
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict):
            continue
        function = item["function"] if isinstance(item.get("function"), dict) else item
        name = function.get("name", item.get("function"))
        arguments = function.get("arguments", function.get("parameters"))
        arguments = parsed_arguments(arguments)
        if isinstance(name, str) and isinstance(arguments, dict):
            yield Call(name, arguments)


def _python_calls(text: str) -> list[Call]:
    """Of `[f(a=1), g(b="x")]`, which is read and never run."""
    blocks = [block.text for block in blocks_in(text)]
    for candidate in (text, *blocks):
        match = _PYTHON.search(candidate[: _behind_last("]", candidate)])
        if match is None:
            continue
        try:
            tree = ast.parse(match[0].strip(), mode="eval").body
            assert isinstance(tree, ast.List)
            return [_python_call(node) for node in tree.elts]
        except (SyntaxError, ValueError, AssertionError, RecursionError, MemoryError):
            continue
    return []


def _python_call(node: ast.expr) -> Call:
    """Raises ValueError for what is no call with literal arguments by name."""
    if not isinstance(node, ast.Call) or node.args or any(word.arg is None for word in node.keywords):
        raise ValueError
    return Call(ast.unparse(node.func), {str(word.arg): ast.literal_eval(word.value) for word in node.keywords})


@dataclass(frozen=True)
class Expected:
    """A call that must be made."""

    name: str  # of the tool
    arguments: dict[str, Callable[[Any], bool]]  # name -> whether a value is right
    optional: frozenset[str] = frozenset()  # arguments that may be left away

    def is_met(self, call: Call) -> bool:
        """Raises TooSlow."""
        if call.name != self.name or not call.arguments.keys() <= self.arguments.keys():
            return False
        for name, is_right in self.arguments.items():
            if name not in call.arguments:
                if name not in self.optional:
                    return False
            elif not is_right(call.arguments[name]):
                return False
        return True


def _is_wanted(wanted: Any, value: Any) -> bool:
    """Whether a value is the wanted one, or what {"any": true}, {"in": [...]} or {"regex": "..."} stands for."""
    if isinstance(wanted, dict) and len(wanted) == 1:
        if wanted == {"any": True}:
            return True
        if isinstance(wanted.get("in"), list):
            return any(same(one, value) for one in wanted["in"])
        if isinstance(wanted.get("regex"), str):
            return isinstance(value, str) and found(compiled(wanted["regex"]), value)
    return same(wanted, value)


def _is_possible(allowed: list[Any], value: Any) -> bool:
    """Whether a value is like one of BFCL's. Inside of an object, each key has such a list again."""
    return any(_is_like(one, value) for one in allowed)


def _is_like(one: Any, value: Any) -> bool:
    """As BFCL compares: texts but for capitals, spaces and some signs (its ast_checker.py)."""
    if isinstance(one, str) and isinstance(value, str):
        return _loosely(one) == _loosely(value)
    if isinstance(one, dict) and isinstance(value, dict):
        left_away = [inner for key, inner in one.items() if key not in value]
        given = value.keys() <= one.keys() and all(_is_possible(one[key], inner) for key, inner in value.items())
        return given and all("" in inner for inner in left_away)
    if isinstance(one, list | tuple) and isinstance(value, list | tuple):
        return len(one) == len(value) and all(map(_is_like, one, value))
    return same(one, value)


def _loosely(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal: 1 and 1.0 are, true and 1 are not; the order of keys is nothing."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def _tool_call(arguments: Arguments, place: Place) -> Rule:
    """The answer calls what the row's last answer calls, or {"name": ..., "arguments": {...}}, or a list of them in any
    order; [] for no call. An argument may be {"any": true}, {"in": [...]} or {"regex": "..."}; those named in
    `optional` may be left away. `possible` is the ground_truth of a BFCL row. With `valid`, or where nothing is
    expected: each call names a tool of the row, with arguments that its schema accepts.
    """
    wanted: list[Expected] | None = None
    if arguments.has("tool_call") and arguments.has("possible"):
        raise CheckError("tool_call and possible are both given", "Give one of them.")
    if arguments.has("possible"):
        wanted = _possible(arguments.given["possible"])
    elif arguments.has("tool_call"):
        wanted = _expected(arguments.given["tool_call"], arguments)
    must_be_valid = arguments.flag("valid")
    known = _Tools(arguments.notes)

    def judge(answer: Answer, row: SuiteRow) -> Score:
        expected = wanted
        if expected is None and not must_be_valid and row.calls is not None:
            expected = _of_row(row)
        if expected is None and not row.tools:
            return None
        calls = calls_in(answer.text)
        needs_schema = must_be_valid or expected is None
        if needs_schema and not all(known.accept(call, row.tools or []) for call in calls):
            return 0.0
        if expected is None:
            return float(bool(calls))
        try:
            return float(len(calls) == len(expected) and _all_met(expected, calls))
        except TooSlow:
            arguments.notes[TOO_SLOW] += 1
            return 0.0

    return Rule(judge, of_data=False)


def _expected(given: Any, arguments: Arguments) -> list[Expected]:
    out = []
    optional = frozenset(arguments.texts("optional")) if arguments.has("optional") else frozenset()
    for one in given if isinstance(given, list) else [given]:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str) or one.keys() - {"name", "arguments"}:
            raise CheckError("tool_call must be an object with name and arguments, or a list of them")
        by_name = one.get("arguments", {})
        if not isinstance(by_name, dict):
            raise CheckError(f"the arguments of {one['name']} must be an object, found {type(by_name).__name__}")
        for value in by_name.values():
            if isinstance(value, dict) and len(value) == 1 and isinstance(value.get("regex"), str):
                compiled(value["regex"])
        out.append(Expected(one["name"], _each(_is_wanted, by_name), optional))
    return out


def _each(is_right: Callable[[Any, Any], bool], wanted: dict[str, Any]) -> dict[str, Callable[[Any], bool]]:
    """Name -> whether a value is right, by what is wanted of it."""
    return {name: partial(is_right, value) for name, value in wanted.items()}


def _possible(given: Any) -> list[Expected]:
    """BFCL: [{"f": {"a": [1, 2], "b": ["x", ""]}}]: each argument is one of its values; with "" among them it may be
    left away.
    """
    wrong = CheckError("possible must be a list of {tool: {argument: [values]}}, as BFCL's ground_truth is")
    if not isinstance(given, list):
        raise wrong
    out = []
    for one in given:
        if not isinstance(one, dict) or len(one) != 1:
            raise wrong
        ((name, values),) = one.items()
        if not isinstance(values, dict) or not all(isinstance(value, list) for value in values.values()):
            raise wrong
        optional = frozenset(key for key, value in values.items() if "" in value)
        out.append(Expected(name, _each(_is_possible, values), optional))
    return out


def _of_row(row: SuiteRow) -> list[Expected]:
    out = []
    for call in row.calls or []:
        function = call.get("function", call)
        out.append(Expected(function["name"], _each(same, parsed_arguments(function.get("arguments", {})))))
    return out


def _all_met(expected: list[Expected], calls: list[Call]) -> bool:
    """Whether each expected call can be given a call of its own that meets it.

    Augmenting paths (Kuhn 1955): a call that is taken may be given away by who has it, if that one finds another.
    """
    owner: dict[int, int] = {}  # place of a call -> who has it

    def has_found(one: int, seen: set[int]) -> bool:
        for place, call in enumerate(calls):
            if place in seen or not expected[one].is_met(call):
                continue
            seen.add(place)
            if place not in owner or has_found(owner[place], seen):
                owner[place] = one
                return True
        return False

    return all(has_found(one, set()) for one in range(len(expected)))


class _Tools:
    """The schemas of tools, made once for each."""

    def __init__(self, notes: Counter[str]) -> None:
        self.notes = notes
        self._schemas: dict[str, Schema | None] = {}  # as text -> made; None: it is none

    def accept(self, call: Call, tools: list[dict[str, Any]]) -> bool:
        """Whether a call names one of the tools, with arguments that its schema accepts."""
        for tool in tools:
            function = tool.get("function", tool)
            if function.get("name") == call.name:
                schema = self._schema(function)
                return schema is None or schema.accepts(call.arguments)
        return False

    def _schema(self, function: dict[str, Any]) -> Schema | None:
        parameters = _in_json_types(function.get("parameters") or {})
        key = json.dumps(parameters, sort_keys=True)
        if key not in self._schemas:
            try:
                self._schemas[key] = Schema(parameters, self.notes)
            except CheckError as error:
                self._schemas[key] = None
                self.notes[f"does not check the arguments of {function['name']}, whose schema is none ({error})"] += 0
        return self._schemas[key]


def _in_json_types(schema: Any) -> Any:
    """The schema with JSON Schema's names of types: BFCL's are those of Python."""
    if isinstance(schema, list):
        return [_in_json_types(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _in_json_types(value) for key, value in schema.items()}
    if isinstance(schema.get("type"), str):
        if schema["type"] == "any":
            del out["type"]
        else:
            out["type"] = TYPES.get(schema["type"], schema["type"])
    return out


KINDS = {"tool_call": Kind(_tool_call, ("optional", "possible", "valid"), main_is_mapping=True)}
