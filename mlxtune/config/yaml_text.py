"""YAML 1.2 as configurations need it: parsed by ruamel.yaml, with the line of every key, and nothing that is not plain.

A plain word is a truth value (true, false), null (null, ~, nothing), or a decimal number (5, 1e-5, .5); all else is
text: `off`, `yes`, `2025-01-31`, `1:30`, `0x1f`. These are the rules of YAML 1.2's core schema (yaml.org/spec/1.2.2,
10.3.2) without octal and hexadecimal numbers, which no setting needs and many a name looks like.

YAML 1.1, which many programs still read, takes `off` for false and `1:30` for 90. Whatever is written here is quoted
where one of the two readings would not be the text that is meant.

Refused, because no configuration needs them and a stranger's file may hold them: aliases and anchors (a few lines of
nested ones stand for gigabytes), tags, merge keys, a key set twice, and whatever is nested or large beyond measure.
"""

from __future__ import annotations

import functools
import io
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError, MaxDepthExceededError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.parser import ParserError
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver, implicit_resolvers
from ruamel.yaml.scanner import ScannerError

from mlxtune.errors import UserError

LARGEST = 1_000_000  # characters; ruamel.yaml reads some 100,000 in a second
DEEPEST = 50  # levels; a JSON schema of a tool, in data.template_kwargs, has some 10
LONGEST_NUMBER = 100  # characters; Python refuses to write out whole numbers of more than 4,300 digits

