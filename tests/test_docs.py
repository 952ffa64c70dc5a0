"""The pages that are written out of the code agree with it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from mlxtune.config.resolve import KEYS

DOCS = Path(__file__).resolve().parent.parent / "docs"
_spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
assert _spec and _spec.loader
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


def test_the_generated_pages_are_what_the_code_says_today(tmp_path: Path) -> None:
    """By a process of its own: click keeps the help option of a command as it was first asked for."""
    subprocess.run([sys.executable, str(DOCS / "generate.py"), str(tmp_path)], check=True)
    assert len(generate.PAGES) == len(list(tmp_path.iterdir())) > 1
    for name in generate.PAGES:
        assert (DOCS / name).read_text() == (tmp_path / name).read_text(), f"run `make docs` to write {name} again"


def test_every_key_of_the_configuration_has_a_line_with_its_meaning() -> None:
    explained = {}
    for line in (DOCS / "configuration.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            _, key, *_, meaning, _ = line.split("|")
            explained[key.strip(" `")] = meaning.strip()
    assert [key for key in KEYS if "." in key and not explained.get(key)] == []


@pytest.mark.parametrize(
    ("key", "cells"),
    [
        ("data.valid_fraction", ["number > 0 and < 1", "`0.1`"]),
        ("lora.layers", ["`all` or integer", "`all`"]),
        ("data.cap", ["integer >= 1", ""]),
    ],
)
def test_a_line_gives_what_may_be_written_and_what_holds_without_it(key: str, cells: list[str]) -> None:
    (line,) = [line for line in generate.configuration().splitlines() if line.startswith(f"| `{key}` ")]
    assert [cell.strip() for cell in line.split("|")][2:4] == cells
