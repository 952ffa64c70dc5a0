"""The command lines of README.md, of the pages in docs/, and of the commands' own --help, as they stand there."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from test_layers import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
# A block of code: its language, the name of the file that it shows, what is in it.
BLOCK = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
OF_COMMANDS = ("", "sh")  # languages of blocks with lines for a terminal
# What a line needs beside mlxtune and the files of its page (docs/index.md): `mlxtune convert OWNER/NAME m  # [hub]`.
NEEDS = ("hub", "server", "program", "Macs")
# The pages for users, but for those that are written out of the code, and for those with tests of their own. Models
# come behind shipping, which makes what they are converted from.
MANUAL = (
    *("index", "first-run", "data", "shipping", "models", "memory", "masks", "runs", "evaluation", "making"),
    *("several-macs", "troubles", "coming-from"),
)
# Pages that are walked through from their first line to their last (walk.py) -> the page in whose folder they go on;
# "": they begin in an empty one.
WALKED = {"first-run": "", "evaluation": "first-run", "making": ""}


@dataclass(frozen=True)
class Line:
    """A line for a terminal."""

    command: str  # without its remark
    needs: str  # one of NEEDS, or ""


@dataclass(frozen=True)
class File:
    """A file that a page shows, to be saved under its name."""

    name: str
    text: str


def in_readme() -> list[str]:
    """Every line of README's blocks that name no language, in their order; a line of several commands gives each. (What
    has arrows shows which package imports which.)
    """
    found = [step.command for step in steps(README) if isinstance(step, Line)]
    return [command for command in found if "->" not in command]


def steps(page: Path) -> list[Line | File]:
    """What a reader of a page does, in its order: files to save, lines to type."""
    found: list[Line | File] = []
    for language, title, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if title:
            found.append(File(title, block))
        elif language in OF_COMMANDS:
            found += lines_of(block)
    return found


def in_help() -> list[str]:
    r"""Every line of the blocks that click keeps as they are (\b), of every command."""
    found = []
    for command in COMMANDS.values():
        for block in (command.help or "").split("\b\n")[1:]:
            found += [line.command for line in lines_of(block.split("\n\n")[0])]
    return found


def lines_of(block: str) -> list[Line]:
    """Remarks begin with # after a space."""
    found = []
    for line in block.splitlines():
        command, _, remark = re.sub(r"(^|\s+)#\s", "\0", line, count=1).strip().partition("\0")
        mark = re.match(r"\[(\w+)\]", remark)
        found += [Line(part.strip(), mark[1] if mark else "") for part in command.split(" && ") if part.strip()]
    return found


def spans(page: Path = README) -> list[str]:
    """What a page says of `mlxtune ...` inside its sentences."""
    return re.findall(r"`(mlxtune [^`]+)`", BLOCK.sub("", page.read_text(encoding="utf-8")))


def of_mlxtune(command: str) -> list[list[str]]:
    """The words behind `mlxtune` of each call of it in a command line, also in a pipeline or behind a launcher.

    mlx.launch --hostfile m.json -- $(which mlxtune) train -c qlora | tee log   ->   [["train", "-c", "qlora"]]
    """
    found = []
    for part in re.split(r" \|\|? | ; | && ", command.replace("$(which mlxtune)", "mlxtune")):
        words = shlex.split(re.split(r"\s[0-9]?>>?|\s<", part)[0])
        if "mlxtune" in words:
            found.append(words[words.index("mlxtune") + 1 :])
    return found