# One rule of how plain words are read: tag, compiled pattern, the characters that a word of this kind can begin with.
Rule = tuple[str, Any, Iterable[str]]
TAG = "tag:yaml.org,2002:"
RULES: list[Rule] = [
    (f"{TAG}null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    (f"{TAG}bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    (f"{TAG}int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), "-+0123456789"),
    # A point, an exponent, or both: 08 alone is text.
    (f"{TAG}float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$"), "-+.0123456789"),
    (f"{TAG}float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), "-+0123456789"),
    (f"{TAG}float", re.compile(r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"), "-+."),
]
# And what YAML 1.1, or all of YAML 1.2, reads as something else than text.
QUOTED: list[Rule] = [
    *RULES,
    *((tag, pattern, first) for _, tag, pattern, first in implicit_resolvers),
]

# Text by the rules above; to readers of YAML 1.1 a truth value, or a number: 0b11, 0x1f, 1:30, 1_000.
OLDER = re.compile(
    r"(yes|no|on|off)|[-+]?0b[01_]+|[-+]?0x[0-9a-f_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"
    r"|[-+]?\.?[0-9][0-9.]*_[0-9_.]*(e[-+]?[0-9]+)?",
    re.IGNORECASE,
)
# Ten to readers of YAML 1.1, twelve to those of YAML 1.2: 012.
OCTAL = re.compile(r"[-+]?0[0-7_]+")
# Breaks of lines; the last three are letters to YAML 1.2. Where one stands, a text is written in double quotes, with
# its breaks as escapes: a value must not begin a line, where it would look like a key.
BREAKS = re.compile("[\n\r\x85\u2028\u2029]")
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character


@dataclass(frozen=True)
class Document:
    """What a text says, and where."""

    value: Any  # None, or dicts, lists, texts, numbers and truth values
    lines: dict[str, int]  # dotted key (train.lr, data.sources[0].path) -> its line, from 1
    older: dict[str, str]  # dotted key -> its text, where YAML 1.1 reads a truth value or a number


class _Reading(VersionedResolver):
    """Decides what a plain word is by RULES, whatever version of YAML a file claims."""

    rules = RULES

    @property
    def processing_version(self) -> tuple[int, int]:
        return 1, 2

    @functools.cached_property
    def versioned_resolver(self) -> dict[str | None, list[tuple[str, Any]]]:
        """First character -> the rules for words that begin with it, as the library looks them up."""
        found: dict[str | None, list[tuple[str, Any]]] = {}
        for tag, pattern, firsts in self.rules:
            for first in firsts:
                found.setdefault(first, []).append((tag, pattern))
        return found


class _Writing(_Reading):
    """A text that any of QUOTED matches is written in quotes."""

    rules = QUOTED


class _Composer(Composer):
    """Refuses what stands for something else than what is written."""

    def compose_node(self, parent: Node | None, index: Any) -> Node:
        event = self.parser.peek_event()
        problem = ""
        if isinstance(event, AliasEvent):
            problem = f"the alias *{event.anchor}; write the value out"
        elif event.anchor is not None:
            problem = f"the anchor &{event.anchor}; leave it out"
        elif event.tag is not None:
            problem = f"the tag {event.tag}; leave it out"
        if problem:
            raise ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


class _Representer(SafeRepresenter):
    """Numbers and texts as readers of YAML 1.1 and 1.2 both take them."""

    def represent_float(self, data: float) -> Any:
        # 1e-05 is text to YAML 1.1, which wants a point.
        node = super().represent_float(data)
        if "." not in node.value:
            node.value = node.value.replace("e", ".0e")
        return node

    def ignore_aliases(self, data: Any) -> bool:
        # A value that stands in two places is written out twice: aliases are refused in what is read.
        return True

    def represent_str(self, data: str) -> Any:
        style = '"' if BREAKS.search(data) else None  # in double quotes they are written as escapes
        return self.represent_scalar(f"{TAG}str", data, style=style)


_Representer.add_representer(float, _Representer.represent_float)
_Representer.add_representer(str, _Representer.represent_str)


# What to do about a text that cannot be parsed: of a file, and of the value of --set.
IN_A_FILE = "Write `key: value`, indented with spaces alone, and put text with : or # or a bracket in quotes."
IN_A_FLAG = (
    "Close each bracket and quotation mark; text that begins with one goes in quotes of its own: 'key=\"[text\"'."
)


def parse_yaml(text: str, source: str, key: str = "") -> Document:
    """Parse YAML. source: the file or flag, for messages; key: the dotted key whose value the text is, "" for a file.

    Raises UserError, which names the line where there is one.
    """
    if len(text) > LARGEST:
        raise too_large(source)
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Composer = _Reading, _Composer
    yaml.max_depth = DEEPEST
    document = Document(None, {}, {})
    try:
        root = yaml.compose(text)
        if root is None:
            return document
        _walk(root, key, source, document)
        return replace(document, value=yaml.constructor.construct_document(root))
    except MaxDepthExceededError as error:
        raise UserError(f"{source}: not valid YAML (nested too deeply)") from error
    except (YAMLError, ValueError, OverflowError) as error:  # OverflowError: an escape beyond the last character
        mark = getattr(error, "problem_mark", None)
        where = f"{source} line {mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = ""
        if isinstance(error, (ScannerError, ParserError)):  # others say themselves what to do
            hint = IN_A_FLAG if key else IN_A_FILE
        raise UserError(f"{where}: not valid YAML ({problem})", hint) from error


def read_text(path: Path) -> str:
    """The text of a configuration file. Raises UserError for one that cannot be read, is no text, or is too large."""
    try:
        with path.open("rb") as file:
            raw = file.read(4 * LARGEST + 1)  # a letter has up to four bytes
        if len(raw) > 4 * LARGEST:
            raise too_large(str(path))
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (invalid UTF-8 at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def too_large(source: str) -> UserError:
    return UserError(f"{source}: too large for a configuration (more than {LARGEST:,} characters)")


def _walk(node: Node, key: str, source: str, document: Document) -> None:
    """Note in `document` the line of every key below `node`, which is the value of `key`, and the words that older
    readers take for something else.
    """
    if isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            document.lines[f"{key}[{index}]"] = item.start_mark.line + 1
            _walk(item, f"{key}[{index}]", source, document)
    elif isinstance(node, MappingNode):
        for name, value in node.value:
            inner = _key(name, key, source, document)
            _walk(value, inner, source, document)
    elif isinstance(node, ScalarNode):
        _join_halves(node, source)
        _check_word(node, source)
        if node.style is None and OLDER.fullmatch(node.value):
            document.older[key] = node.value


def _key(node: Node, section: str, source: str, document: Document) -> str:
    """The dotted key that stands at `node`, below the key `section`; its line is noted in `document`."""
    line = node.start_mark.line + 1
    if not isinstance(node, ScalarNode):
        raise UserError(f"{source} line {line}: not valid YAML (a list or a section cannot be a key)")
    if node.value == "<<" and node.style is None:
        raise UserError(f"{source} line {line}: not valid YAML (the merge key <<; write its keys out)")
    _join_halves(node, source)
    _check_word(node, source)
    key = f"{section}.{node.value}" if section else node.value
    if key in document.lines:
        raise UserError(
            f"{source} line {line}: {key} is already set in {source} line {document.lines[key]}", "Keep one of the two."
        )
    document.lines[key] = line
    return key


def _join_halves(node: ScalarNode, source: str) -> None:
    r"""JSON, which is YAML as well, writes a character beyond U+FFFF as two halves: "\ud83d\udeb2".

    Raises UserError for one half alone, which is no character.
    """
    if not SURROGATE.search(node.value):
        return
    try:
        node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        line = node.start_mark.line + 1
        raise UserError(f"{source} line {line}: not valid YAML (half of a character, which no text holds)") from None


def _check_word(node: ScalarNode, source: str) -> None:
    """Raise UserError for a plain number that is longer than any, or that two readers read as two numbers."""
    if node.style is not None:  # in quotes
        return
    where = f"{source} line {node.start_mark.line + 1}"
    if node.tag == f"{TAG}int" and len(node.value) > LONGEST_NUMBER:
        raise UserError(f"{where}: not valid YAML (a number of {len(node.value):,} digits)")
    if OCTAL.fullmatch(node.value):
        raise UserError(
            f"{where}: {node.value[:LONGEST_NUMBER]} can be read in two ways",
            "Write a number without the zero in front of it, and a text in quotes.",
        )


def write_yaml(tree: Any) -> str:
    """Dicts, lists, texts and numbers as YAML, in the order given; every reader of YAML 1.1 or 1.2 reads it alike."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Representer = _Writing, _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = sys.maxsize  # no text is broken over lines
    out = io.StringIO()
    yaml.dump(tree, out)
    return out.getvalue()
