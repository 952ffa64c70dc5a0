"""Does what a page says: saves its files and types its lines, in the current folder, as a reader would.

A line runs in this process. What a reader has and the tests have not (a hub, a large model) has a stand-in under the
same name; the tables here say which.
"""

from __future__ import annotations

import contextlib
import io
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlxtune_convert.cli import main as convert_main

from mlxtune.cli import main
from mlxtune.train import loggers, signals

PROGRAMS = ("mlxtune ", "mlxtune-convert ")
QUESTION = "Where is my order?\n"  # what is typed, and piped, into every line
# What a line names before anything has made it, by what is there under another name.
SAME_AS = {
    "OWNER/NAME": "Qwen/Qwen2.5-0.5B-Instruct",
    "hf-folder": "Qwen/Qwen2.5-0.5B-Instruct",
    "peft-adapter": "adapter",
    "owner/peft-adapter": "peft-adapter",
    "model.Q4_1.gguf": "base.gguf",
    "adapter.gguf": "tuned.gguf",
    "experiments": "runs",
    "mlx-adapter": "run",
    "other-run": "run",
}
# Words that stand for something, or ask for a hub: what stands in their place, nothing for an empty list.
INSTEAD: dict[str, Callable[[], list[str]]] = {
    "runs/...": lambda: [str(max(Path("runs").iterdir()))],
    "--push": list,  # into a hub of the tests: test_families.py
    "USER/REPO": list,
}


@dataclass
class Ended:
    """How a line ended."""

    status: int
    out: str
    err: str
    made: bool | None  # what stood at its destination afterwards; None where it names none

    @property
    def well(self) -> bool:
        return self.status == 0 and "error: " not in self.err and self.made is not False


class Writer:
    """Stands for tensorboardX's, which need not be installed."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    add_scalar = close = __init__


def run(line: str, instead: Mapping[str, Callable[[], list[str]]] = INSTEAD) -> Ended:
    """The command of a line in this process, in the current folder."""
    words = [word for given in shlex.split(line)[1:] for word in instead.get(given, lambda given=given: [given])()]
    words, into = _redirected(words)
    ended = _typed(convert_main if line.startswith("mlxtune-convert") else main, words)
    if into:
        file = Path(into).expanduser()
        file.parent.mkdir(parents=True, exist_ok=True)  # of other programs, as fish's own
        file.write_text(ended.out, encoding="utf-8")
    out = destination(words)
    if out and "--dry-run" not in words:
        ended.made = Path(out).exists()
    return ended


def run_anew(line: str, kept: Sequence[str]) -> Ended:
    """The same, where lines are alternatives to each other: what an earlier one made at the destination goes. But what
    is `kept` comes back afterwards: later lines use the first of it. Names that nothing has made are given what SAME_AS
    says.
    """
    words = shlex.split(line)
    for name in (word.removeprefix("./") for word in words):
        source = Path(SAME_AS.get(name, name))
        if source.exists() and not Path(name).exists():
            Path(name).parent.mkdir(exist_ok=True)
            shutil.copytree(source, name) if source.is_dir() else shutil.copy(source, name)
    out = destination(words)
    first = None
    if out in kept and Path(out).exists() and not any(word.startswith("--resume") for word in words):
        first = Path(out).rename(f"first-{out}")
    elif out and out not in kept:
        beside = Path().glob(f"{Path(out).stem}.*") if out.endswith(".gguf") else ()
        for old in (Path(out), *beside):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    ended = run(line)
    if first and out:
        shutil.rmtree(out, ignore_errors=True)
        first.rename(out)
    return ended


def _redirected(words: list[str]) -> tuple[list[str], str]:
    """What a shell would do: (the words without < FILE and > FILE, the file of the latter or ""). Standard input is the
    same question for all lines.
    """
    into = words[words.index(">") + 1] if ">" in words else ""
    ends = [words.index(sign) for sign in ("<", ">") if sign in words]
    return words[: min(ends, default=len(words))], into


def _typed(program: Callable[[list[str]], None], words: list[str]) -> Ended:
    said, told = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(SystemExit) as ended,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(told),
    ):
        patch.setattr(signals, "unwind_on_signals", lambda: None)
        patch.setattr(sys, "stdin", io.StringIO(QUESTION))
        patch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Writer))
        patch.setattr(loggers, "require", lambda names: None)
        program(words)
    return Ended(int(ended.value.code or 0), said.getvalue(), told.getvalue(), None)


def destination(words: list[str]) -> str | None:
    """What a command is to write, by its words."""
    for option in ("--out", "--html"):
        if option in words:
            return words[words.index(option) + 1]
    for verb in ("convert", "to-peft", "to-mlx", "to-hf"):
        if verb in words:
            return words[words.index(verb) + 2]
    return None
