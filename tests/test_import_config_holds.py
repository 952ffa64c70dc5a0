"""`mlxtune import-config` on files with faults: a file or an error in one line, and nothing is claimed wrongly."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxtune.config.imported import axolotl, axolotl_data, reading
from mlxtune.config.imported.translation import Translation
from mlxtune.config.yaml_text import parse_yaml
from mlxtune.errors import UserError

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "imported"
SMALLEST = {"base_model": "m", "learning_rate": 1e-5, "adapter": "lora", "datasets": [{"path": "p"}]}
# What takes the place of a value: each of another kind, or at a limit.
ODD: tuple[Any, ...] = (
    0,
    -1,
    1.5,
    1e308,
    10**30,
    "",
    "x",
    "0",
    True,
    [],
    [1, 2],
    ["x"],
    {},
    {"x": 1},
    {"x": {"y": []}},
)
DIVISORS = ("micro_batch_size", "batch_size", "num_epochs", "evals_per_epoch", "max_steps", "eval_steps")
ODD_TEXTS = (".inf", "-.inf", ".nan")  # of JSON they are no numbers


def made_of(tree: dict[str, Any], folder: Path) -> Translation:
    file = folder / "theirs.yml"
    file.write_text(json.dumps(tree))
    return reading.read(file)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of a tree, and every item of a list in it."""
    if path:
        yield path
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield from places(tree[key], (*path, key))


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir()))
def test_a_file_with_any_value_changed_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    """Every key once, with a value that chance chooses; those that decide about a division with each of them."""
    whole = parse_yaml((FIXTURES / name).read_text(), name).value
    draw = random.Random(name)
    program = "mlx-lm" if name.startswith("mlx-lm") else "axolotl"
    changed = [(path, odd) for path in places(whole) for odd in draw.sample([*ODD, *ODD_TEXTS], 1)]
    if name == "axolotl-1-qlora.yml":
        changed += [((key,), odd) for key in (*DIVISORS, "lora_rank_pattern") for odd in (*ODD, *ODD_TEXTS)]
    read = 0
    for path, odd in changed:
        tree = copy.deepcopy(whole)
        inner = tree
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = odd
        if path == ("batch_size",):
            tree.pop("gradient_accumulation_steps", None)
        text = re.sub(r'"(-?\.(?:inf|nan)|on|yes)"', r"\1", json.dumps(tree))
        file = tmp_path / "theirs.yml"
        file.write_text(text)
        try:
            reading.read(file, program).to_yaml()
            read += 1
        except UserError as error:
            assert "\n" not in error.message and error.hint, (path, odd, error)
    assert 0 < read < len(changed)


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"batch_size": 8, "micro_batch_size": 0}, "micro_batch_size: expected a whole number of at least 1, got 0"),
        ({"num_epochs": 0, "evals_per_epoch": 4}, "num_epochs: expected a number above 0, got 0"),
        ({"lora_rank_pattern": [1, 2]}, "lora_rank_pattern: expected a table of keys, got [1, 2]"),
        ({"lora_rank_pattern": {"q_proj": "x"}}, "lora_rank_pattern.q_proj: expected a whole number, got 'x'"),
        ({"lora_r": 16.5}, "lora_r: expected a whole number, got 16.5"),
        ({"max_steps": 10, "eval_steps": "x"}, "eval_steps: expected a number, got 'x'"),
        ({"learning_rate": "inf"}, "learning_rate: expected a number, got 'inf'"),
    ],
)
def test_a_value_that_no_setting_can_be_made_of_is_named_with_the_next_step(
    theirs: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        made_of({**SMALLEST, **theirs}, tmp_path)
    assert refused.value.hint == "Correct it there, and import the file again."


def test_a_whole_number_may_be_written_with_a_point(tmp_path: Path) -> None:
    made = made_of({**SMALLEST, "lora_r": 16.0, "sequence_len": 1024.0}, tmp_path)
    assert (made.settings["lora.rank"], made.settings["data.max_tokens"]) == (16, 1024)
    made = made_of({"iters": 600.0, "max_seq_length": 1024.0}, tmp_path)
    assert (made.settings["train.steps"], made.settings["data.max_tokens"]) == (600, 1024)


@pytest.mark.parametrize(
    ("objective", "theirs", "ours"),
    [
        ("orpo", {"orpo_alpha": 0.2, "trl": {"beta": 0.4}}, {"beta": 0.4}),
        ("orpo", {"orpo_alpha": 0.2, "rl_beta": 0.5}, {"beta": 0.5}),
        ("dpo", {"dpo_beta": 0.3}, {"beta": 0.3}),
        ("dpo", {"rpo_alpha": 0.7}, {"beta": 0.1, "sft": 0.7}),
        ("simpo", {}, {"gamma": 0.5, "sft": 1.0}),
        ("simpo", {"cpo_alpha": 0.3, "simpo_gamma": 0.8}, {"gamma": 0.8, "sft": 0.3}),
        ("simpo", {"cpo_alpha": 0}, {"sft": 0.0}),
    ],
)
def test_weights_of_preferences_are_those_that_axolotls_trainer_would_use(
    objective: str, theirs: dict[str, Any], ours: dict[str, float], tmp_path: Path
) -> None:
    preference = made_of({**SMALLEST, "rl": objective, **theirs}, tmp_path).config().preference.model_dump()
    assert {key: preference[key] for key in ours} == ours


def test_what_the_trainer_of_simpo_adds_by_itself_is_as_the_installed_trl_has_it() -> None:
    """Its file is read, not imported: that takes seconds."""
    (package,) = importlib.util.find_spec("trl").submodule_search_locations  # type: ignore[misc, union-attr]
    text = (Path(package) / "experimental" / "cpo" / "cpo_config.py").read_text()
    defaults = dict(re.findall(r"^    (\w+): float = field\(\s+default=([\d.]+)", text, re.MULTILINE))
    for name in ("simpo_gamma", "cpo_alpha"):
        assert float(defaults[name]) == axolotl.HEEDED[name][2]
    assert float(defaults["beta"]) == axolotl.BETA


@pytest.mark.parametrize(
    ("theirs", "key", "why"),
    [
        ({"rl": "ipo", "dpo_label_smoothing": 0.1}, "dpo_label_smoothing", "rl ipo does not heed it"),
        ({"rl": "dpo", "simpo_gamma": 0.5}, "simpo_gamma", "rl dpo does not heed it"),
        ({"rl": "kto", "rpo_alpha": 0.5}, "rpo_alpha", "rl kto does not heed it"),
        ({"rl_beta": 0.5}, "rl_beta", "without rl"),
        ({"rl": "orpo", "orpo_alpha": 0.2, "rl_beta": 0.5}, "orpo_alpha", "takes rl_beta before it"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_ratio", "takes warmup_steps before it"),
    ],
)
def test_a_key_that_axolotl_would_not_heed_is_named_with_the_reason(
    theirs: dict[str, Any], key: str, why: str, tmp_path: Path
) -> None:
    assert why in dict(made_of({**SMALLEST, **theirs}, tmp_path).without)[key]


BRANCHES: tuple[dict[str, Any], ...] = (
    {},
    {"adapter": None},
    {"warmup_steps": 5, "max_steps": 10, "evals_per_epoch": 2, "sample_packing": True, "eval_strategy": "steps"},
    {"lora_target_linear": True, "datasets": [{"path": "p", "type": "alpaca"}], "chat_template": "chatml"},
    *({"rl": objective} for objective in axolotl.HELD_LOSSES),
)


@pytest.mark.parametrize("branch", BRANCHES, ids=str)
def test_no_key_that_is_read_anywhere_is_called_unknown(branch: dict[str, Any], tmp_path: Path) -> None:
    """Each key that the translator's source asks for, on every way through it."""
    source = inspect.getsource(axolotl) + inspect.getsource(axolotl_data)
    asked = set(re.findall(r'\bgiven\.(?:value|text|texts|whole|number|truth|table|tables|has)\(\s*"(\w+)"', source))
    asked |= axolotl.HEEDED.keys()
    assert {"warmup_ratio", "chat_template_kwargs", "rl_beta", "max_steps"} <= asked and len(asked) > 45
    for name in asked - branch.keys() - SMALLEST.keys():
        for value in (1, "some", {"some": 1}):
            try:
                made = made_of({**SMALLEST, **branch, name: value}, tmp_path)
            except UserError:
                continue
            assert "by this name" not in dict(made.without).get(name, ""), name


def test_a_share_of_nothing_is_said_as_it_stands(tmp_path: Path) -> None:
    for theirs, words in (({"val_set_size": 0}, "val_set_size 0: "), ({}, "no val_set_size: ")):
        assert any(line.startswith(words) for line in made_of({**SMALLEST, **theirs}, tmp_path).changed)
