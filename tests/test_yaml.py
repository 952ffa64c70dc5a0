"""Configurations as files: what is written means the same to every reader of YAML, and what is read is only data."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ruamel.yaml import YAML

from mlxtune.config import resolve
from mlxtune.config.yaml_text import LARGEST, parse_yaml, write_yaml
from mlxtune.errors import UserError

# The file of a run of version 0.1.0, which wrote YAML 1.1 with PyYAML.
OLDER = Path(__file__).with_name("older_config.yaml")

# Words that some reader takes for no text, and signs that end or break one.
WORDS = [
    *["off", "yes", "y", "1e5", "1e-05", ".5", "012", "08", "0o17", "0x1f", "0b11", "1:30", "1_000", "2025-01-31"],
    *["~", "null", "true", ".nan", "<<", "=", "---", "...", "a", "é", "😀", ".", "e", "+", "9", "0", "_"],
    *[*":#-?!&*%@`'\"{}[],|>\\ \n\t\r\x1b\x7f\x85\u2028\ufeff"],
]


def text_of(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.choice([1, 1, 1, 2, 3, 5, 40])))


def tree_of(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random() if depth < 4 else 1.0
    if kind < 0.2:
        return [tree_of(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if kind < 0.4 or depth == 0:
        return {text_of(rng): tree_of(rng, depth + 1) for _ in range(rng.randint(0, 3))}
    numbers = [1e-5, 1e17, 0.5, -3.0, 1e300, 5, 0, -(10**30), rng.random() * 10.0 ** rng.randint(-30, 30)]
    return rng.choice([*numbers, True, False, None]) if kind < 0.6 else text_of(rng)


def test_what_is_written_is_read_alike_by_every_reader() -> None:
    rng = random.Random(0)
    for _ in range(300):
        tree = tree_of(rng)
        text = write_yaml(tree)
        assert parse_yaml(text, "").value == tree
        assert yaml.safe_load(text) == tree, "YAML 1.1"
        assert YAML(typ="safe", pure=True).load(text) == tree, "YAML 1.2, with octal numbers and dates"


def test_the_file_of_an_older_run_means_what_it_meant() -> None:
    loaded = resolve.load(OLDER)
    texts = {"a": "1e5", "b": ".5", "c": "off", "d": "2025-01-31", "e": "null", "f": "größe: 1 # x", "h": "1e+5"}
    texts |= {"i": "0o17", "j": "08", "k": "012", "l": "0x1f", "m": "1:30", "n": "1_000", "y": "y", "q": "a\nb\n"}
    texts |= {"r": " x ", "s": "<<", "t": "=", "u": "\x1b[0m\ttab", "w": "~", "long": "a long text " * 12}
    others = {"g": 1e-7, "o": True, "p": None, "v": 1e17, "list": [1, "2", None, True, []]}
    kwargs = {**texts, **others, "deep": {"10": {"off": "yes"}}}
    assert loaded.data.template_kwargs == kwargs
    assert loaded.data.columns == {"no": "prompt", "08": "answer"} and loaded.data.date == "2024-02-29"
    assert [(source.path, source.weight) for source in loaded.data.mixture()] == [("/data/on", 1e-5), ("0o17", None)]
    assert (loaded.train.lr, loaded.train.epochs, loaded.train.checkpoint_layers) == (1e-5, 0.5, 2)
    assert loaded.train.sample_prompts == ["Yes", "Who?\nMe: you", " - a", "#b"]
    assert (loaded.model.path, loaded.data.cache, loaded.train.memory_limit, loaded.fast.head) == ("1e5", *["off"] * 3)


def test_the_file_of_an_older_run_written_again_loads_equal(tmp_path: Path) -> None:
    for file in (OLDER, None, "qlora"):
        loaded = resolve.load(file)
        (tmp_path / "c.yaml").write_text(loaded.to_yaml(), encoding="utf-8")
        assert resolve.load(tmp_path / "c.yaml") == loaded
        assert resolve.load(tmp_path / "c.yaml").to_yaml() == loaded.to_yaml()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &x [1]\nb: *x\n", "line 1: not valid YAML (the anchor &x; leave it out)"),
        ("a: 1\nb: &b [*a, *a]\n", "line 2: not valid YAML (the anchor &b; leave it out)"),
        ("a: 1\nb: [*a]\n", "line 2: not valid YAML (the alias *a; write the value out)"),
        ("&a [*a]\n", "line 1: not valid YAML (the anchor &a; leave it out)"),
        ("a:\n  <<: {b: 1}\n", "line 2: not valid YAML (the merge key <<; write its keys out)"),
        ("a: !!python/name:os.system\n", "line 1: not valid YAML (the tag tag:yaml.org,2002:python/name:os.system"),
        ("a:\n- !mine {b: 1}\n", "line 2: not valid YAML (the tag !mine; leave it out)"),
        ("a: !!binary aGk=\n", "line 1: not valid YAML (the tag tag:yaml.org,2002:binary; leave it out)"),
        ("? [a]\n: 1\n", "line 1: not valid YAML (a list or a section cannot be a key)"),
        (f"a: -{'9' * 5000}\n", "line 1: not valid YAML (a number of 5,001 digits)"),
        ("a: 1\n---\nb: 2\n", "line 2: not valid YAML ("),
        ("a: \ud800\n", "not valid YAML ("),
        ('a: "\\UFFFFFFFF"\n', "not valid YAML ("),
    ],
)
def test_what_stands_for_something_else_is_refused_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "c.yaml")
    assert caught.value.message.startswith("c.yaml") and problem in caught.value.message
    assert "\n" not in caught.value.message


def test_the_same_signs_inside_of_a_text_are_a_text() -> None:
    assert parse_yaml("a: '*x'\nb: 1 * 2\n'<<': '&x'\n", "").value == {"a": "*x", "b": "1 * 2", "<<": "&x"}
    digits = "0x" + "f" * 20_000
    assert parse_yaml(f"a: {digits}\n", "").value == {"a": digits}
    with pytest.raises(UserError, match=r"train\.seed: should be a valid integer"):
        resolve.load(None, (f"train.seed={digits}",))


@pytest.mark.parametrize("opening", ["[", "- ", "? "])
def test_nesting_without_end_is_refused_at_once(opening: str) -> None:
    began = time.process_time()
    with pytest.raises(UserError, match="nested too deeply"):
        parse_yaml(opening * 20_000, "c.yaml")
    assert time.process_time() - began < 2


def test_a_file_without_end_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    """4 GB, of which the file system stores nothing."""
    with (tmp_path / "c.yaml").open("wb") as file:
        file.truncate(4 << 30)
    message = rf"c\.yaml: too large for a configuration \(more than {LARGEST:,} characters\)"
    with pytest.raises(UserError, match=message):
        resolve.load(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text(f"# {'ö' * LARGEST}\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        resolve.load(tmp_path / "c.yaml")
