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
    """
    found = _json_examples(text)
    if found:
        return found
    examples: list[dict[str, list[str]]] = [{}]
    field: list[str] | None = None  # whose lines are read
    for line in text.splitlines():
        match = _FIELD.match(line)
        if _HEADING.match(line):
            examples.append({})
            field = None
        elif match:
            name = "output" if match[1].lower() in _OUTPUTS else "input"
            if name in examples[-1]:
                examples.append({})
            field = examples[-1].setdefault(name, [])
            field.append(match[2])
        elif field is not None:
            field.append(line)
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
