"""How much of the project one thing passes through: a row, the preparation of a run, a training step, a GGUF export.

    python tests/traced.py                    functions and files of each, in the working tree
    python tests/traced.py --rev REV          the same, of another revision
    python tests/traced.py --list step        every function of one of them
    python tests/traced.py --below step=StepFunction.__call__ --below row=read
                                              only what is called by functions of these (qualified) names

The installed command runs under `sys.setprofile`; a function of the project counts once, however often it is called.
Not counted: what runs while modules are imported, comprehensions, and threads. Where each part begins and ends is
seen from outside, so that revisions with other modules are counted alike:

row          `data show --json` of a file with two rows: from when that file is first opened to the command's end
preparation  `train`: from the command's start to the event `begin`
step         `train`: from the event of step 2 to that of step 3
export       `export --to gguf` of a tuned model, with its proof: the whole command
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from one_side import ROOT, Revision, check_out

OPTIMIZED = 1  # a code flag (inspect.CO_OPTIMIZED): a function's, not a module's or a class body's
SETTINGS = ("train.steps=4", "train.eval_every=0", "train.save_every=0", "train.batch_rows=4", "lora.rank=4")
PARTS = ("row", "preparation", "step", "export")


@dataclass
class Trace:
    """What of the project was called, part by part."""

    code: Path  # the checkout
    inside: tuple[str, ...]  # what the paths of its packages' files begin with
    below: dict[str, str]  # part -> qualified name: only what it calls counts
    part: str = ""  # the one that now runs; "": none that is counted
    calls: dict[str, Counter[str]] = field(default_factory=dict)  # part -> "file:function" -> how often
    importing: int = 0  # modules of the project that are being imported, one by another
    depth: dict[str, int] = field(default_factory=dict)  # part -> open calls of the function in `below`

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """What `sys.setprofile` calls."""
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(self.inside):
            return
        entering = 1 if event == "call" else -1
        if code.co_name == "<module>":
            self.importing += entering
            return
        self.look()
        if self.importing or not self.part or not code.co_flags & OPTIMIZED or _is_comprehension(code):
            return
        wanted = self.below.get(self.part)
        if wanted == code.co_qualname:
            self.depth[self.part] = self.depth.get(self.part, 0) + entering
        if event == "call" and (wanted is None or self.depth.get(self.part) or wanted == code.co_qualname):
            name = f"{Path(code.co_filename).relative_to(self.code)}:{code.co_qualname}"
            self.calls.setdefault(self.part, Counter())[name] += 1

    def look(self) -> None:
        """Find out which part runs now; replaced for commands of several parts."""


def _is_comprehension(code: CodeType) -> bool:
    return code.co_name in ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")


def _after_events(trace: Trace, events: Path) -> None:
    """Let `trace` go from part to part as the run's events tell."""
    size = -1

    def look() -> None:
        nonlocal size
        try:
            now = os.stat(events).st_size
        except FileNotFoundError:
            return
        if now == size:
            return
        size = now
        lines = events.read_text(encoding="utf-8").splitlines()
        told = [(event["kind"], event.get("step")) for event in map(json.loads, lines)]
        if ("begin", 0) in told:
            trace.part = "step" if ("train", 2) in told and ("train", 3) not in told else ""

    trace.part = "preparation"
    trace.look = look  # type: ignore[method-assign]


def _from_opening(trace: Trace, data: Path) -> None:
    """Let `trace` count from when `data` is opened."""

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]) == str(data):
            trace.part = "row"

    sys.addaudithook(hear)


def _inside(code: Path, out: Path, below: dict[str, str], words: list[str]) -> None:
    """Run one command in this process and write what it called to `out`."""
    revision = Revision.of(code)
    revision.places()
    entry = revision.entry(words[0])
    inside = tuple(f"{folder}{os.sep}{name}{os.sep}" for folder in revision.search for name in revision.packages)
    trace = Trace(code, inside, below)
    if words[1] == "train":
        _after_events(trace, Path(words[words.index("--out") + 1], "events.jsonl"))
    elif words[1] == "data":
        _from_opening(trace, Path(words[words.index("--data") + 1]))
    else:
        trace.part = "export"
    sys.argv = words
    sys.setprofile(trace)
    try:
        entry()
    finally:
        sys.setprofile(None)
        out.write_text(json.dumps(trace.calls))


def traced(code: Path, work: Path, below: dict[str, str]) -> dict[str, Counter[str]]:
    """Part -> "file:function" -> calls, of the revision checked out in `code`."""
    import tiny

    tiny.make_model(work / "hf", "llama", dtype="float16")
    tiny.write_jsonl(work / "data" / "train.jsonl", tiny.conversations(24))
    tiny.write_jsonl(work / "data" / "valid.jsonl", tiny.conversations(4, "No, {}!"))
    turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    system = {"role": "system", "content": "Be brief."}
    rows = [{"messages": [system, *turns, *turns]}, {"messages": [system, *turns]}]  # of five and of three messages
    tiny.write_jsonl(work / "two.jsonl", rows)
    settings = [word for text in SETTINGS for word in ("--set", text)]
    # The cache of rows starts empty: it is in `work`.
    commands = (
        ["convert", "hf", "model", "--group-size", "32"],
        ["data", "show", "--model", "model", "--data", "two.jsonl", "--json"],
        ["train", "--model", "model", "--data", "data", "--out", "run", *settings],
        ["export", "--model", "model", "--adapter", "run", "--to", "gguf", "--out", "tuned.gguf"],
    )
    search = os.pathsep.join(Revision.of(code).search)
    environment = {**os.environ, "PYTHONPATH": search, "XDG_CACHE_HOME": str(work / "cache"), "HF_HUB_OFFLINE": "1"}
    found: dict[str, Counter[str]] = {}
    for number, words in enumerate(commands):
        out = work / f"{number}.json"
        asked = json.dumps([str(code), str(out), below, ["mlxtune", *words]])
        command = [sys.executable, "-P", __file__, "--inside", asked]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr}")
        if words[0] != "convert":
            found.update({part: Counter(calls) for part, calls in json.loads(out.read_text()).items()})
    return found


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rev", help="a revision of this repository instead of the working tree")
    asked.add_argument("--list", action="append", choices=PARTS, default=[], help="print every function of this part")
    asked.add_argument("--below", action="append", metavar="PART=NAME", default=[], help="only what NAME calls")
    asked.add_argument("--inside", help=argparse.SUPPRESS)
    options = asked.parse_args()
    if options.inside:
        code, out, below, words = json.loads(options.inside)
        _inside(Path(code), Path(out), below, words)
        return
    below = dict(text.split("=", 1) for text in options.below)
    with tempfile.TemporaryDirectory() as made:
        work = Path(made).resolve()
        code = check_out(options.rev, work / "code") if options.rev else ROOT
        found = traced(code, work, below)
    for part in PARTS:
        calls = found.get(part, Counter())
        files = Counter(name.partition(":")[0] for name in calls)
        print(f"{part:<12} {len(calls):4} functions  {len(files):3} files  {calls.total():6} calls")
        if part in options.list:
            for name, count in sorted(calls.items()):
                print(f"    {count:6}  {name}")


if __name__ == "__main__":
    main()
