"""The keys of preference tuning, what is refused of them, and rows against objectives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import on_preferences
import pages
import pytest
import tiny

from mlxtune.compute.preference.objectives import Settings
from mlxtune.config import resolve
from mlxtune.config.preference import EFFECTIVE, OBJECTIVES, OF_PAIRS, OF_RATED
from mlxtune.errors import UserError
from mlxtune.evaluate.observations.of_preferences import LAST_STEPS
from mlxtune.evaluate.observations.preference_remedies import Remedies
from mlxtune.train.loggers import numbers_of
from mlxtune.train.preference.goal import OfSplit, Preference
from mlxtune.train.preference.mismatched import Mismatched, one_cycle
from mlxtune.train.preference.watch import AT_ONCE, Watch, watch_of


def refused(*settings: str) -> UserError:
    with pytest.raises(UserError) as told:
        resolve.load(None, settings)
    assert "\n" not in told.value.message and told.value.hint
    return told.value


@pytest.mark.parametrize("name", ["grpo", "GRPO", "ppo", "rloo", "reinforce", "online_dpo", "xpo", "nash-md"])
def test_methods_that_answer_inside_the_loop_are_refused_with_the_reason(name: str) -> None:
    message = refused(f"preference.loss={name}").message
    assert f"{name} lets the model answer inside the training loop" in message and "--best-of" in message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("prm", "trains a model that judges answers"),
        ("hinge", "hinge is not known; nearest is ipo; there are dpo, ipo"),
        ("cpo", "nearest is simpo with preference.sft"),
        ("robust", "nearest is dpo with preference.label_smoothing"),
        ("kot", "nearest is kto"),
        ("zzzz", "zzzz is not known; there are dpo"),
        ("1", "preference.loss: should be"),
    ],
)
def test_an_unknown_objective_names_the_nearest_one(name: str, said: str) -> None:
    assert said in refused(f"preference.loss={name}").message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("beta=0.2",), "preference.beta has no effect without preference.loss"),
        (("sft=1",), "preference.sft has no effect without preference.loss"),
        (("loss=dpo", "gamma=1"), "preference.gamma has no effect with preference.loss dpo"),
        (("loss=ipo", "label_smoothing=0.1"), "preference.label_smoothing has no effect with preference.loss ipo"),
        (("loss=apo", "length_normalised=true"), "preference.length_normalised has no effect"),
        (("loss=orpo", "sft=0.5"), "preference.sft has no effect with preference.loss orpo"),
        (("loss=kto", "sft=0.5"), "preference.sft has no effect with preference.loss kto"),
        (("loss=dpo", "bad_weight=2"), "preference.bad_weight has no effect with preference.loss dpo"),
    ],
)
def test_a_key_without_effect_is_refused(settings: tuple[str, ...], said: str) -> None:
    error = refused(*(f"preference.{setting}" for setting in settings))
    assert said in error.message and error.message.startswith("--set preference.")


@pytest.mark.parametrize("setting", ["lora.dropout=0.1", "train.neftune_alpha=5"])
def test_noise_is_refused_with_preferences(setting: str) -> None:
    assert "noise would count as a difference from the reference" in refused("preference.loss=dpo", setting).message


def test_what_nobody_sets_is_what_the_objectives_source_recommends() -> None:
    betas = {name: resolve.load(None, (f"preference.loss={name}",)).preference for name in OBJECTIVES}
    assert {name: section.resolved_beta for name, section in betas.items()} == {
        **dict.fromkeys(("dpo", "ipo", "apo", "orpo", "kto"), 0.1),
        "simpo": 2.0,  # arXiv 2405.14734, section 4: beta 2.0 to 2.5, gamma / beta 0.5
    }
    assert {name: section.resolved_gamma for name, section in betas.items() if section.resolved_gamma} == {"simpo": 1.0}


def test_the_accuracy_chooses_an_adapter_of_preferences_alone() -> None:
    assert "it needs preference.loss" in refused("train.keep_by=accuracy").message
    assert resolve.load(None, ("train.keep_by=accuracy", "preference.loss=dpo")).train.keep_by == "accuracy"


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto"])
def test_the_recipes_are_listed_and_explained(name: str) -> None:
    assert resolve.load(name).preference.loss == name and name in resolve.recipe_names()
    said = tiny.mlxtune("config", "-c", name, "preference").stdout
    assert f"loss: {name}" in said and "(default: none)" in said


PAIRS, RATED, PLAIN = on_preferences.pairs(6), on_preferences.rated(6), tiny.conversations(6)
KINDS = {"pairs": PAIRS, "rated": RATED, "plain": PLAIN}


@pytest.mark.parametrize(
    ("train", "valid", "loss", "said", "hint"),
    [
        ("pairs", "pairs", "", "which need an objective", "-c dpo"),
        ("pairs", "pairs", "kto", "preference.loss kto needs rated answers", "-c dpo"),
        ("rated", "rated", "dpo", "preference.loss dpo needs pairs", "-c kto"),
        ("rated", "rated", "orpo", "preference.loss orpo needs pairs", "-c kto"),
        ("plain", "plain", "dpo", "preference.loss dpo needs pairs", "Leave out -c dpo"),
        ("plain", "plain", "kto", "preference.loss kto needs rated answers", "Leave out -c kto"),
        ("pairs", "plain", "dpo", "valid.jsonl (valid) holds rows to learn as they are", "Leave out -c dpo"),
        ("pairs", "rated", "apo", "the training rows are pairs", "one kind"),
    ],
)
def test_rows_that_do_not_fit_the_objective_are_refused_with_the_other(
    train: str, valid: str, loss: str, said: str, hint: str, mlx_model: Path, tmp_path: Path
) -> None:
    data = on_preferences.write(tmp_path / "data", KINDS[train], KINDS[valid][:2])
    setting = (f"preference.loss={loss}",) if loss else ()
    with pytest.raises(UserError) as told:
        on_preferences.tune(mlx_model, data, tmp_path / "run", *setting)
    assert said in told.value.message and hint in told.value.hint and not (tmp_path / "run").exists()


def test_apos_weights_are_for_rated_answers_and_its_sft_for_pairs(mlx_model: Path, tmp_path: Path) -> None:
    for rows, setting in ((PAIRS, "good_weight=2"), (RATED, "sft=1")):
        data = on_preferences.write(tmp_path / setting, rows, rows[:2])
        with pytest.raises(UserError, match=re.escape(f"preference.{setting[:-2]} has no effect on ")):
            on_preferences.tune(mlx_model, data, tmp_path / "run", "preference.loss=apo", f"preference.{setting}")


def test_a_dry_run_says_the_objective_and_what_is_computed(mlx_model: Path, tmp_path: Path) -> None:
    """The prompt of a pair once: less than the tokens of its two rows."""
    data = on_preferences.write(tmp_path / "data", PAIRS, PAIRS[:2])
    words = on_preferences.options(mlx_model, data, tmp_path / "run", "preference.loss=dpo", "preference.sft=0.5")
    said = tiny.done(*words, "--dry-run").stdout
    assert "objective: dpo, beta 0.1, sft 0.5, compared with the model at step 0" in said
    assert "rows: 6 training pairs, 2 held out" in said
    (share,) = re.findall(r"tokens computed per epoch: [\d,]+, ([\d.]+) of the rows' tokens", said)
    assert float(share) < 0.95


@pytest.mark.parametrize("objective", ["dpo", "kto", "simpo"])
def test_a_dry_run_promises_the_work_that_the_run_does(objective: str, mlx_model: Path, tmp_path: Path) -> None:
    """Of an epoch: positions with gradients, those of kto's baseline, and the reference's."""
    rows = RATED if objective == "kto" else PAIRS
    data, run = on_preferences.write(tmp_path / "data", rows, rows[:2]), tmp_path / "run"
    words = on_preferences.options(mlx_model, data, run, f"preference.loss={objective}", "train.epochs=1")
    said = tiny.done(*words, "--dry-run").stdout
    found = on_preferences.tune(mlx_model, data, run, f"preference.loss={objective}", "train.epochs=1")
    steps = on_preferences.of_kind(found, "train")
    computed = sum(step["computed_tokens"] for step in steps)
    of_baseline = sum(step.get("baseline_tokens", 0) for step in steps)
    assert f"tokens computed per epoch: {computed:,}, " in said
    assert (of_baseline > 0) == (objective == "kto") == (f"and for the baseline: {of_baseline:,}, " in said)
    before = f"computed before the first step: {computed + of_baseline:,} tokens of the training rows"
    assert (before in said) == (objective != "simpo")


@pytest.mark.parametrize(("objective", "word"), [("kto", "good"), ("apo", "bad"), ("kto", "")])
def test_thumbs_of_one_kind_are_a_note_in_the_words_of_data_check(
    objective: str, word: str, mlx_model: Path, tmp_path: Path
) -> None:
    rows = [{**row, "label": word == "good"} for row in RATED] if word else RATED
    data = on_preferences.write(tmp_path / "data", rows, RATED[:2])
    asked = (f"preference.loss={objective}", "train.steps=1")
    planned = tiny.done(*on_preferences.options(mlx_model, data, tmp_path / "run", *asked), "--dry-run").stdout
    found = on_preferences.of_kind(on_preferences.tune(mlx_model, data, tmp_path / "run", *asked), "note")
    said = f"6 rated rows: without the other thumb nothing says what to prefer: all are rated {word};"
    assert (said in planned) == any(said in note["text"] for note in found) == bool(word)
    assert ("without the other thumb" in planned) == bool(word)


# kto's mismatched examples.


@pytest.mark.parametrize("rows", [2, 3, 10, 101])
def test_no_row_lends_its_answer_to_itself(rows: int) -> None:
    lender = one_cycle(rows, seed=3)
    assert sorted(lender.tolist()) == list(range(rows)) and (lender != np.arange(rows)).all()
    assert lender.tolist() == one_cycle(rows, seed=3).tolist()
    assert rows < 10 or lender.tolist() != one_cycle(rows, seed=4).tolist()


@pytest.mark.parametrize(("train", "valid", "said"), [(1, 2, "2 training rows"), (2, 1, "2 held-out rows")])
def test_kto_is_refused_where_a_row_has_no_other_to_be_compared_with(
    train: int, valid: int, said: str, mlx_model: Path, tmp_path: Path
) -> None:
    """A row that lent its answer to itself would have the loss 1/2 under every adapter."""
    data = on_preferences.write(tmp_path / "data", RATED[:train], RATED[3 : 3 + valid])
    with pytest.raises(UserError, match=f"kto needs {said} at least.*there is 1") as told:
        on_preferences.tune(mlx_model, data, tmp_path / "run", "preference.loss=kto")
    assert "Add rows" in told.value.hint and "apo" in told.value.hint and not (tmp_path / "run").exists()


def test_a_mismatched_example_is_a_prompt_with_another_rows_answer() -> None:
    from mlxtune.data.chat.masking import Example
    from mlxtune.data.dataset.measured import ListedExamples
    from mlxtune.data.rows.sides import Side

    rows = [
        Example([1, 2, 3, 4], [0, 0, 1, 1]),
        Example([5, 6, 7], [0, 1, 1]),
        Example([8, 9, 10, 11, 12, 13], [0, 0, 0, 0, 0, 1]),
    ]
    mismatched = Mismatched(ListedExamples(rows, [Side.GOOD, Side.BAD, Side.GOOD]), seed=0)
    prompts, answers = ([1, 2], [5], [8, 9, 10, 11, 12]), ([3, 4], [6, 7], [13])
    for row, lender in enumerate(mismatched.lender):
        ids = (prompts[row] + answers[lender])[:6]  # no longer than the longest of the rows
        mask = ([0] * len(prompts[row]) + [1] * len(answers[lender]))[:6]
        assert (list(mismatched[row].ids), list(mismatched[row].mask)) == (ids, mask)
        assert sum(mask) > 0


# What a run says.


def steps(count: int, **changes: Any) -> list[dict[str, Any]]:
    usual = {"loss": 0.6, "accuracy": 0.8, "reward_chosen": 0.1, "margin": 0.3}
    return [{**usual, "step": step, **changes} for step in range(1, count + 1)]


DPO = Remedies("dpo", of_pairs=True)


def said_of(events: list[dict[str, Any]], run: Remedies = DPO) -> list[str]:
    watch = Watch(run)
    return [text for event in events if (text := watch.add(event))]


def test_both_answers_becoming_less_likely_is_said_once_with_what_helps() -> None:
    (said,) = said_of(steps(30, reward_chosen=-1.5))
    assert "both answers become less likely" in said and "preference.sft" in said and "train.lr" in said
    assert said_of(steps(LAST_STEPS - 1, reward_chosen=-1.5)) == []
    assert said_of(steps(30, reward_chosen=-0.9)) == []
    assert said_of(steps(30, reward_chosen=-1.5, accuracy=0.5)) == []
    assert said_of(steps(30, reward_chosen=-1.5), Remedies("simpo", of_pairs=True)) == []
    assert said_of(steps(30, reward_chosen=float("nan"))) == []


def test_a_loss_that_is_0_at_once_is_said_once() -> None:
    begun = steps(1) + steps(AT_ONCE, loss=1e-5)[1:]
    (said,) = said_of(begun)
    assert "nothing is left to learn" in said and "a lower train.lr" in said
    for run in (Remedies("ipo", True), Remedies("orpo", True), Remedies("dpo", True, sft=0.5)):
        assert said_of(begun, run) == []  # ipo's is 0 at its goal, the others have the answers' own loss
    late = steps(AT_ONCE) + [{**event, "step": event["step"] + AT_ONCE} for event in steps(20, loss=1e-5)]
    assert said_of(late) == []


def preference(objective: Any, of_pairs: bool = True) -> Preference:
    split = OfSplit(None)
    return Preference(Settings(objective, beta=0.1), of_pairs, split, split, rounding=1e-3)


def test_a_run_that_goes_on_compares_with_its_own_first_step_and_repeats_nothing(tmp_path: Path) -> None:
    """The first step after the pause has a loss of nearly 0 already."""
    low = steps(30, loss=1e-5)
    before, after = [*steps(1), *low[1:6]], low[6:]
    pages.write(tmp_path / "run", [{"kind": "train", **event} for event in before])
    watch = watch_of(preference("dpo"), tmp_path / "run", 6)
    assert watch is not None
    assert [text for event in after if (text := watch.add(event))] == [
        text for text in said_of([*before, *after]) if "nothing is left" in text
    ]
    told = [{"kind": "train", **event} for event in steps(12, reward_chosen=-1.5)]
    pages.write(tmp_path / "told", [*told, {"kind": "train", **steps(13, reward_chosen=None)[-1]}])
    again = watch_of(preference("dpo"), tmp_path / "told", 13)
    assert again is not None and again.add(steps(14, reward_chosen=-1.5)[-1]) == ""
    unknown = watch_of(preference("dpo"), tmp_path / "gone", 6)  # nobody knows what its loss was
    assert unknown is not None and [unknown.add(event) for event in after] == [""] * len(after)


@pytest.mark.parametrize(
    ("objective", "rows"), [*((name, "pairs") for name in OF_PAIRS), *((name, "rated") for name in OF_RATED)]
)
def test_no_remedy_names_a_key_that_the_run_would_refuse(objective: str, rows: str) -> None:
    for sft in (0.0, 0.5):
        run = Remedies(objective, rows == "pairs", sft)
        said = " ".join((run.against_falling(), run.against_certainty(), run.against_overfitting()))
        for key in re.findall(r"preference\.(\w+)", said):
            assert objective in EFFECTIVE.get(key, OBJECTIVES), said
            assert key != "sft" or rows == "pairs"
            assert key != "good_weight" or rows == "rated"
            assert key != "beta" or objective not in ("simpo", "orpo")  # there it holds nothing near a reference
        assert "train.lr" in said and not (sft and "preference.sft=0.5" in said)
    assert Remedies().against_falling() == "a lower train.lr"


def test_loggers_get_the_numbers_that_are_there() -> None:
    event = {"kind": "eval", "step": 3, "loss": 0.5, "tokens": 9, "margin": 0.25, "accuracy": 1.0, "drift": None}
    assert numbers_of(event) == {"valid/loss": 0.5, "valid/margin": 0.25, "valid/accuracy": 1.0}
