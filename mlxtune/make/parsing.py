"""What an engine wrote -> the items of its list, and the examples of a task.

Engines put a sentence before the list, words in bold, items over several lines. A list is read as numbered lines, or as
JSON. What does not fit is not guessed at: it is left out, and the one who asks counts that.
"""

from __future__ import annotations

import json
import re
from typing import Any

from mlxtune.make.seeds import Example

_ITEM = re.compile(r"^[ \t]*(?:\*\*|#+[ \t]*)?(\d{1,3})[ \t]*[.):\u3001\uff0e](?:\*\*)?[ \t]*(.*)$")
_LINE = re.compile(  # an item of one line: 1. x, 1、x, - x
    r"^[ \t]*(?:(?:\*\*)?\d{1,3}[ \t]*(?:[.):](?:\*\*)?[ \t]+|[\u3001\uff0e\uff1a](?:\*\*)?[ \t]*)"
    r"|[-*\u2022][ \t]+)(\S.*)$"
)
_HEADING = re.compile(r"^\W*example\s*\d*\W*$", re.IGNORECASE)
_FIELD = re.compile(r"^[\s*_#>-]*(input|output|class label|label)[\s*_]*[:\uff1a][\s*_]*(.*)$", re.IGNORECASE)
_OUTPUTS = ("output", "class label", "label")  # names of what an example ends, or for labels begins, with
_NOTHING = ("none", "n/a", "no input", "noinput", "not applicable", "null", "empty")  # how engines say: no input
QUOTES = (('"', '"'), ("“", "”"), ("„", "“"), ("«", "»"), ("「", "」"))
_KEYS = ("instruction", "task", "text")  # of an item that is an object


def listed(text: str) -> list[str]:
    """The items of a numbered list, or of JSON lines or a JSON list. [] where there is none.

    Numbers must follow one another: a list inside of an item belongs to it.
    """
    found = _json_items(text)
    if found:
        return [" ".join(item.split()) for item in found]
    items: list[list[str]] = []
    number = None
    for line in text.splitlines():
        match = _ITEM.match(line)
        if match and (number is None or int(match[1]) == number + 1):
            number = int(match[1])
            items.append([match[2]])
        elif items:
            items[-1].append(line)
    return [_bare(" ".join(" ".join(lines).split())) for lines in items]


def listed_lines(text: str) -> list[str]:
    """The items of a list whose items are one line each: numbered, with dashes, or JSON. What stands around it is left
    out. [] where there is none.
    """
    found = _json_items(text)
    if found:
        return [" ".join(item.split()) for item in found]
    matches = [_LINE.match(line) for line in text.splitlines()]
    return [_bare(match[1].strip()) for match in matches if match is not None]


def _json_items(text: str) -> list[str]:
    """Of a JSON list, or of lines that are JSON objects; [] where any of them is something else."""
    body = re.sub(r"^\s*```\w*\s*|\s*```\s*$", "", text).strip()
    values: list[Any] = []
    if body.startswith("["):
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            return []
    elif body.startswith("{"):
        for line in body.splitlines():
            try:
                values.append(json.loads(line))
            except (ValueError, RecursionError):
                continue  # a line that was cut
    items = []
    for value in values:
        item = next((value[key] for key in _KEYS if key in value), None) if isinstance(value, dict) else value
        if not isinstance(item, str):
            return []
        items.append(item)
    return items


def unquoted(text: str) -> str:
    """Without quotation marks around the whole of it; those of a part stay: "Yes", he said, and "no"."""
    text = text.strip()
    for opening, closing in QUOTES:
        inner = text[1:-1]
        is_around = len(text) > 1 and text.startswith(opening) and text.endswith(closing)
        if is_around and opening not in inner and closing not in inner:
            return inner.strip()
    return text


def _bare(item: str) -> str:
    """Without marks around the whole of it."""
    for mark in ("**", '"', "`"):
        inner = item[len(mark) : -len(mark)]
        if item.startswith(mark) and item.endswith(mark) and mark not in inner:
            item = inner
    return item.strip()


def examples_in(text: str) -> list[Example]:
    """The examples of one task, in the order in which they were written: input and output, or label and input.

        Example 1
        Input: Berlin
        Output: Germany

    gives Example("Berlin", "Germany"); one without an input, Example("", ...); one without an output has "" there.

    An output may have a line "Input: ..." of its own. So where examples have headings, a field begins another example
    after a heading or a blank line alone.
    """
    found = _json_examples(text)
    if found:
        return found
    examples: list[dict[str, list[str]]] = [{}]
    field: list[str] | None = None  # whose lines are read
    before = ""  # what that field is called
    follows_gap = True  # whether a heading or a blank line is before the line
    lines = text.splitlines()
    has_headings = any(_HEADING.match(line) for line in lines)
    for line in lines:
        match = _FIELD.match(line)
        if _HEADING.match(line):
            examples.append({})
            field, before, follows_gap = None, "", True
            continue
        name = "" if match is None else "output" if match[1].lower() in _OUTPUTS else "input"
        is_next = (before, name) in (("input", "output"), ("label", "input")) and name not in examples[-1]
        if match is not None and (is_next or follows_gap or not has_headings):
            if name in examples[-1]:
                examples.append({})
            field = examples[-1].setdefault(name, [])
            field.append(match[2])
            before = "label" if "label" in match[1].lower() else name
        elif field is not None:
            field.append(line)
        follows_gap = not line.strip()
    return [_example(one) for one in examples if one]


def _example(fields: dict[str, list[str]]) -> Example:
    texts = {name: "\n".join(lines).strip() for name, lines in fields.items()}
    given = texts.get("input", "")
    if given.strip("()[]<>. ").lower() in _NOTHING:
        given = ""
    return Example(given, texts.get("output", ""))


def _json_examples(text: str) -> list[Example]:
    found = []
    for line in text.splitlines():
        if line.lstrip().startswith("{"):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            output = next((value[key] for key in _OUTPUTS if key in value), None)
            given = value.get("input") or ""
            if isinstance(output, str) and isinstance(given, str):
                found.append(Example(given, output))
    return found


def says_yes(text: str) -> bool:
    """Whether an answer to a question of yes or no begins with yes."""
    return re.match(r"\W*yes\b", text, re.IGNORECASE) is not None
