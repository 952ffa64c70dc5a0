"""What a command may change on the disk, and whether it changed anything else.

Every command that the tests run is watched: before and after it a picture is taken of the folders that its words name,
of what lies beside them, of the folder that it runs in, of a home and of the place for temporary files. What differs
outside of the outputs that the command line declares is told at the end of the test.

A picture holds what the file system says of each entry. No program can set the time at which an entry was last changed
(ctime), so that a file with the same one holds the same bytes; they need not be read.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click

from mlxtune.demo.story import FOLDERS
from mlxtune.errors import UserError
from mlxtune.project.file import found as project_of
from mlxtune.project.folder import NAMES
from mlxtune.train.run_folder import ADAPTERS, BEFORE_SAVING, PAGE_FILE

Picture = dict[Path, tuple[int, ...]]
RUN_FILES = (*BEFORE_SAVING, *ADAPTERS)
PROOF_FILES = ("verification.*",)
STORES = "mlxtune/rows"  # where tokenized rows are kept, below a cache folder
HUB_CACHES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")  # variables that name where downloads are kept
PROGRAMS = ("mlxtune", "mlxtune-convert")
found: list[str] = []  # what commands changed that they had no right to, until `told` is asked for it
_base: list[Path] = []  # the folder of all temporary folders of the tests, set by `begin`
_kept: dict[str, Path] = {}  # a home, and places for temporary files and caches, that the commands have; by their names


def begin(base: Path, home: Path, temporary: Path, cache: Path) -> None:
    """Watch commands from now on. base: below which the folders of tests lie, which are looked at as a whole."""
    _base[:] = [base]
    _kept.update(home=home, temporary=temporary, cache=cache)


def told() -> str:
    """What was found since the last time that somebody asked."""
    text = "\n".join(found)
    found.clear()
    return text


@dataclass(frozen=True)
class Output:
    """A folder, and patterns for the names in it that a command may make, change and replace."""

    folder: Path
    names: tuple[str, ...]

    def holds(self, path: Path) -> bool:
        if not path.is_relative_to(self.folder):
            return False
        inside = path.relative_to(self.folder).parts
        return not inside or any(fnmatchcase(inside[0], name) for name in self.names)


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """(the command's name, its options and arguments by their names) of a command line; nothing of one that click
    refuses. words: the program first.
    """
    from mlxtune_convert.cli import cli as converting

    from mlxtune.cli import cli as tuning

    command: click.Command = tuning if Path(words[0]).name == "mlxtune" else converting
    rest, names = words[1:], []
    while isinstance(command, click.Group) and rest and rest[0] in command.commands:
        command, name, rest = command.commands[rest[0]], rest[0], rest[1:]
        names.append(name)
    try:
        given, _, _ = command.make_parser(click.Context(command)).parse_args(list(rest))
    except click.UsageError:
        given = {}
    return " ".join(names), given


def outputs(words: list[str], folder: Path) -> list[Output]:
    """What a command line says that it will write. folder: where it runs."""
    name, given = parsed(words)
    given = _with_project(name, given, folder)
    out = [folder / given[key] for key in ("out", "dst", "html") if isinstance(given.get(key), str)]
    stores = [value.partition("=")[2] for value in given.get("settings") or () if value.startswith("data.cache=")]
    stores += _stores_in_files(given, folder)
    found = [Output(folder / Path(store).expanduser(), ("?" * 32,)) for store in stores]
    if name == "train":
        found += [Output(run, RUN_FILES) for run in out] or [Output(folder / "runs", ("*",))]
    elif name == "demo":
        found += [Output(folder / given.get("out", "demo"), FOLDERS)]
    elif name == "init":
        place = given.get("folder")
        found += [Output(folder / place if isinstance(place, str) else folder, NAMES)]
    elif name == "report" and not out and isinstance(given.get("run"), str):
        found += [Output(folder / given["run"], (PAGE_FILE,))]
    elif name == "rate":
        found += [Output(folder / str(first), ("ratings.*.jsonl",)) for first in (given.get("evaluations") or ())[:1]]
    elif name == "chat" and isinstance(given.get("log"), str):
        log = folder / given["log"]
        found += [Output(log.parent, (glob.escape(log.name),))]
    elif name == "data curate" and out:
        kept = [f"{glob.escape(out[0].stem)}.{what}.jsonl" for what in ("scores", "judge", "review")]
        found += [Output(out[0].parent, (glob.escape(out[0].name), *kept))]
        if isinstance(given.get("left_out"), str):
            left_out = folder / given["left_out"]
            found += [Output(left_out.parent, (glob.escape(left_out.name),))]
    elif name == "verify" and isinstance(given.get("export"), str):
        found += [Output(folder / given["export"], PROOF_FILES)]
    else:
        for path in [*out, *(folder / one for one in given.get("exports", ()))]:
            beside = (f"{glob.escape(path.stem)}.*",) if path.suffix == ".gguf" else ()
            found.append(Output(path.parent, (glob.escape(path.name), *beside)))
    # A folder may be named through a link; what differs is named without.
    return found + [Output(one.folder.resolve(), one.names) for one in found]


def _with_project(name: str, given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same, with what a command takes from mlxtune.yaml of where it is written to."""
    try:
        project = project_of(folder)
    except UserError:
        return given
    if project is None:
        return given
    if name == "train" and not given.get("file") and not given.get("out"):
        return {**given, "out": str(project.out)}
    if name == "report" and not isinstance(given.get("run"), str):
        return {**given, "run": str(project.out)}
    if name == "export" and not given.get("target"):
        return {**given, "exports": [one.out for one in project.exports]}
    return given


def _stores_in_files(given: dict[str, Any], folder: Path) -> Iterator[str]:
    """The folders for tokenized rows that a configuration, or that of a run, names."""
    files = [folder / str(given[key]) / "config.yaml" for key in ("adapter", "out") if given.get(key)]
    if given.get("file"):  # of -c
        files.append(folder / str(given["file"]))
    for file in files:
        if file.is_file() and (named := re.search(r"\bcache: ([^,}\n]+)", file.read_text(errors="replace"))):
            yield named[1].strip("'\"")


def _named(words: list[str], folder: Path) -> Iterator[Path]:
    """Every path that a command line names and that can be there: sources, outputs, values of settings."""
    for value in parsed(words)[1].values():
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and text and "\0" not in text:
                path = folder / text.rpartition("=")[2]
                if len(path.name) < 200:
                    yield path


def _roots(words: list[str], folder: Path) -> set[Path]:
    """The folders to look at: those that hold what is named, where they are the tests' own."""
    roots = set()
    for path in (*_named(words, folder), folder / "runs"):
        for place in (path.parent, path):
            with contextlib.suppress(OSError, RuntimeError):
                whole = place.resolve()
                if whole.is_relative_to(_base[0]) and whole != _base[0] and whole.is_dir():
                    roots.add(whole)
                    break
    return {root for root in roots if not any(other in root.parents for other in roots)}


def picture(folder: Path) -> Picture:
    """What the file system says of a folder and of everything below it. Links are not followed."""
    held: Picture = {}
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            held[place] = _state(os.lstat(place))
            with os.scandir(place) as entries:
                for entry in entries:
                    path = Path(entry.path)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(path)
                    else:
                        held[path] = _state(entry.stat(follow_symlinks=False))
    return held


def _state(status: os.stat_result) -> tuple[int, ...]:
    if stat.S_ISDIR(status.st_mode):  # the time says that a name in it came, or came and went
        return status.st_mode, status.st_mtime_ns
    return status.st_mode, status.st_mtime_ns, status.st_ino, status.st_size, status.st_ctime_ns


class Watch:
    """A command in progress. end: compares, once."""

    def __init__(
        self, words: list[str], folder: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """words: the program first; folder: where it runs; environment: that it has, if it is not ours."""
        named = os.environ if environment is None else environment
        self._caches = [Path(named[name]).resolve() for name in HUB_CACHES if named.get(name)]
        self.words, self.folder = [str(word) for word in words], folder or Path.cwd()
        self._ended = not _base
        if not self._ended:
            self._roots = _roots(self.words, self.folder)
            self._before = self._pictures()
            self._top = _top(self.folder)

    def _pictures(self) -> Picture:
        both: Picture = {}
        for folder in (*self._roots, *_kept.values()):
            both.update(picture(folder))
        return both

    def end(self, killed: bool = False) -> None:
        """killed: by a signal that leaves no time to tidy up."""
        if self._ended:
            return
        self._ended = True
        after = self._pictures()
        allowed = [*outputs(self.words, self.folder), Output(_kept["cache"] / STORES, ("?" * 32,))]
        allowed.append(Output(_kept["cache"], ("huggingface", "uv")))  # hub's own
        allowed += [Output(cache, ("*",)) for cache in self._caches]
        for path in sorted(self._before.keys() | after.keys()):
            old, new = self._before.get(path), after.get(path)
            if old == new or any(output.holds(path) for output in allowed):
                continue
            what = "was made" if old is None else "was removed" if new is None else "was changed"
            if old and new and stat.S_ISDIR(old[0]) and old[0] == new[0]:
                if _had_to_change(path, after.keys() ^ self._before.keys(), allowed):
                    continue
                what = "had something in it that came, or went"
            if old is None and new and stat.S_ISDIR(new[0]) and _leads_to(path, allowed):
                continue
            if not (killed and (_kept["temporary"] in path.parents or ".partial-" in str(path))):
                found.append(f"{path} {what} by: {' '.join(self.words)}")
        appeared = _top(self.folder) - self._top - {output.folder.name for output in allowed}
        appeared -= {Path(name).name for output in allowed for name in output.names}
        if appeared and self.folder not in self._roots:
            found.append(f"{sorted(appeared)} appeared in {self.folder}, where it ran: {' '.join(self.words)}")


def _top(folder: Path) -> set[str]:
    """The names in the folder where a command runs; not the tools' own."""
    return {name for name in os.listdir(folder) if not name.startswith(".") and name != "__pycache__"}


def _leads_to(path: Path, allowed: list[Output]) -> bool:
    """Whether a folder had to be made for an output."""
    return any(output.folder.is_relative_to(path) for output in allowed)


def _had_to_change(path: Path, changed: set[Path], allowed: list[Output]) -> bool:
    """Whether a folder's time may be another: an output lies in it, or the folder that it needs; or what came or went
    there is told by itself.
    """
    if path == _kept["temporary"] or any(path in (output.folder, output.folder.parent) for output in allowed):
        return True
    return any(other.parent == path for other in changed)


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """Python's own, which watches mlxtune's commands."""

    def __init__(self, args: Any, *more: Any, **settings: Any) -> None:
        words = [args] if isinstance(args, str | Path) else [str(word) for word in args]
        ours = bool(words) and Path(words[0]).name in PROGRAMS and not settings.get("shell")
        cwd = settings.get("cwd")
        self._watch = Watch(words, Path(cwd) if cwd else None, settings.get("env")) if ours else None
        super().__init__(args, *more, **settings)

    def wait(self, timeout: float | None = None) -> int:
        status = super().wait(timeout)
        self._look(status)
        return status

    def poll(self) -> int | None:
        status = super().poll()
        if status is not None:
            self._look(status)
        return status

    def _look(self, status: int) -> None:
        if self._watch is not None:
            self._watch.end(killed=status == -9)


def _caches_here() -> dict[str, str]:
    """The folders for downloads as the libraries of this process have them, which a test may have changed."""
    found = {}
    for library, name in (("huggingface_hub.constants", "HF_HUB_CACHE"), ("datasets.config", "HF_DATASETS_CACHE")):
        if library in sys.modules:
            found[name] = str(getattr(sys.modules[library], name))
    return found


def watched_main(main: Any, program: str) -> Any:
    """The `main` of a click command, watched: commands that run in the process of the tests."""

    def run(args: Any = None, *more: Any, **settings: Any) -> Any:
        words = [program, *(sys.argv[1:] if args is None else map(str, args))]
        watch = Watch(words, environment={**os.environ, **_caches_here()})
        try:
            return main(args, *more, **settings)
        finally:
            watch.end()

    return run
