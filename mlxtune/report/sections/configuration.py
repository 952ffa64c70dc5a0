"""The section of the configuration: settings, the command that repeats the run, and what the run is made of."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from mlxtune_convert.shown import OF_NO_NAME, shown_json

from mlxtune.config.resolve import KEYS, Config
from mlxtune.config.yaml_text import parse_yaml
from mlxtune.errors import UserError
from mlxtune.report.evaluations import adapter_in
from mlxtune.report.html import Child, Html, joined, tag
from mlxtune.report.page import Section
from mlxtune.report.run_record import RunRecord
from mlxtune.report.secrets import masked, without_home, without_home_values
from mlxtune.report.tables import facts, folded, table

FLAGS = {"model.path": "--model", "data.path": "--data"}
DIGESTS = {"model": "base model", "train": "training examples", "valid": "held-out examples"}


def section(record: RunRecord) -> Section | None:
    parts: list[Html] = []
    if record.config:
        differing, rest = _tables(record.config)
        parts += [differing, _command(record.config), rest]
    made = made_of(record)
    if made:
        parts.append(facts("What the run is made of", made))
    return Section("configuration", "Configuration", joined(parts)) if parts else None


def flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(section.key, value) of every setting."""
    for section_name, keys in config.items():
        if isinstance(keys, Mapping):
            for name, value in keys.items():
                yield f"{section_name}.{name}", value
        else:
            yield section_name, keys


def _tables(config: Mapping[str, Any]) -> tuple[Html, Html]:
    """(The settings that differ from the defaults, all others folded away)."""
    defaults = dict(flat(Config().model_dump(mode="json")))
    differing: list[list[Child]] = []
    rest: list[list[Child]] = []
    for key, value in flat(config):
        meaning = KEYS.get(key, "").removeprefix(f"{key}: ")
        if key in defaults and defaults[key] == value:
            rest.append([key, _shown(value), meaning])
        else:
            default = _shown(defaults[key]) if key in defaults else "no key of this version"
            differing.append([key, _shown(value), default, meaning])
    first = table("Settings that differ from the defaults", ["key", "value", "default", "meaning"], differing)
    others = table("Settings as they are by default", ["key", "value", "meaning"], rest)
    return first, folded(f"The other {len(rest)} settings, as they are by default", others)


def _shown(value: Any) -> str:
    """A value for people; "-" for one that is not set."""
    if value is None or value == "":
        return "-"
    return masked(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _command(config: Mapping[str, Any]) -> Html:
    command = command_of(config)
    if masked(command) != command:
        return tag("p", "A setting holds a secret: the command that repeats the run is not shown.")
    said = "The command that repeats the run; paths are those of the machine that it ran on."
    return joined(tag("p", said), tag("pre", tag("code", command)))


def command_of(config: Mapping[str, Any]) -> str:
    """A shell's command that trains with these settings: each that is not the default's."""
    defaults = dict(flat(Config().model_dump(mode="json")))
    words = ["mlxtune train"]
    for key, value in flat(config):
        if key not in defaults or defaults[key] == value:
            continue
        if key in FLAGS:
            words.append(f"{FLAGS[key]} {_path(value)}")
        else:
            words.append(f"--set {shlex.quote(f'{key}={_as_yaml(without_home_values(value))}')}")
    return " \\\n  ".join([*words, "--out NEW"])


def _path(place: Any) -> str:
    """A path as a shell's word; below the home it begins with ~, which a shell knows outside of quotes alone."""
    short = without_home(str(place))
    if short == str(place):
        return shlex.quote(short)
    return f"~/{shlex.quote(short[2:])}" if short.startswith("~/") else short


def _as_yaml(value: Any) -> str:
    """A value as --set reads it: a text as it is, where that means the same text."""
    if isinstance(value, str) and not OF_NO_NAME.search(value):
        try:
            if parse_yaml(value, "").value == value:
                return value
        except UserError:
            pass
    return shown_json(value)


def made_of(record: RunRecord) -> dict[str, Child]:
    """Digests, versions and machine, as far as the folder tells."""
    begun = record.begun
    out: dict[str, Child] = {}
    digests = begun.get("digests")
    for name, what in DIGESTS.items():
        if isinstance(digests, Mapping) and digests.get(name):
            out[f"digest of the {what}"] = _code(digests[name])
    # Training that goes on replaces its adapter again and again.
    adapter = "" if record.state == "running" else adapter_in(record.folder)
    if adapter:
        out["SHA-256 of the adapter's file"] = _code(adapter)
    versions = begun.get("versions")
    if isinstance(versions, Mapping):
        out["versions"] = ", ".join(f"{name} {value}" for name, value in versions.items())
    for name in ("machine", "processes"):
        if begun.get(name):
            out[name] = str(begun[name])
    return out


def _code(value: Any) -> Html:
    return tag("code", str(value))
