"""Walk through pages of docs/ as a new user would: from an empty folder, each file saved, each line typed, in order.

    python tests/walk.py                       # README and all pages that can be walked
    python tests/walk.py evaluation            # one, behind those that it goes on from

A line that needs a hub, another program or several Macs is marked so on its page (docs/index.md). It is left out,
unless it fetches a model for which a tiny one stands here. The engine of the page on making data is a server on this
machine that answers by rule, and 300 instructions are six. The suite walks the shortest page (tests/test_walk.py);
this script is to be run after a change of a command or of a page.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import commands
import tiny
import walking
from commands import DOCS, File, Line
from made import Talking
from test_make_command import says
from walking import Ended

from mlxtune.demo.story import data_folder

README = "README"
PAGES = {README: "", **commands.WALKED}
# Models of the hub that lines fetch: a tiny one stands in the folder of that name.
FETCHED = ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-0.5B-Instruct")
# README's lines, by their beginning, that bring what is here already.
IS_HERE = ("git clone", "cd mlxtune", "make demo", "pip install")


@dataclass(frozen=True)
class Step:
    """What became of a line of a page."""

    page: str  # its name
    line: str  # the command
    why_not: str  # why it was not run, or ""
    ended: Ended | None  # how it ended, where it was run
    seconds: float  # that it took


def walk(page: str) -> Iterator[Step]:
    """Each line of a page, and before it of those that it goes on from, in the current folder."""
    if PAGES[page]:
        yield from walk(PAGES[page])
    else:
        for name in FETCHED:
            tiny.make_model(Path(name), tie_word_embeddings=True)
    if page == README:  # its reader's own rows
        shutil.copytree(data_folder(), "data")
    with stand_ins(page) as instead:
        for step in commands.steps(commands.README if page == README else DOCS / f"{page}.md"):
            if isinstance(step, File):
                Path(step.name).write_text(step.text, encoding="utf-8")
            else:
                yield typed(page, step, instead)


def typed(page: str, line: Line, instead: dict[str, Callable[[], list[str]]]) -> Step:
    if line.command.startswith(IS_HERE):
        return Step(page, line.command, "it is here", None, 0.0)
    has_stand_in = any(name in line.command.split() for name in FETCHED)
    if line.needs and not has_stand_in:
        return Step(page, line.command, f"needs: {line.needs}", None, 0.0)
    if line.command.startswith("cd "):
        os.chdir(line.command.removeprefix("cd "))
        return Step(page, line.command, "", Ended(0, "", "", None), 0.0)
    if not line.command.startswith(walking.PROGRAMS):
        return Step(
            page, line.command, "", Ended(127, "", f"no program of ours, and no mark: {line.command}", None), 0.0
        )
    began = time.perf_counter()
    ended = walking.run(line.command, instead)
    return Step(page, line.command, "", ended, time.perf_counter() - began)


@contextlib.contextmanager
def stand_ins(page: str) -> Iterator[dict[str, Callable[[], list[str]]]]:
    """Words of a page's lines, and what stands in their place."""
    if page != "making":
        yield {}
        return
    with Talking(says) as server:
        words = {"300": "6", "maker": f"{server.url}#tiny"}
        yield {word: lambda new=new: [new] for word, new in words.items()}


def main(pages: list[str]) -> int:
    wrong = 0
    for page in pages or [page for page in PAGES if page not in PAGES.values()]:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            os.environ["XDG_CACHE_HOME"] = str(Path(folder, ".cache"))
            for step in walk(page):
                print(f"{step.page}: {step.line}   ({step.why_not or f'{step.seconds:.1f} s'})", flush=True)
                if step.ended and not step.ended.well:
                    wrong += 1
                    print(f"status {step.ended.status}\n{step.ended.out}{step.ended.err}", flush=True)
    print("every line ended well" if not wrong else f"{wrong} lines did not end well")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
