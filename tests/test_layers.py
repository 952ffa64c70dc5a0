"""Imports point downwards, the file formats stand alone, and asking for help loads nothing heavy."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from mlxtune.cli import cli

ROOT = Path(__file__).resolve().parent.parent
# From the bottom up; rooms on one line know nothing of each other.
LAYERS = (
    ("mlxtune_convert",),
    ("mlxtune.errors", "mlxtune.splitmix", "mlxtune.durations"),
    ("mlxtune.machine",),
    ("mlxtune.config",),
    ("mlxtune.data",),  # holds rooms alone
    ("mlxtune.data.rows",),
    ("mlxtune.data.template",),
    ("mlxtune.data.chat",),
    ("mlxtune.data.dataset",),
    ("mlxtune.data.survey",),
    ("mlxtune.model",),
    ("mlxtune.adapter",),
    ("mlxtune.compute",),
    ("mlxtune.evaluate",),
    ("mlxtune.train",),
    ("mlxtune.ship",),
    ("mlxtune.make", "mlxtune.presets", "mlxtune.report"),
    ("mlxtune.demo", "mlxtune.project"),
    ("mlxtune.api",),
    ("mlxtune.bench", "mlxtune.selftest"),
    ("mlxtune.cli",),
    ("mlxtune.__main__",),
)
RANKS = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
HEAVY = ("mlx", "mlx_lm", "torch", "transformers", "datasets")


def _modules() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    found = {}
    for root in (ROOT / "mlxtune", ROOT / "convert" / "mlxtune_convert"):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import below a node, those inside functions too; not what only the type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.orelse:
                yield from _statements(ast.Module([statement], []))
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        else:
            yield from _statements(child)


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """The modules that a source imports; `from a import b` is a.b when that is a module."""
    package = module if is_package else module.rpartition(".")[0]
    found = set()
    for statement in _statements(ast.parse(source)):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        else:
            base = importlib.util.resolve_name("." * statement.level + (statement.module or ""), package)
            for alias in statement.names:
                name = f"{base}.{alias.name}"
                found.add(name if name in MODULES else base)
    return found


def room(module: str) -> str:
    """The package or module of LAYERS that a module belongs to, or an empty string."""
    return max((name for name in RANKS if f"{module}.".startswith(f"{name}.")), key=len, default="")


IMPORTS = {
    name: imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py") for name, path in MODULES.items()
}


def test_every_module_has_a_place_in_the_layers() -> None:
    assert len(MODULES) > 30
    assert [name for name in MODULES if name != "mlxtune" and not room(name)] == []
    assert [name for name in RANKS if name not in MODULES] == []


def test_imports_inside_functions_are_seen_and_those_for_the_type_checker_are_not() -> None:
    source = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nelse:\n    import gguf\n"
        "def f():\n    with x:\n        from mlxtune import config, __version__\n    from ..data import chat\n"
    )
    assert imports(source, "mlxtune.model.load") == {"typing", "gguf", "mlxtune.config", "mlxtune", "mlxtune.data.chat"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"mlxtune"}))
def test_a_module_imports_only_its_own_room_and_lower_ones(module: str) -> None:
    own = room(module)
    for other in IMPORTS[module]:
        if room(other) and room(other) != own:
            assert RANKS[room(other)] < RANKS[own], f"{module} imports {other}, which is above or beside it"


def test_importing_the_package_reads_only_the_backend_and_the_version() -> None:
    assert {
        name for name in IMPORTS["mlxtune"] if name.partition(".")[0] in ("mlxtune", "mlxtune_convert", *HEAVY)
    } == {"mlxtune.machine.backend", "mlxtune_convert"}
    assert not IMPORTS["mlxtune_convert"] - {"__future__"}


def test_the_file_formats_import_no_framework_and_nothing_of_mlxtune() -> None:
    formats = [name for name in MODULES if room(name) == "mlxtune_convert"]
    for module in formats:
        assert not {name.partition(".")[0] for name in IMPORTS[module]} & {*HEAVY, "mlxtune"}, module
    script = (
        f"import sys\nsys.path.insert(0, {str(ROOT / 'convert')!r})\nimport {', '.join(formats)}\nprint(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT / "tests"
    )
    assert not set(done.stdout.split()) & {*HEAVY, "mlxtune"}


def _commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from _commands(child, (*path, name))


COMMANDS = dict(_commands(cli))
HELP = """
import contextlib, io, json, sys
from mlxtune.cli import main
answers = []
for path in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main([*path, "--help"])
        except SystemExit as end:
            code = end.code
    loaded = sorted({name.partition(".")[0] for name in sys.modules})
    answers.append({"code": code, "text": out.getvalue(), "loaded": loaded})
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, ...], dict[str, Any]]:
    """What every command answers to --help, and what was loaded by then."""
    done = subprocess.run(
        [sys.executable, "-c", HELP, json.dumps(list(COMMANDS))],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    return dict(zip(COMMANDS, json.loads(done.stdout), strict=True))


def test_the_walk_finds_all_commands() -> None:
    verbs = {"demo", "doctor", "bench", "convert", "train", "eval", "generate", "chat", "fuse", "export"}
    assert {(verb,) for verb in verbs} | {(), ("data",), ("data", "show")} <= set(COMMANDS)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "mlxtune")
def test_help_ends_well_without_loading_a_framework(path: tuple[str, ...], answers: dict[Any, Any]) -> None:
    answer = answers[path]
    assert answer["code"] == 0
    assert answer["text"].startswith(f"Usage: {' '.join(('mlxtune', *path))} ")
    assert not set(answer["loaded"]) & set(HEAVY)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "mlxtune")
def test_help_begins_with_one_line_and_shows_how_to_call_the_command(
    path: tuple[str, ...], answers: dict[Any, Any]
) -> None:
    paragraphs = (COMMANDS[path].help or "").split("\n\n")
    assert paragraphs[0].strip() and "\n" not in paragraphs[0].strip()
    assert paragraphs[0].rstrip().endswith(".")
    lines = [line.strip() for line in answers[path]["text"].splitlines()]
    if path and isinstance(COMMANDS[path], click.Group):  # lists its commands instead
        assert all(any(line.startswith(f"{name} ") for line in lines) for name in COMMANDS[path].commands)
    else:
        assert any(f"{line} ".startswith(f"{' '.join(('mlxtune', *path))} ") for line in lines)
