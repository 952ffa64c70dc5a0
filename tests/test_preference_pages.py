"""The page of a preference run, and what is observed of one."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from typing import Any

import page_readers
import pages
import pytest
import tiny

from mlxtune.evaluate.observations.observe import observations_of_run
from mlxtune.report.composed import of_run
from mlxtune.report.run_record import read_run
from mlxtune.report.sections.comparing import Other

DPO = {"preference.loss": "dpo"}


def ranked(step: int, accuracy: float, margin: float, chosen: float, **more: Any) -> dict[str, Any]:
    """The numbers of a preference event."""
    known = {"accuracy": accuracy, "margin": margin, "reward_chosen": chosen, "reward_rejected": chosen - margin}
    return {**known, "drift": -chosen, **more}


def told(
    steps: int = 40, chosen: float = 0.2, accuracy: float = 0.9, last: float = 0.3, loss: str = "dpo", sft: float = 0.0
) -> list[dict[str, Any]]:
    """A run whose loss falls from ln 2 to `last`; chosen: its last reward of chosen answers; accuracy: its last one;
    loss, sft: of preference.
    """
    objective = {"loss": loss, "beta": 0.1, "sft": sft, "rows": "rated" if loss == "kto" else "pairs"}
    out = [pages.begun(steps, data={"train": {"rows": 600}, "valid": {"rows": 100}}, preference=objective)]
    out.append(pages.evaluated(0, log(2), **ranked(0, 0.5, 0.0, 0.0)))
    for step in range(1, steps + 1):
        way = step / steps
        value = log(2) + way * (last - log(2))
        numbers = ranked(step, 0.5 + way * (accuracy - 0.5), way * 1.5, way * chosen)
        out.append(pages.event(step, value, **numbers))
        if step % 10 == 0:
            out.append(pages.evaluated(step, value, **numbers))
    return [*out, {"kind": "end", "step": steps, "state": "finished", "best_step": steps}]


def observed(events: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {one["observation"]: one for one in observations_of_run(events)}


def test_the_page_says_how_answers_are_told_apart_and_draws_it(tmp_path: Path) -> None:
    page = page_readers.whole(of_run(read_run(pages.write(tmp_path / "run", told(), DPO))))
    text = page_readers.said(page)
    assert "the loss went from 0.6931 before the first step to 0.3000 nats a row at step 40: 57% lower." in text
    assert (
        "The preferred answers are told from the others in 90% of these rows (rewards: chosen +0.20, rejected -1.30)"
        in text
    )
    for title in (
        "How often the chosen answer is preferred",
        "Margin between chosen and rejected",
        "Rewards of both sides",
    ):
        assert title in text
    assert "nats a token" not in text and "how likely the answers of the data are" not in text
    curves = page_readers.record(page)["curves"]
    assert curves["margin"][-1] == [40, 1.5] and curves["held-out accuracy"][0] == [0, 0.5]
    assert observed(told()) == {}


def test_what_the_baseline_of_kto_takes_is_told_beside_what_is_computed_of_the_rows(tmp_path: Path) -> None:
    events = [{**event, "baseline_tokens": 500} if event["kind"] == "train" else event for event in told()]
    text = page_readers.said(page_readers.whole(of_run(read_run(pages.write(tmp_path / "run", events)))))
    assert "of kto's baseline" in text and "20,000 beside these, without gradients" in text


def test_the_page_of_another_run_has_none_of_it(tmp_path: Path) -> None:
    page = page_readers.whole(of_run(read_run(pages.write(tmp_path / "run", pages.told(20)))))
    assert "margin" not in page_readers.record(page)["curves"]
    text = page_readers.said(page)
    assert "Rewards of both sides" not in text and "nats a token" in text


def test_runs_of_different_objectives_are_compared_by_accuracy_and_not_by_loss(tmp_path: Path) -> None:
    first = read_run(pages.write(tmp_path / "dpo", told(), DPO))
    others = [Other.read(pages.write(tmp_path / "sft", pages.told(40)))]
    others.append(Other.read(pages.write(tmp_path / "orpo", told(accuracy=0.8), {"preference.loss": "orpo"})))
    text = page_readers.said(page_readers.whole(of_run(first, others=others)))
    assert "different objectives (dpo, supervised, orpo)" in text
    assert "accuracy on held-out pairs" in text and "90.0%" in text and "80.0%" in text


def test_the_best_adapter_by_accuracy_is_the_one_that_tells_most_apart(tmp_path: Path) -> None:
    events = told()[:-1]  # still running: nothing names the best step
    events.append(pages.evaluated(40, 0.1, **ranked(40, 0.7, 2.0, 0.2)))  # the lowest loss
    record = read_run(pages.write(tmp_path / "run", events, {**DPO, "train.keep_by": "accuracy"}))
    assert record.best is not None and record.best["accuracy"] == 0.9


def test_answers_that_all_become_less_likely_are_observed() -> None:
    found = observed(told(chosen=-4.0))["both answers became less likely"]
    assert "fell from -0.10 to -3.55" in found["measure"] and "preference.sft=0.5" in found["fix"]
    assert "both answers became less likely" not in observed(told(chosen=-0.9))
    assert "both answers became less likely" not in observed(told(chosen=-4.0, accuracy=0.4))  # it is worse than that


def test_what_is_likely_to_help_are_keys_that_the_objective_has() -> None:
    name = "both answers became less likely"
    assert "preference.sft above 0.5" in observed(told(chosen=-4.0, sft=0.5))[name]["fix"]
    of_rated = observed(told(chosen=-4.0, loss="kto"))[name]["fix"]
    assert "preference.sft" not in of_rated and "preference.good_weight" in of_rated
    for loss in ("simpo", "orpo"):  # their rewards are not measured from the beginning
        assert name not in observed(told(chosen=-4.0, loss=loss))
        rises = [pages.evaluated(step, 1.0 + step / 10) for step in (41, 42, 43)]
        assert "preference.beta" not in observed([*told(loss=loss), *rises])["overfitting"]["fix"]


def test_a_loss_near_0_is_what_ipo_is_after() -> None:
    for loss, sft, is_said in (("dpo", 0.0, True), ("ipo", 0.0, False), ("orpo", 0.0, False), ("dpo", 0.5, False)):
        events = told(loss=loss, sft=sft)
        for event in events:
            if event["kind"] == "train" and event["step"] > 3:
                event["loss"] = 1e-4
        assert ("loss is 0 at once" in observed(events)) is is_said, loss


def test_what_somebody_changed_of_the_objective_is_nothing_to_go_by() -> None:
    for noted in (7, {}, {"loss": []}, {"loss": "dpo", "sft": "much", "rows": 3}):
        events = told(chosen=-4.0)
        events[0]["preference"] = noted
        assert "preference.sft" not in observed(events)["both answers became less likely"]["fix"]


def test_a_loss_that_is_nothing_at_once_is_observed() -> None:
    events = told(last=0.2)
    for event in events:
        if event["kind"] == "train" and event["step"] > 3:
            event["loss"] = 1e-4
    found = observed(events)["loss is 0 at once"]
    assert found["measure"].startswith("the loss was 0.0001 after step 8 of 40") and "a tenth" in found["fix"]
    for event in events:
        if event["kind"] == "train" and event["step"] <= 20:
            event["loss"] = 0.5
    assert "loss is 0 at once" not in observed(events)  # it took its time


@pytest.mark.parametrize(("accuracy", "is_chance"), [(0.55, True), (0.62, False)])
def test_held_out_answers_that_are_told_apart_by_chance_are_observed(accuracy: float, is_chance: bool) -> None:
    assert (
        "accuracy at chance" in observed(told(accuracy=accuracy))
    ) is is_chance  # of 100 rows chance gives up to 60%


def test_runs_and_report_take_such_runs(tmp_path: Path) -> None:
    run = pages.write(tmp_path / "run", told(), DPO)
    assert "run" in tiny.done("runs", tmp_path).stdout
    pages.write(tmp_path / "sft", pages.told(20))
    shown = [line.split() for line in tiny.done("runs", tmp_path).stdout.splitlines()]
    assert shown[0] == ["run", "model", "state", "objective", "steps", "best", "loss", "best", "accuracy", "size"]
    assert [line[3:7] for line in shown[1:]] == [
        ["dpo", "40/40", "0.3000", "90.0%"],
        ["supervised", "20/20", "0.3429", "-"],  # 3 / 21 + 0.2, of pages.told
    ]
    listed = json.loads(tiny.done("runs", tmp_path, "--json").stdout)
    assert [(one["objective"], one["best_accuracy"]) for one in listed] == [("dpo", 0.9), ("supervised", None)]
    assert "objective" not in tiny.done("runs", tmp_path / "sft").stdout
    document = json.loads(tiny.done("report", run, "--json").stdout)
    assert document["curves"]["held-out margin"][-1] == [40, 1.5]
