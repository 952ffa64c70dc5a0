"""The linter, the formatter and the type checker agree; files stay short and name no machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import density
import pytest
from conftest import LONG
from mlxtune_convert.sizes import size

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    path
    for top in ("mlxtune", "convert", "configs", "tests", "docs", ".github", "Makefile", "README.md", "pyproject.toml")
    for path in ([ROOT / top] if (ROOT / top).is_file() else (ROOT / top).rglob("*"))
    if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
)
# Places that exist on one machine only; not a part of an address such as example.org/home/page.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:tmp|root|work|home|opt|mnt|Users)/")
LONGEST = 400


def _passes(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_has_nothing_to_say() -> None:
    _passes("ruff", "check", ".")


def test_every_file_is_formatted() -> None:
    _passes("ruff", "format", "--check", ".")


def test_the_type_checker_has_nothing_to_say() -> None:
    _passes("mypy")


def test_the_walk_finds_the_project() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in FILES}
    assert {
        "Makefile",
        "mlxtune/config/resolve.py",
        "configs/qlora.yaml",
        "tests/tiny.py",
        ".github/workflows/test.yml",
    } <= names


@pytest.mark.parametrize("text", ["open('/tmp{}x')", '"/home{}me"', "cd /work{}main", "/Users{}me/model"])
def test_a_machine_path_would_be_noticed(text: str) -> None:
    assert MACHINE_PATH.search(text.format("/"))


def test_no_file_names_a_path_of_one_machine() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8", errors="replace")
        found = [number for number, line in enumerate(text.splitlines(), 1) if MACHINE_PATH.search(line)]
        assert not found, f"{path.relative_to(ROOT)}: lines {found}"


def test_every_size_for_people_goes_through_one_function() -> None:
    """mlxtune_convert.sizes: one unit in all messages."""
    assert [size(count) for count in (0, 512, 2_000_000_000, 94_204_000, 3_413_000_000, 1 << 30)] == [
        *("0 bytes", "512 bytes", "2 GB", "94.20 MB", "3.41 GB", "1.07 GB"),
    ]
    own = re.compile(r"\} ?[kKMGT]i?B\b")
    assert own.search('f"{size / 1e6:.0f} MB"')
    product = [path for path in FILES if path.suffix == ".py" and "tests" not in path.parts]
    found = [path.name for path in product if own.search(path.read_text(encoding="utf-8"))]
    assert len(product) > 150 and not found


def test_every_python_file_is_short_enough_to_read() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in FILES
        if path.suffix == ".py"
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_the_files_that_begin_first_are_there() -> None:
    assert len(set(LONG)) == len(LONG) > 10
    assert [name for name in LONG if not (ROOT / "tests" / f"test_{name}.py").is_file()] == []


def test_every_field_of_a_dataclass_is_explained_where_it_stands() -> None:
    sources = [density.Source.of(path) for path in FILES if path.suffix == ".py" and "tests" not in path.parts]
    assert sum(density.fields(source) for source in sources) > 500
    assert [place for source in sources for place in density.unexplained_fields(source)] == []


def test_public_functions_say_the_shapes_of_their_arrays() -> None:
    sources = [density.Source.of(path) for path in FILES if path.suffix == ".py" and "tests" not in path.parts]
    assert sum(density.array_functions(source) for source in sources) > 100
    assert [place for source in sources for place in density.shapeless_arrays(source)] == []
