"""YAML as people who write configurations mean it, with the line of every key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from mlxtune.errors import UserError


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


class Dumper(yaml.SafeDumper):
    """Quotes whatever text Loader would read as a number."""


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
