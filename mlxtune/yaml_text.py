"""YAML as people who write configurations mean it, with the line of every key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from mlxtune.errors import UserError

SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character
BREAK = re.compile("[\n\r\x85\u2028\u2029]")  # of lines


class Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-5` as text and `2025-01-31` as a date; people who write them mean a number and text.

    Aliases are refused: no configuration needs them, and a few lines of nested ones stand for gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            problem = f"the alias *{event.anchor}; write the value out"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if not isinstance(text, str) or not SURROGATE.search(text):
            return text
        try:  # JSON, which is YAML as well, writes one letter beyond U+FFFF as two of them
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            problem = "half of a character, which no text holds"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


class Dumper(yaml.SafeDumper):
    """Quotes whatever text Loader would read as a number. Text stays on the line of its key."""


def _text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    node = dumper.represent_str(text)
    if BREAK.search(text):  # only between these quotes line breaks have names
        node.style = '"'
    return node


Dumper.add_representer(str, _text)


Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:timestamp"]
    for first, rules in Loader.yaml_implicit_resolvers.items()
}
for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?\d*[eE][-+]?\d+|\.\d+([eE][-+]?\d+)?)$"),
        list("-+.0123456789"),
    )


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML; `source` names the file or flag in the error."""
    try:
        return yaml.load(text, Loader)
    except RecursionError as error:
        raise UserError(f"{source}: not valid YAML (nested too deeply)") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source} line {mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: not valid YAML ({problem})") from error


def key_lines(text: str) -> Iterator[tuple[str, int]]:
    """(dotted key, 1-based line) of every key in valid YAML, three levels deep."""
    yield from _lines(yaml.compose(text, Loader))


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode) and prefix.count(".") < 3:
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _lines(value, f"{name}.")
