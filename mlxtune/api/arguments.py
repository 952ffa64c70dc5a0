"""What the commands' options are called in Python: hints of errors name options, whoever asked.

mlxtune.tune("quick", ..., out="run")      UserError: run already exists
                                           Choose another --out, or replace it with --force.
                                           In Python: out= for --out; force=True for --force.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mlxtune.errors import UserError

# Of each function: an option of its command -> what it is here.
ROWS = {"--data": "data=", "--split": "split="}
SCORING = {"--adapter": "adapter=", "--model": "model", "--set": "settings={KEY: VALUE}", **ROWS}
RENDERING = {"--model": "model", "--set": "settings={KEY: VALUE}", **ROWS}
TUNING = {
    "--config": "config",
    "--model": '{"model.path": ...}',
    "--data": '{"data.path": ...}',
    "--steps": '{"train.steps": ...}',
    "--epochs": '{"train.epochs": ...}',
    "--set": "settings={KEY: VALUE}",
    "--out": "out=",
    "--force": "force=True",
    "--resume": "resume=True",
    "--resume-anyway": "resume_anyway=True",
}
EXPORTING = {
    "--adapter": "adapter=",
    "--model": "model",
    "--data": "data=",
    "--to": "to=",
    "--out": "out=",
    "--dtype": "dtype=",
    "--type": "type=",
    "--ollama": "ollama=True",
    "--base": "base=",
    "--base-name": "base_name=",
    "--no-verify": "verify=False",
    "--force": "force=True",
}


@contextmanager
def in_python(arguments: Mapping[str, str]) -> Iterator[None]:
    """Let a UserError say what the options that it names are called here. arguments: one of the tables above."""
    try:
        yield
    except UserError as error:
        options = dict.fromkeys(re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", f"{error.message} {error.hint}"))
        here = [f"{arguments[option]} for {option}" for option in options if option in arguments]
        if here and " In Python: " not in f" {error.hint}":
            error.hint = f"{error.hint} In Python: {'; '.join(here)}.".strip()
        raise
