"""The command lines of README.md and of the commands' own --help, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

from test_layers import COMMANDS

README = Path(__file__).resolve().parent.parent / "README.md"


def in_readme() -> list[str]:
    """Every line of README's blocks that name no language, in their order; a line of several commands gives each. (What
    has arrows shows which package imports which.)
    """
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    found = [command for language, block in blocks if not language for command in _commands(block)]
    return [command for command in found if "->" not in command]


def in_help() -> list[str]:
    r"""Every line of the blocks that click keeps as they are (\b), of every command."""
    found = []
    for command in COMMANDS.values():
        for block in (command.help or "").split("\b\n")[1:]:
            found += _commands(block.split("\n\n")[0])
    return found


def _commands(block: str) -> list[str]:
    """Without comments, which begin after a space."""
    lines = (re.sub(r"(^|\s+)#\s.*", "", line).strip() for line in block.splitlines())
    return [part for line in lines if line for part in line.split(" && ")]


def spans() -> list[str]:
    """What README says of `mlxtune ...` inside its sentences."""
    return re.findall(r"`(mlxtune [^`]+)`", README.read_text(encoding="utf-8"))
