"""What a file makes a command do beyond this machine and its own folder.

A configuration, or the folder of a run, may be a stranger's. A note says what it turns on before that happens; and the
hub is not asked for what a run's folder alone names: such an id is looked up in the local cache. A user has named an id
who wrote it on the command line, or named the configuration that holds it.

    train -c theirs.yaml               named by the user: the hub is asked, and a note says so
    train --resume --out theirs        named by the run alone: looked up here, else refused with what to type
    train --resume --out theirs --data owner/rows    named by the user: the hub is asked
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune.config.resolve import Config
from mlxtune.config.schema import DataSection
from mlxtune.data.dataset.sources import is_hub_id
from mlxtune.model import hub

# Loggers whose packages may send what they get to a server, and what they get.
SENDING = {"wandb": "to Weights & Biases", "trackio": "to Trackio, which can send them to the hub"}
DATA_KEYS = ("data.path", "data.sources")


@dataclass(frozen=True)
class LocalOnly:
    """Hints, each what to type to have a hub id fetched that nobody has named. Where one is "", the hub is asked."""

    model: str = ""  # of model.path
    data: str = ""  # of data.path or data.sources


NOTHING = LocalOnly()  # the user named all of it


def keys_named(settings: tuple[str, ...], flags: Mapping[str, Any]) -> set[str]:
    """The keys of the configuration that a command line sets. settings, flags: as `config.load` takes them."""
    by_set = {setting.partition("=")[0].strip() for setting in settings}
    return by_set | {key for key, value in flags.items() if value is not None}


def resumed(config: Config | None, file: str, named: Collection[str]) -> LocalOnly:
    """What is only looked up here when a run goes on. config: None where another process will tell it; file: the run's
    own configuration; named: the keys that the command line sets.
    """
    model_id = data_id = "ID"
    if config is not None:
        model_id, data_id = shlex.quote(config.model.path), shlex.quote(config.data.path)
    model = data = ""
    if "model.path" not in named:
        model = f"To have it fetched, name it: --model {model_id}"
    if not set(DATA_KEYS).intersection(named):
        data = f"To have it fetched, name it: --data {data_id}"
        if config is not None and config.data.sources:
            data = f"To have it fetched, name the configuration that holds it: -c {shlex.quote(file)}"
    return LocalOnly(model, data)


def compared(section: DataSection) -> str:
    """The same of the rows of a run that its model is compared on."""
    if section.sources:
        return "Name rows to compare on: --data PATH"
    return f"To have it fetched, name it: --data {shlex.quote(section.path)}"


def notes(config: Config, file: str, named: Collection[str], local: LocalOnly = NOTHING) -> list[str]:
    """A line on each thing beyond this machine that a training run will do because `file` says so.

    file: a configuration, as a person names it; named: the keys that the command line sets, which nobody needs to be
    told of; local: for what the hub is not asked.
    """
    lines = hub_notes(config, file, named, local)
    if "train.loggers" not in named:
        senders = [SENDING[name] for name in config.train.loggers if name in SENDING]
        lines += [f"{file} has the numbers and settings of the run sent {to} (train.loggers)" for to in senders]
    return lines + cache_notes(config, file, named)


def hub_notes(config: Config, file: str, named: Collection[str], local: LocalOnly = NOTHING) -> list[str]:
    """The same of what the hub is asked for."""
    lines = []
    path = config.model.path
    if not local.model and "model.path" not in named and hub.is_id(path):
        lines.append(f"{file} names a model of the hub, which is asked for it: {path}")
    if not local.data and not set(DATA_KEYS).intersection(named):
        paths = [source.path for source in config.data.mixture() if is_hub_id(source.path)]
        lines += [f"{file} names a dataset of the hub, which is asked for it: {path}" for path in paths]
    return lines


def cache_notes(config: Config, file: str, named: Collection[str]) -> list[str]:
    """The same of a folder for tokenized rows."""
    folder = config.data.cache
    if "data.cache" in named or folder in ("auto", "off"):
        return []
    return [f"{file} has the tokenized rows kept in {Path(folder).expanduser()} (data.cache)"]
