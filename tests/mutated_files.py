"""Damaged files of every kind that strangers hand over, each given to a command that reads it: how does it end?

    python tests/mutated_files.py --count 10000
    python tests/mutated_files.py --kind parquet --count 500 --seed 7
    python tests/mutated_files.py --case "parquet 7 123"

Each command runs in a process of its own, forked from one that has imported everything. A finding is a traceback, a
signal, another exit status than 0 and 2, more than one error line, a control character in what is printed, a change
outside the declared output, something left behind by a refusal, more than 1 GB, more than 5 seconds, and weights that
are damaged and used without a word. Its number, for --case, makes the same damage again.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import artefacts
import damage
import warm
from artefacts import KINDS, NEWEST, Command
from mlxtune_convert.shown import CONTROL
from test_written_texts import instructions

SECONDS = 5.0  # of a core
HUNG = 60.0  # seconds until a command that waits is killed
MEMORY = 1 << 30  # bytes beyond those of the process that it was forked from
ADDRESSES = 6 << 30  # bytes that it may ask for
NAMES = (
    "a\nFROM evil",
    "a b",
    "a'b",
    '"a"',
    "-a",
    "a\x1b]0;evil\x07",
    "é",
    "a;touch x",
    "$(touch x)",
    "..a",
    "x" * 300,
)
SAID = ("note: ", "error: ", "warning: ")


@dataclass(frozen=True)
class Case:
    """kind: of KINDS; seed and number: of the damage, which is the same whenever they are; a number below 0: none, and
    the reader in that place from the end.
    """

    kind: str
    seed: int
    number: int

    def __str__(self) -> str:
        return f"{self.kind} {self.seed} {self.number}"


@dataclass(frozen=True)
class Ended:
    """done: the damage, in words; command: the line; status: of the command; said: what it printed on standard error;
    fault: what is wrong with how it ended, or "".
    """

    case: Case
    done: str
    command: str
    status: int
    said: str
    seconds: float
    peak: int
    fault: str


def cases(count: int, kinds: list[str], seed: int) -> Iterator[Case]:
    """`count` cases, as many of each kind as of any other."""
    for number in range(count):
        yield Case(kinds[number % len(kinds)], seed, number // len(kinds))


def undamaged(kinds: list[str]) -> Iterator[Case]:
    """Every command on the files as they are: it must do what it is for, or its refusals say nothing."""
    for kind in kinds:
        for number in range(len(KINDS[kind].readers)):
            yield Case(kind, 0, -1 - number)


def run(case: Case, root: Path, work: Path) -> Ended:
    """Damage a copy, run the command, judge. root: the undamaged files; work: an empty folder, which is removed."""
    kind, chance = KINDS[case.kind], random.Random(str(case))
    file, command = chance.choice(kind.files), chance.choice(kind.readers)
    undamaged = case.number < 0
    if undamaged:
        file, command = kind.files[case.number % len(kind.files)], kind.readers[case.number]
    for name in ("in", "out", "here", "home", "tmp", "elsewhere", "cache"):
        (work / name).mkdir(parents=True)
    for name in kind.copied:
        _copy(root / name, work / "in" / name)
    (work / "elsewhere/secret.txt").write_text("a secret of somebody else")
    (work / "x").write_text("beside the folders")
    out, done = "made", ""
    if undamaged:
        done = "nothing"
    elif case.kind == "modelfile" and chance.random() < 0.2:
        out = chance.choice(NAMES)
        done = f"the name {out!r}"
    else:
        newest = max((path.name for path in work.glob("in/run/checkpoints/step-*")), default="")
        path = work / "in" / file.replace(NEWEST, newest)
        if case.kind == "checkpoint" and path.suffix == ".safetensors" and chance.random() < 0.7:
            done = _with_digest(path, chance, work / "elsewhere")
        else:
            done = damage.damage(path, chance, work / "elsewhere")
    places = {"in": str(work / "in"), "out": str(work / "out" / out), "root": str(root), "file": file}
    line = command.line(places)
    declared = [work / "out", work / "cache", *([Path(command.own.format_map(places))] if command.own else [])]
    before = listed([work, root], declared)
    environment = {**os.environ, "COLUMNS": "200", "HOME": str(work / "home"), "TMPDIR": str(work / "tmp")}
    environment |= {"XDG_CACHE_HOME": str(work / "cache")}
    here = Path.cwd()
    os.chdir(work / "here")
    try:
        took = warm.measured(line, environment, command.given, ADDRESSES, HUNG)
    finally:
        os.chdir(here)
    after = listed([work, root], declared)
    changed = sorted(str(path) for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    fault = fault_of(took, changed) or kept(took.result.returncode, command, work / "out")
    fault = fault or silent(took, command, done) or wrong_modelfile(work / "out")
    if undamaged and took.result.returncode and not command.refuses:
        fault = fault or "an undamaged file was refused"
    _remove(work)
    status, said = took.result.returncode, took.result.stderr
    return Ended(case, f"{file}: {done}", " ".join(line), status, said, took.seconds, took.peak, fault)


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


def _with_digest(path: Path, chance: random.Random, elsewhere: Path) -> str:
    """Damage a checkpoint's tensors, and let its state.json agree."""
    import hashlib
    import json

    done = damage.damage(path, chance, elsewhere)
    if path.is_file() and os.path.getsize(path):
        state = path.with_name("state.json")
        whole = json.loads(state.read_text())
        if stat.S_ISREG(path.stat().st_mode):
            whole["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        state.write_text(json.dumps(whole))
    return done.replace(damage.MUST_SAY, "")


def listed(folders: list[Path], declared: list[Path]) -> dict[str, tuple[object, ...]]:
    """Everything below the folders but the declared outputs: kind, size, time of change, target of a link."""
    found: dict[str, tuple[object, ...]] = {}
    waiting = [os.fspath(folder) for folder in folders]
    left_out = {os.fspath(path) for path in declared}
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.path in left_out:
                    continue
                facts = entry.stat(follow_symlinks=False)
                is_folder = stat.S_ISDIR(facts.st_mode)
                # A folder's own time tells nothing: what is in it is listed.
                known = () if is_folder else (facts.st_size, facts.st_mtime_ns, facts.st_ino)
                found[entry.path] = (facts.st_mode, *known, os.readlink(entry.path) if entry.is_symlink() else "")
                if is_folder and facts.st_mode & stat.S_IRUSR:
                    waiting.append(entry.path)
    return found


def fault_of(took: warm.Measured, changed: list[str]) -> str:
    """What is wrong with how a command ended and what it printed; "" where nothing is."""
    status, said = took.result.returncode, took.result.stderr
    if took.late:
        return f"no end within {HUNG:g} seconds"
    if "Traceback" in said or status not in (0, 2):
        return f"exit status {status}"
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if status == 2 and (len(errors) != 1 or len(errors[0]) > 1500):
        return f"{len(errors)} error lines, the first of {len(errors[0]) if errors else 0} letters"
    printed = CONTROL.search(said + took.result.stdout)
    if printed:
        return f"a control character: {printed[0]!r}"
    if changed:
        return f"changed: {', '.join(changed[:3])}"
    if took.peak > MEMORY:
        return f"{took.peak >> 20} MiB"
    return f"{took.seconds:.1f} seconds" if took.seconds > SECONDS else ""


def kept(status: int, command: Command, out: Path) -> str:
    """A refusal leaves nothing; a folder of its own may hold what was there."""
    left = [path.name for path in out.iterdir()]
    if status == 2 and left and "check" not in command.words:
        return f"left: {left}"
    if status == 0 and "{out}" in command.words and not left:
        return "nothing was made"
    hidden = [name for name in left if name.startswith(".") and ".partial" in name]
    return f"left: {hidden}" if hidden else ""


def silent(took: warm.Measured, command: Command, done: str) -> str:
    """Weights that cannot be what they were, used all the same, and nothing said."""
    if took.result.returncode or not command.weights or damage.MUST_SAY not in done:
        return ""
    told = any(line.startswith(SAID) for line in took.result.stderr.splitlines())
    return "" if told else "damaged weights were used without a word"


def wrong_modelfile(out: Path) -> str:
    """A Modelfile holds the instructions that we write, and none of a stranger's."""
    for file in out.glob("*Modelfile"):
        found = [command for command, _ in instructions(file.read_text())]
        if found.count("FROM") != 1 or set(found) - {"FROM", "ADAPTER", "TEMPLATE", "SYSTEM", "PARAMETER stop"}:
            return f"the Modelfile has {found}"
    return ""


def _remove(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)


def _begin(environment: dict[str, str]) -> None:
    warm.begin_in(environment)


def _one(given: tuple[Case, Path]) -> Ended:
    case, root = given
    with tempfile.TemporaryDirectory() as name:
        return run(case, root, Path(name) / "case")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS), action="append", help="only this one (may be given again)")
    parser.add_argument("--case", action="append", help="one finding again: 'KIND SEED NUMBER'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--show", action="store_true", help="how every case ended")
    asked = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1", "NO_COLOR": "1"}
    kinds = asked.kind or list(KINDS)
    chosen = [*undamaged(kinds), *cases(asked.count, kinds, asked.seed)]
    if asked.case:
        parts = [re.fullmatch(r"(.+) (\d+) (-?\d+)", text) for text in asked.case]
        chosen = [Case(part[1], int(part[2]), int(part[3])) for part in parts if part]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "root"
        root.mkdir()
        warm.begin_in(dict(os.environ))
        artefacts.make_models(root)
        artefacts.make(root)
        warm.end()
        statuses: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
        with get_context("fork").Pool(asked.jobs, _begin, (dict(os.environ),)) as pool:
            for number, ended in enumerate(pool.imap_unordered(_one, [(case, root) for case in chosen]), 1):
                counts = statuses.setdefault(ended.case.kind, Counter())
                counts[str(ended.status)] += 1
                if ended.fault or asked.show or asked.case:
                    print(f"{ended.case}: {ended.fault or 'well'} ({ended.seconds:.1f} s, {ended.peak >> 20} MiB)")
                    print(f"    {ended.done[:300]!r}\n    {ended.command}\n    exit status {ended.status}")
                    print("    " + ended.said.strip()[-800:].replace("\n", "\n    "), flush=True)
                counts["findings"] += bool(ended.fault)
                if number % 500 == 0:
                    print(f"{number} of {len(chosen)}", flush=True)
    for kind, counts in statuses.items():
        print(f"{kind}: {dict(counts)}")
    findings = sum(counts["findings"] for counts in statuses.values())
    print(f"{len(chosen)} damaged files, {findings} findings")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
