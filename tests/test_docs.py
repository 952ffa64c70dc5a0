"""The pages that are written out of the code agree with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mlxtune.config.resolve import KEYS

DOCS = Path(__file__).resolve().parent.parent / "docs"
_spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
assert _spec and _spec.loader
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


@pytest.mark.parametrize("name", generate.PAGES)
def test_a_generated_page_is_what_the_code_says_today(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == generate.PAGES[name](), f"run `make docs` to write {name} again"


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
        ("data.valid_fraction", ["number > 0 < 1", "`0.1`"]),
        ("lora.layers", ["`all` or integer", "`all`"]),
        ("data.cap", ["integer >= 1", ""]),
    ],
)
def test_a_line_gives_what_may_be_written_and_what_holds_without_it(key: str, cells: list[str]) -> None:
    (line,) = [line for line in generate.configuration().splitlines() if line.startswith(f"| `{key}` ")]
    assert [cell.strip() for cell in line.split("|")][2:4] == cells
