"""Does the working tree do what another revision does? Every file, every loss, every word of every command.

    python tests/same_artefacts.py REV                  the whole recipe with both, some six minutes
    python tests/same_artefacts.py REV --quick          the most telling commands
    python tests/same_artefacts.py --resume-across REV  runs that REV began are resumed by the working tree

Uses the commands alone, none of the modules behind them, so that a revision with other modules can be compared. Exit
status 1 when there is a difference.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import same_files
import same_given
import same_recipe
from one_side import ROOT, Side, check_out

SAID = "said"  # the folder of what commands said, below a side's folder


@dataclass(frozen=True)
class Compared:
    """How one file fares."""

    name: str
    verdict: str  # "equal", "differs", "only before", "only now"; "blind": a command failed with both
    first: str = ""  # the first difference, in words


def compared(
    old: Path, new: Path, leave_out: str = "given/", read: same_files.Reader = same_files.parts
) -> list[Compared]:
    """Every file below two folders, by name. read: what of a file counts."""
    before, after = same_files.walk(old), same_files.walk(new)
    out = []
    for name in sorted({*before, *after}):
        if name.startswith(leave_out):
            continue
        if name not in after:
            out.append(Compared(name, "only before"))
        elif name not in before:
            out.append(Compared(name, "only now"))
        else:
            first = same_files.first_difference(read(before[name], old), read(after[name], new))
            out.append(Compared(name, "differs" if first else "equal", first))
    return out


def run_all(side: Side, commands: list[same_recipe.Command]) -> list[str]:
    """Run them one after the other; which did not end as the recipe says, in words."""
    unlike = []
    for number, command in enumerate(commands, 1):
        said = side.folder / SAID / f"{number:03} {_file_name(command)}.txt"
        status = side.run(command.words, said, command.kill)
        if status != command.status:
            lines = said.read_text(encoding="utf-8").strip().splitlines()
            why = next((line for line in lines if line.startswith("error")), lines[-1])
            unlike.append(f"{' '.join(command.words)}: exit {status}, not {command.status}: {why}")
    return unlike


def _file_name(command: same_recipe.Command) -> str:
    """Short enough for a file, and still telling: `train runs-plain`."""
    words = command.words[1:] if command.words[0] == "mlxtune" else command.words
    of_interest = [words[0], words[words.index("--out") + 1]] if "--out" in words else words[:3]
    return " ".join(of_interest).replace("/", "-")


def both(revision: str, commands: list[same_recipe.Command], work: Path, quick: bool) -> list[Compared]:
    """Run the commands with the revision and with the working tree, side by side."""
    sides = _sides(revision, work, ("old", "new"))
    given = _given(work, quick)
    for side in sides:
        shutil.copytree(given, side.folder / "given")
    with ThreadPoolExecutor() as pool:
        before, now = pool.map(run_all, sides, [commands, commands])
    for side in sides:
        side.close()
    # A command that fails with both shows nothing: the recipe must be mended.
    blind = [Compared(f"{SAID}/", "blind", text) for text in before if text in now]
    return blind + compared(*(side.folder for side in sides))


def across(revision: str, work: Path) -> list[Compared]:
    """Runs that the revision begins and a SIGKILL ends, resumed by the working tree; against undisturbed ones."""
    before, now = _sides(revision, work, ("same", "same"))
    shutil.copytree(_given(work, False), before.folder / "given")
    models, runs = same_recipe.across()
    run_all(before, models)
    out = []
    for name, line in runs.items():
        steps = (
            (before, f"~7 {line} --out broken/{name}"),
            (now, f"train --resume --out broken/{name}"),
            (now, f"{line} --out whole/{name}"),
        )
        ends = []
        for number, (side, text) in enumerate(steps):
            command = same_recipe.command(text)
            ends.append(side.run(command.words, side.folder / SAID / f"{name} {number}.txt", command.kill))
        if ends != [-9, 0, 0]:
            out.append(Compared(f"{name}/", "differs", f"the commands ended with {ends}, not [-9, 0, 0]"))
            continue
        for one in compared(now.folder / "broken" / name, now.folder / "whole" / name, read=same_files.computed):
            out.append(Compared(f"{name}/{one.name}", one.verdict, one.first))
    before.close()
    now.close()
    return out


def _sides(revision: str, work: Path, folders: tuple[str, str]) -> tuple[Side, Side]:
    code = check_out(revision, work / "code")
    sides = (Side(code, work / folders[0], work / "home-old"), Side(ROOT, work / folders[1], work / "home-new"))
    for label, side in zip((revision, "working tree"), sides, strict=True):
        print(f"{label}: {', '.join(side.places().values())}", flush=True)
    return sides


def _given(work: Path, quick: bool) -> Path:
    given = work / "given"
    given.mkdir()
    same_given.give(given, quick)
    return given


def table(rows: list[Compared], whole: bool) -> str:
    """Differences in full; of what is equal the number for each folder, or with `whole` every file."""
    lines = [f"{row.verdict:<12} {row.name}   {row.first}".rstrip() for row in rows if whole or row.verdict != "equal"]
    equal = Counter(row.name.partition("/")[0] for row in rows if row.verdict == "equal")
    if not whole:
        lines += [f"{'equal':<12} {folder}: {count} files" for folder, count in sorted(equal.items())]
    counts = Counter(row.verdict for row in rows)
    lines.append(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    return "\n".join(lines)


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("revision", nargs="?", help="what git knows it by")
    asked.add_argument("--quick", action="store_true", help="the most telling commands")
    asked.add_argument("--resume-across", metavar="REV", help="resume runs that REV began")
    asked.add_argument("--all", action="store_true", help="list what is equal as well")
    asked.add_argument("--keep", metavar="DIR", type=Path, help="work in this new folder and leave it")
    options = asked.parse_args()
    if bool(options.revision) == bool(options.resume_across):
        asked.error("REV or --resume-across REV")
    with tempfile.TemporaryDirectory() as made:
        work = (options.keep or Path(made)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if options.resume_across:
            rows = across(options.resume_across, work)
        else:
            rows = both(options.revision, same_recipe.commands(options.quick), work, options.quick)
    print(table(rows, options.all))
    return int(any(row.verdict != "equal" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
