"""Runs that went wrong in planted ways: their page names the cause and the key to turn, and says nothing of the kind of
a healthy one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny

from mlxtune.config.resolve import Config
from mlxtune.evaluate.forgetting.report import FIX
from mlxtune.evaluate.observations import of_answers, of_run, of_training
from mlxtune.evaluate.observations.observe import observations_of_run
from mlxtune.report.run_record import read_run
from mlxtune.report.sections import observations
from mlxtune.train import events

ROWS = tiny.conversations(64)
NEW = tiny.conversations(80)[64:]  # questions that no row of ROWS has
QUICK = (
    *("train.batch_rows=8", "train.lr=5e-3", "train.steps=4", "train.eval_every=2", "train.warmup_steps=2"),
    *("train.save_every=0", "lora.rank=4"),
)
LONGER = "The answer is {}, and there is much more that one could say of it, if there were a reason to."
LEARNS = ("train.steps=16", "train.eval_every=4")
OVERFITS = (
    *("train.steps=32", "train.eval_every=4", "train.lr=1e-2", "train.schedule=constant", "lora.rank=16"),
    "lora.train_also=[head,embeddings]",
)
# Name -> (training rows, held-out rows, settings, what is observed first, the key that is named).
PLANTED: dict[str, tuple[list[Any], list[Any], Sequence[str], str, str]] = {
    "rate": (
        *(ROWS, NEW, (*LEARNS, "train.lr=1", "lora.train_also=[head]")),
        *("learning rate too high", "train.lr"),
    ),
    # The held-out rows show what is to be learned up to their last word: of that, training makes the model certain.
    "overfitting": (
        *(tiny.conversations(56, "The answer is aaaa."), tiny.conversations(72, "The answer is bbbb.")[56:]),
        *(OVERFITS, "overfitting", "train.patience"),
    ),
    "cut": (tiny.conversations(64, LONGER), NEW, ("data.max_tokens=72",), "answers are cut", "data.max_tokens"),
    "template": (ROWS, NEW, ("data.template=alpaca",), "wrong template", "data.template"),
    "few": (ROWS[:8], NEW, (), "too little data", "data.sources"),
    "leak": (ROWS, ROWS[:16], (), "validation rows are trained on", "data.valid_fraction"),
}


def trained(tmp_path: Path, model: Path, train: list[Any], valid: list[Any], settings: Sequence[str]) -> Path:
    tiny.write_jsonl(tmp_path / "data" / "train.jsonl", train)
    tiny.write_jsonl(tmp_path / "data" / "valid.jsonl", valid)
    return tiny.trained(model, tmp_path / "data", tmp_path / "run", *QUICK, *settings)


def page_says(run: Path) -> str:
    """The observations of a run's page, as text."""
    return re.sub(r"<[^>]*>", "", observations.section(read_run(run), ()).body)


@pytest.mark.parametrize("name", PLANTED)
def test_the_page_names_what_went_wrong_and_the_key_to_turn(tmp_path: Path, hf_model: Path, name: str) -> None:
    train, valid, settings, cause, key = PLANTED[name]
    run = trained(tmp_path, hf_model, train, valid, settings)
    found = observations_of_run(events.read(run))
    assert cause in [one["observation"] for one in found], found
    said = page_says(run)
    assert cause in said and key in said and "Likely fix" in said
    others = {one["observation"] for one in found} - {cause}
    assert others <= ({"too little data"} if name == "overfitting" else set())


def test_nothing_is_observed_of_a_healthy_run(tmp_path: Path, hf_model: Path) -> None:
    run = trained(tmp_path, hf_model, ROWS, NEW, LEARNS)
    assert observations_of_run(events.read(run)) == []
    assert "Nothing was found that looks wrong" in page_says(run)


def test_every_key_that_a_fix_names_is_one() -> None:
    known = set()
    for section, keys in Config().model_dump().items():
        known |= {f"{section}.{key}" for key in keys}
    named = set(observations.KEY.findall(FIX))
    for room in (of_answers, of_run, of_training):
        for text in sentences(Path(str(room.__file__))):
            named |= set(observations.KEY.findall(text))
    assert {"train.lr", "data.max_tokens", "lora.rank", "data.valid_fraction"} <= named
    assert named <= known, named - known


def sentences(module: Path) -> Iterator[str]:
    """The texts of a module that a person may be shown: not those that stand alone, which document it."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value
