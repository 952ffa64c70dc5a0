"""What a shell completes: in a real bash and a real zsh, on terminals of their own."""

from __future__ import annotations

import os
import pty
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import tiny

from mlxtune.cli import cli, completing
from mlxtune.config import resolve
from mlxtune.config.described import all_keys

BEGIN = {  # how each shell is started without anybody's settings, and made to complete
    "bash": (["--norc", "--noprofile", "-i"], "bind 'set bell-style none'; "),
    "zsh": (["-f", "-i"], "unsetopt beep; autoload -U compinit; compinit -D -u; "),
}
LONGEST = 60.0  # seconds that a shell may take to answer
SLACK = 1.5  # of limits in seconds of a core: a busy machine takes more of them for the same


class Shell:
    """A shell on a terminal, with the script of `mlxtune completion` read."""

    def __init__(self, name: str, folder: Path) -> None:
        script = folder / f"complete.{name}"
        script.write_text(tiny.done("completion", name).stdout)
        options, first = BEGIN[name]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "TERM": "dumb", "PS1": "> ", "HOME": str(folder), "COLUMNS": "160"}
        self.ours, theirs = pty.openpty()
        program = str(shutil.which(name))
        self.process = subprocess.Popen(
            [program, *options],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        os.close(theirs)
        self.typed(f"PS1='> '; {first}source {script}; echo rea''dy\n", "ready")

    def typed(self, text: str, wanted: str) -> str:
        """Type something; return what the terminal shows, as soon as what is wanted is among it."""
        os.write(self.ours, text.encode())
        said, end = "", time.monotonic() + LONGEST
        while wanted not in said and time.monotonic() < end:
            if select.select([self.ours], [], [], 0.1)[0]:
                said += re.sub(
                    r"\x1b\[[0-9;?]*[a-zA-Z]|[\x07\r]", "", os.read(self.ours, 65536).decode(errors="replace")
                )
        assert wanted in said, said
        return said

    def completed(self, line: str, wanted: str) -> str:
        """Type a line, and Tab; then leave the line."""
        said = self.typed(f"{line}\t", wanted)
        os.write(self.ours, b"\x15")  # takes back what was typed
        self.typed("\necho ag''ain\n", "again")
        return said

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.ours)


@pytest.mark.parametrize("name", BEGIN)
def test_a_real_shell_completes_commands_options_keys_values_recipes_and_files(name: str, tmp_path: Path) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"no {name} here")
    (tmp_path / "rows-of-mine.jsonl").write_text("")
    shell = Shell(name, tmp_path)
    try:
        shell.completed("mlxtune dem", "mlxtune demo ")
        shell.completed("mlxtune train --resume-a", "mlxtune train --resume-anyway ")
        shell.completed("mlxtune train -c qlo", "mlxtune train -c qlora ")
        said = shell.completed("mlxtune train --set train.keep_l", "train.keep_last=")
        assert "keep_last= " not in said  # the value follows at once
        shell.completed("mlxtune train --set lora.variant=rs", "lora.variant=rslora")
        shell.completed("mlxtune train --data rows", "mlxtune train --data rows-of-mine.jsonl")
    finally:
        shell.close()


def asked(words: str, place: int, shell: str = "zsh") -> list[str]:
    """What the command answers a shell. words: the line; place: which word is completed."""
    environment = {"_MLXTUNE_COMPLETE": f"{shell}_complete", "COMP_WORDS": words, "COMP_CWORD": str(place)}
    done = tiny.mlxtune(**environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    return lines[1::3] if shell == "zsh" else [line.partition(",")[2] for line in lines]


def seconds_of_a_core(words: list[str], environment: dict[str, str]) -> float:
    """What the installed command takes, with what it reads compiled, as pip leaves it. The median of five."""
    command = [str(Path(sys.executable).with_name("mlxtune")), *words]
    taken = []
    for turn in range(6):  # the first one compiles
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if turn:
            taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return sorted(taken)[2]


def test_help_and_completion_are_there_at_once(tmp_path: Path) -> None:
    """0.10 and 0.25 seconds were measured on a busy machine."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    assert seconds_of_a_core(["--help"], environment) < 0.15 * SLACK
    words = {"_MLXTUNE_COMPLETE": "bash_complete", "COMP_WORDS": "mlxtune train --set tra", "COMP_CWORD": "3"}
    assert seconds_of_a_core([], {**environment, **words}) < 0.3 * SLACK


def test_an_answer_names_every_key_of_a_section() -> None:
    found = asked("mlxtune train --set tra", 3)
    assert found == [f"{key.full}=" for key in all_keys() if key.section == "train"]


def test_every_choice_of_a_key_is_offered_and_each_is_one_that_the_configuration_takes() -> None:
    offered = completing.SettingText()
    parameter = next(one for one in cli.commands["train"].params if one.name == "settings")
    context = cli.commands["train"].make_context("train", [], resilient_parsing=True)
    some = 0
    for key in all_keys():
        for item in offered.shell_complete(context, parameter, f"{key.full}="):
            some += 1
            # The others of this section mean something beside a loss alone.
            beside = ("preference.loss=dpo",) if key.section == "preference" and key.name != "loss" else ()
            resolve.load(None, (*beside, str(item.value)))
    assert some > 40


NO_FILES = {  # texts that never name a file or folder; a new one is looked at once, and put here if it is like these
    *("eval --min-better", "eval --max-worse", "eval --benchmark", "make pairs --rater", "rate --rater"),
    *("export --base-name", "export --type", "export --push"),
    *("make answers --system", "generate --prompt", "generate --system", "chat --system", "generate text"),
}


def texts_of(command: click.Command, name: str = "") -> Iterator[tuple[str, click.Parameter]]:
    """Every option and argument whose value is a text, with its command and name."""
    for word, inner in command.commands.items() if isinstance(command, click.Group) else ():
        yield from texts_of(inner, f"{name} {word}".strip())
    for param in command.params:
        if isinstance(param.type, click.types.StringParamType):
            yield f"{name} {param.opts[0]}", param


def test_every_text_that_may_name_a_file_offers_files() -> None:
    completing.prepare(cli)
    kinds = {name: type(param.type) for name, param in texts_of(cli)}
    others = {completing.RecipeText, completing.SettingText, completing.KeyText}
    assert {name for name, kind in kinds.items() if kind is not completing.FileText and kind not in others} == NO_FILES
    for name in ("init --model", "make answers --engine", "make answers --judge", "data curate --judge", "convert src"):
        assert kinds[name] is completing.FileText, name
    for name in ("train", "config"):
        assert cli.commands[name].get_help(cli.commands[name].make_context(name, [], resilient_parsing=True))
