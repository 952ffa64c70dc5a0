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
from mlxtune.evaluate.observations import of_answers, of_preferences, of_run, of_training, preference_remedies
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
    assert cause in re.findall("This looks wrong: (.*?)[.] Under", (run / "report.html").read_text(encoding="utf-8"))[0]
    others = {one["observation"] for one in found} - {cause}
    assert others <= ({"too little data"} if name == "overfitting" else set())


def test_nothing_is_observed_of_a_healthy_run(tmp_path: Path, hf_model: Path) -> None:
    run = trained(tmp_path, hf_model, ROWS, NEW, LEARNS)
    assert observations_of_run(events.read(run)) == []
    assert "Nothing was found that looks wrong" in page_says(run)
    assert "This looks wrong" not in (run / "report.html").read_text(encoding="utf-8")


def test_every_key_that_a_fix_names_is_one() -> None:
    known = set()
    for section, keys in Config().model_dump().items():
        known |= {f"{section}.{key}" for key in keys}
    named = set(observations.KEY.findall(FIX))
    for room in (of_answers, of_run, of_training, of_preferences, preference_remedies):
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


def told(*losses: float | None, valid: Sequence[float | None] = (), rows: Any = None) -> list[dict[str, Any]]:
    """Events of a run: training losses from step 1 on, validation losses at equal distances from step 0 on."""
    found: list[dict[str, Any]] = [{"kind": "begin", "step": 0, "data": rows}]
    for place, loss in enumerate(valid):
        step = place * len(losses) // max(1, len(valid) - 1)
        found.append({"kind": "eval", "step": step, "loss": loss})
    return found + [{"kind": "train", "step": at, "loss": loss, "lr": 0.1} for at, loss in enumerate(losses, 1)]


def names(happened: Sequence[dict[str, Any]]) -> list[str]:
    return [one["observation"] for one in observations_of_run(happened)]


FALLING = [3 - 0.1 * step for step in range(20)]


def test_numbers_that_are_none_and_jumps_of_the_loss_are_a_rate_that_is_too_high() -> None:
    assert names(told(*FALLING, valid=(3.0, 2.0, 1.2))) == []
    lost = [*told(*FALLING, valid=(3.0,)), {"kind": "end", "step": 20, "state": "failed", "nonfinite": True}]
    (one,) = observations_of_run(lost)
    assert (
        one["observation"] == "learning rate too high" and "the last good step was 20 (train.lr 0.1)" in one["measure"]
    )
    assert names(told(*FALLING, valid=(3.0, None))) == ["learning rate too high"]
    assert names([{"kind": "end", "step": 0, "state": "failed", "nonfinite": True}]) == []  # nothing was trained before
    one_left_out, other = ({"kind": "note", "step": step, "nonfinite": True} for step in (3, 7))
    assert names([*told(*FALLING, valid=(3.0, 1.2)), one_left_out]) == []  # what train.on_nonfinite: skip is for
    (one,) = observations_of_run([*told(*FALLING, valid=(3.0, 1.2)), one_left_out, other])
    assert one["measure"].startswith("2 of 22 steps were left out") and "(first: step 3)" in one["measure"]
    jumped = [*FALLING[:8], *[9.0] * 6, *FALLING[14:]]
    (one,) = observations_of_run(told(*jumped, valid=(3.0, 2.0)))
    assert (
        one["observation"] == "learning rate too high" and "jumped from 3.000 to 9.000 after step 9" in one["measure"]
    )
    # Losses that scatter, and a rate that is too low to teach anything, are none.
    assert names(told(*[1.0, 3.0, 2.0, 1.4] * 8, valid=(2.0, 1.99))) == []
    assert names(told(*[2.5] * 20, valid=(2.5, 2.5001))) == []
    # Both rise: not what overfitting looks like.
    assert names(told(*[3.0 + 0.1 * step for step in range(20)], valid=(3.0, 4.0, 4.5, 5.0))) == [
        "learning rate too high"
    ]


def test_a_validation_loss_far_above_its_lowest_is_overfitting_where_the_training_loss_fell_on() -> None:
    assert names(told(*FALLING, valid=(3.0, 2.0, 2.3))) == ["overfitting"]
    assert names(told(*FALLING, valid=(3.0, 3.2, 3.5))) == ["overfitting"]  # from the first step on
    assert names(told(*FALLING, valid=(3.0, 2.0, 2.1))) == []
    assert names(told(*[2.0] * 20, valid=(3.0, 2.0, 2.3))) == []  # the rows to train on stay as hard: another cause


def test_what_a_run_noted_of_its_rows_is_observed_from_its_threshold_on() -> None:
    def of(**rows: Any) -> list[str]:
        return names(told(2.0, valid=(2.0, 1.5), rows=rows))

    assert (
        of(train={"rows": 500, "shortened": 49, "too_long": 0, "repeated": 49}, valid={"rows": 100, "trained": 4}) == []
    )
    assert of(train={"rows": 500, "shortened": 40, "too_long": 12}) == ["answers are cut"]
    assert of(train={"rows": 500, "repeated": 50}) == ["repeated rows"]
    assert of(valid={"rows": 100, "trained": 5}) == ["validation rows are trained on"]
    assert of(template={"differs": False, "ends": False}) == ["wrong template"]
    assert of(train={"rows": 49}) == ["too little data"] and of(train={"rows": 50}) == []
    assert names(told(*[0.5] * 20, valid=(2.0, 1.5), rows={"train": {"rows": 499}})) == ["too little data"]
    assert names(told(*[0.5] * 20, valid=(2.0, 1.5), rows={"train": {"rows": 500}})) == []
    # What somebody changed by hand is nothing to go by, and no reason to fail.
    assert of(train="many", valid={"rows": "x", "trained": None}, template=[1]) == []
    assert names([{"kind": "begin", "step": 0, "data": 7}]) == []
