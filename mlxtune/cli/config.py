"""mlxtune config."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import common

if TYPE_CHECKING:
    from mlxtune.config.described import Key
    from mlxtune.config.resolve import Config

WIDTH = 100  # columns of a comment
HEADING = "# A run's configuration. Save it, change it, and name it: mlxtune train -c FILE"


@click.command()
@click.argument("key", required=False, metavar="[KEY]")
@click.option("-c", "--config", "file", metavar="FILE", help="Take the values of this file, or shipped recipe.")
@common.settings_option
@common.json_option
def config(key: str | None, file: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Print the keys of a run's configuration, each with its value and what it means.

    KEY: one key (train.lr, or lr), or a section (train). Without one, all of them: a file for `train -c`.

    \b
    mlxtune config > mine.yaml
    mlxtune config -c qlora
    mlxtune config lora.rank
    """
    from mlxtune_convert.files import json_text

    from mlxtune.config import resolve
    from mlxtune.config.described import all_keys, keys_named

    resolved = resolve.load(file, settings)
    keys = keys_named(key) if key else list(all_keys())
    if as_json:
        click.echo(json_text([_as_json(one, resolved) for one in keys]))
        return
    lines = _annotated(keys, resolved)
    if not key:
        lines = [HEADING, *lines]
    out = common.stdout()
    for line in lines:
        out.print(line, soft_wrap=True, markup=False, highlight=False)


def _value(key: Key, resolved: Config) -> Any:
    """As YAML and JSON hold it."""
    return resolved.model_dump(mode="json")[key.section][key.name]


def _as_json(key: Key, resolved: Config) -> dict[str, Any]:
    found = {"key": key.full, "value": _value(key, resolved), "default": key.default}
    return {**found, "allowed": key.allowed.replace("`", ""), "meaning": key.meaning}


def _annotated(keys: Sequence[Key], resolved: Config) -> list[str]:
    """YAML in which each key stands below what it means."""
    from mlxtune.config.yaml_text import write_yaml

    lines: list[str] = []
    section = ""
    for key in keys:
        if key.section != section:
            section = key.section
            lines += ["", f"{section}:"] if lines else [f"{section}:"]
        lines += _comment(key, resolved)
        written = write_yaml({key.name: _value(key, resolved)}).rstrip("\n")
        lines += textwrap.indent(written, "  ").split("\n")
    return lines


def _comment(key: Key, resolved: Config) -> Iterator[str]:
    allowed = key.allowed.replace("`", "")
    text = f"{key.meaning} [{allowed}]"
    if _value(key, resolved) != key.default:
        text += f" (default: {'none' if key.default in (None, '') else key.default})"
    for line in textwrap.wrap(text, WIDTH - 4, break_long_words=False):
        yield f"  # {line}"
