"""Tool calls however they are written, functions of the user, and arguments of checks that are refused."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from checking import HERE, ROW, answer_of, check_of, score

from mlxtune.evaluate.checks.arguments import CheckError, Place
from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.checks.kinds import read_checks
from mlxtune.evaluate.checks.sandbox.sandbox import Programs
from mlxtune.evaluate.checks.tool_calls import same

TOOLS = [{
    "type": "function",
    "function": {
        "name": "book",
        "parameters": {
            "type": "dict",  # as BFCL writes it
            "properties": {"day": {"type": "string"}, "seats": {"type": "integer"}},
            "required": ["day"],
        },
    },
}]  # fmt: skip
CALL = {"name": "book", "arguments": {"day": "Monday", "seats": 2}}
CALLS: list[tuple[Any, str, float]] = [
    ({"tool_call": CALL}, '<tool_call>\n{"name": "book", "arguments": {"seats": 2, "day": "Monday"}}\n</tool_call>', 1),
    ({"tool_call": CALL}, '{"name": "book", "parameters": {"day": "Monday", "seats": 2.0}}', 1),
    ({"tool_call": CALL}, '[TOOL_CALLS][{"name": "book", "arguments": {"day": "Monday", "seats": 2}}]', 1),
    ({"tool_call": CALL}, '{"name": "book", "arguments": "{\\"day\\": \\"Monday\\", \\"seats\\": 2}"}', 1),
    ({"tool_call": CALL}, '{"function": {"name": "book", "arguments": {"day": "Monday", "seats": 2}}}', 1),
    ({"tool_call": CALL}, '<function=book>{"day": "Monday", "seats": 2}</function>', 1),
    ({"tool_call": CALL}, "<function=book>\n<parameter=day>\nMonday\n</parameter>\n<parameter=seats>\n2\n</parameter>\n"
     "</function>", 1),
    ({"tool_call": CALL}, 'I will: [book(day="Monday", seats=2)]', 1),
    ({"tool_call": CALL}, '[book(day="Monday", seats=__import__("os").getpid())]', 0),
    ({"tool_call": CALL}, '{"name": "book", "arguments": {"day": "Monday"}}', 0),
    ({"tool_call": CALL}, '{"name": "book", "arguments": {"day": "Monday", "seats": "2"}}', 0),
    ({"tool_call": CALL}, '{"name": "book", "arguments": {"day": "Monday", "seats": 2, "x": 1}}', 0),
    ({"tool_call": CALL}, '{"name": "cancel", "arguments": {"day": "Monday", "seats": 2}}', 0),
    ({"tool_call": CALL}, "I booked two seats for Monday.", 0),
    ({"tool_call": CALL, "optional": "seats"}, '{"name": "book", "arguments": {"day": "Monday"}}', 1),
    ({"tool_call": [CALL, {"name": "book", "arguments": {"day": {"any": True}}}]},
     '[{"name": "book", "arguments": {"day": "Friday"}}, '
     '{"name": "book", "arguments": {"day": "Monday", "seats": 2}}]', 1),
    ({"tool_call": [{"name": "book", "arguments": {"day": {"any": True}}},
                    {"name": "book", "arguments": {"day": "Monday"}}]},
     '[{"name": "book", "arguments": {"day": "Monday"}}, {"name": "book", "arguments": {"day": "Friday"}}]', 1),
    ({"tool_call": CALL}, '[{"name": "book", "arguments": {"day": "Monday", "seats": 2}}, '
     '{"name": "book", "arguments": {"day": "Monday", "seats": 2}}]', 0),
    ({"tool_call": {"name": "book", "arguments": {"day": {"regex": "^Mon"}}}}, '{"name": "book", "arguments": '
     '{"day": "Mon"}}', 1),
    ({"tool_call": {"name": "book", "arguments": {"day": {"in": ["Mon", "Tue"]}}}}, '{"name": "book", "arguments": '
     '{"day": "Wed"}}', 0),
    ({"tool_call": []}, "There is nothing to book.", 1),
    ({"tool_call": []}, '{"name": "book", "arguments": {"day": "Mon"}}', 0),
    ({"tool_call": True, "valid": True}, '{"name": "book", "arguments": {"day": "Mon"}}', 1),
    ({"tool_call": True, "valid": True}, '{"name": "book", "arguments": {}}', 0),
    ({"tool_call": True, "valid": True}, "No.", 0),
    ({"tool_call": True, "possible": [{"book": {"day": ["Mon", "Monday"], "seats": [1, ""]}}]},
     '{"name": "book", "arguments": {"day": "Mon"}}', 1),
    ({"tool_call": True, "possible": [{"book": {"day": ["Mon", "Monday"], "seats": [1, ""]}}]},
     '{"name": "book", "arguments": {"day": "Mon", "seats": 2}}', 0),
    ({"tool_call": True, "possible": [{"book": {"day": ["New York, NY"]}}]},
     '{"name": "book", "arguments": {"day": "new york NY"}}', 1),
    ({"tool_call": True, "possible": [{"book": {"day": [{"low": [3, 4], "high": [9, ""]}]}}]},
     '{"name": "book", "arguments": {"day": {"low": 4}}}', 1),
    ({"tool_call": True, "possible": [{"book": {"day": [{"low": [3, 4], "high": [9, ""]}]}}]},
     '{"name": "book", "arguments": {"day": {"high": 9}}}', 0),
    ({"tool_call": True, "possible": [{"book": {"day": [[{"field": ["age"]}, {"field": ["job"]}]]}}]},
     '{"name": "book", "arguments": {"day": [{"field": "age"}, {"field": "job"}]}}', 1),
    ({"tool_call": CALL, "valid": True}, '{"name": "book", "arguments": {"day": "Monday", "seats": 2}}', 1),
    ("tool_call", '{"name": "book", "arguments": {"day": "Sunday"}}', 1),  # as the row's last answer does
    ("tool_call", '{"name": "book", "arguments": {"day": "Monday"}}', 0),
]  # fmt: skip


@pytest.mark.parametrize(("written", "text", "right"), CALLS)
def test_a_tool_call_is_right_by_its_name_and_arguments_however_it_is_written(
    written: Any, text: str, right: float
) -> None:
    last = [{"type": "function", "function": {"name": "book", "arguments": '{"day": "Sunday"}'}}]
    row = SuiteRow("1", [{"role": "user", "content": "Book."}], tools=TOOLS, calls=last)
    assert score(written, text, row) == right


STRANGE = {
    "half a character": "\ud83d x",
    "nothing seen": "\0\u202e\u200b",
    "openings of blocks": "```a\n" * 2000,
    "brackets": '[{"a":' * 2000,
    "digits": "1" * 9999,
    "numbers": "1 1/" * 2000,
    "boxes": "\\boxed{" * 2000,
    "calls": "<function=f><parameter=a>" * 2000,
    "a call of Python": "[f(a=" + "(" * 2000,
    "elements": "<a>" * 2000,
    "marks": "e" + "\u0301" * 2000,
    "apologies": "sorry i am afraid as an ai " * 500,
}
ANY = [
    *("exact", "iexact", "ended", "no_repeat", "json", "xml", "number", "choice", "refusal", "no_refusal", "similar"),
    *({kind: "x"} for kind in ("contains", "icontains", "not_contains", "starts", "ends", "regex", "not_regex")),
    *({"length": {"max_words": 3}}, {"json": {"loose": True}}, {"schema": {}, "loose": True}, {"xml": {"loose": True}}),
    *({"language": "de"}, {"similar": "x", "by": "chrf"}, {"tool_call": CALL}, {"number": 5, "find": "flexible"}),
]


@pytest.mark.parametrize("name", STRANGE)
def test_no_text_makes_a_check_fail_itself_or_take_long(name: str) -> None:
    begun = time.process_time()
    for written in ANY:
        found = score(written, STRANGE[name])
        assert found is None or 0 <= found <= 1, written
    assert time.process_time() - begun < 5  # some 0.2 s; a search that is quadratic takes minutes


def test_values_of_json_are_equal_by_what_they_mean() -> None:
    assert same(1, 1.0) and same({"a": 1, "b": [2]}, {"b": [2.0], "a": 1}) and same("x", "x")
    assert not same(True, 1) and not same([0], [False]) and not same([1, 2], [2, 1]) and not same({"a": 1}, {})


def test_a_schema_fetches_nothing_even_where_its_parts_have_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("urllib.request.urlopen", lambda request, *_, **__: asked.append(str(request)))
    notes: dict[str, Counter[str]] = {}
    schema = {"$defs": {"a": {"$id": "http://a.example/a"}}, "$ref": "http://b.example/b"}
    (check,) = read_checks([{"schema": schema}], Place(HERE, Programs()), [], notes)
    assert check.score(answer_of("1"), ROW) == 0.0 and asked == []
    assert notes["schema"]["needs the $ref http://b.example/b, which is not in it: counted as failed"] == 1


WRONG: list[tuple[Any, str, str]] = [
    ("contain", "unknown check 'contain'", "Did you mean contains? There are: all, exact, iexact, "),
    ({"exact": "a", "json": True}, "exact and json stand in one check", "Make each an object of its own."),
    (["json"], "a check must be a name, or an object with one, found \"['json']\"", "There are: all, exact, "),
    ({}, "a check must be a name, or an object with one", "There are: all, exact, "),
    ({"contains": "a", "each": True}, "contains has no argument 'each'", "contains takes: any."),
    ({"contains": 5}, "contains must be a text or a list of texts, found 5", ""),
    ("contains", "contains is missing", ""),
    ({"contains": "a", "any": "yes"}, "any must be true or false, found 'yes'", ""),
    ({"ended": "x"}, "ended takes no value of its own, found 'x'", 'Write it as "ended".'),
    ("length", "no limit is given", "Allowed: min_ and max_ of words, characters, lines, tokens."),
    ({"length": {"max_words": 2, "min_words": 3}}, "max_words is 2, which is less than min_words 3", ""),
    ({"length": {"max_words": -1}}, "max_words must be a whole number of at least 0, found -1", ""),
    ({"length": {"max_words": 2}, "max_words": 3}, "max_words of length is given twice", ""),
    ({"all": []}, "all must be a list of checks", ""),
    ({"all": ["jsn"]}, "unknown check 'jsn'", "Did you mean json?"),
    ({"all": [{"similar": "x"}]}, "similar is graded here, and all passes or does not", "Give it `min`"),
    ({"regex": "(a"}, "'(a' is not a regular expression (missing ) at position 2)", ""),
    ({"schema": {"type": "objekt"}}, "not a JSON Schema: 'objekt' is not valid under any of the given schemas", ""),
    ({"schema": {"properties": {"a": {"pattern": "("}}}},
     "not a JSON Schema: '(' is not a 'regex' (at properties/a/pattern)", ""),
    ({"schema": {"$ref": "http://example.org/a.json"}}, "the schema's $ref 'http://example.org/a.json' is not in it, "
     "and nothing is fetched", "Write that part under $defs, and refer to it as #/$defs/NAME."),
    ({"schema": {"items": {"$ref": "#/$defs/b"}}}, "the schema's $ref '#/$defs/b' is not in it", "Write that part"),
    ({"schema": "gone.json"}, "gone.json cannot be read (No such file or directory)", "It is looked for in "),
    ({"number": "50%"}, "number is '50%', which is not one number", "Write it as a number: 0.5, not 50%."),
    ({"number": 5, "find": "last"}, "find is 'last'", "Allowed: marked, strict, flexible."),
    ({"number": 5, "tolerance": -1}, "tolerance must be a number of at least 0, found -1", ""),
    ({"choice": "green", "options": ["red", "blue"]}, "choice is 'green', which is none of the options",
     "Options: A, B."),
    ({"choice": "A", "options": ["red"]}, "options must be a list of texts, or letter: text", "2 to 10 of them"),
    ({"language": "gr"}, "language 'gr' is not known", "There are: ar, de, el, "),
    ({"similar": "x", "min": 2}, "min must be a number from 0 to 1, found 2", ""),
    ({"tool_call": {"arguments": {}}}, "tool_call must be an object with name and arguments, or a list of them", ""),
    ({"tool_call": True, "possible": {"a": 1}}, "possible must be a list of {tool: {argument: [values]}}", ""),
    ({"code": "assert f() == 1"}, "the check code runs programs that a model wrote", "Allow it with --run-code"),
    ({"code": "print(1)"}, "the tests of code assert nothing: every program would pass", "Write: assert"),
    ({"code": "assert ("}, "the tests of code are no Python ('(' was never closed", ""),
    ({"python": "checks.py:f"}, "the check python runs checks.py", "Read the file, then allow it with --run-code"),
    ({"python": "checks"}, "python is 'checks'", "It is FILE:FUNCTION, such as checks.py:is_polite."),
]  # fmt: skip


@pytest.mark.parametrize(("written", "message", "hint"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_argument_is_refused_in_words_that_say_what_is_allowed(written: Any, message: str, hint: str) -> None:
    with pytest.raises(CheckError) as refused:
        check_of(written)
    assert str(refused.value).startswith(message)
    assert refused.value.hint.startswith(hint)


def test_a_second_check_of_a_kind_has_a_number_in_its_name() -> None:
    notes: dict[str, Counter[str]] = {}
    place = Place(HERE, Programs())
    common = read_checks(["json", {"contains": "a"}], place, [], notes)
    own = read_checks([{"contains": "b"}, {"json": {"loose": True}}, {"contains": "c"}], place, common, notes)
    assert [check.name for check in common + own] == ["json", "contains", "contains-2", "json-2", "contains-3"]


OWN = """
from dataclasses import dataclass

@dataclass
class Rule:
    words: int

def short(answer, row):
    return len(answer.text.split()) <= Rule(2).words

def share(answer, row):
    return 0.25

def broken(answer, row):
    return {}["x"]
"""


def test_a_function_of_the_user_is_a_check_and_its_faults_are_told(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    notes: dict[str, Counter[str]] = {}
    place = Place(tmp_path, Programs(allowed=True))
    written = ["own.py:short", "own.py:share", "own.py:broken"]
    checks = read_checks([{"python": one} for one in written], place, [], notes)
    checks += read_checks([{"python": "own.py:share", "graded": True}], place, checks, notes)
    answer = answer_of("two words")
    assert [check.score(answer, ROW) for check in checks] == [1.0, 0.0, 0.0, 0.25]
    assert notes["python"] == {"own.py ran with your own rights, in no sandbox": 0}
    assert notes["python-2"]["own.py:share gave '0.25', not true or false: counted as failed"] == 1
    assert notes["python-3"]["own.py:broken raised KeyError: counted as failed"] == 1
    with pytest.raises(CheckError, match=r"own\.py has no function long"):
        read_checks([{"python": "own.py:long"}], place, [], {})
