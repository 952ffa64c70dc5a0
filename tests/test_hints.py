"""What a person is told when something is odd: warnings that fit, and hints that work."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import tiny

from mlxtune.data.survey import lint
from mlxtune.ship import verify
from mlxtune.ship.verify import SHIPPED, TRAINED, UNTUNED, Report

KL = {"mean_kl": 0.57, "top1": 0.65, "base_mean_kl": 0.02}  # of an mxfp4 export that answered nonsense


def report(reference: str = TRAINED, **changes: float) -> Report:
    facts = dict.fromkeys(("max_difference", "mean_difference", "loss", "trained_loss", "base_loss"), 1.0)
    facts |= {"base_max_difference": 1.0, "share": 1.0, **KL, **changes}
    return Report(reference=reference, candidate="llama.cpp", rows=1, positions=64, gain_kept=None, **facts)


def test_a_measured_export_that_is_no_likeness_is_warned_of() -> None:
    wrecked = report(UNTUNED, base_mean_kl=0.0).warning()
    assert "the likeliest token at 35% of the positions (KL 0.57)" in wrecked and "more bits" in wrecked
    assert report(UNTUNED, mean_kl=0.03, base_mean_kl=0.0).warning() == ""  # a q4_k_m of a large model
    assert report(mean_kl=0.05, base_mean_kl=0.2).warning() == ""  # less than tuning did
    lost = report(mean_kl=0.05, base_mean_kl=0.01).warning()
    assert "more than tuning did (KL 0.01)" in lost


def test_a_model_that_was_not_tuned_moved_no_logit_and_none_is_said_to_have_moved() -> None:
    line = report(UNTUNED, base_max_difference=0.0).line()
    assert "tuning" not in line and "0.0e+00" not in line
    assert "tuning moved them by" in report().line()


def test_an_export_says_it_and_ends_well(mlx_model: Path, tmp_path: Path) -> None:
    """q4_0 of a tiny random model is far from it; whatever is measured here, the limit decides whether it is said."""
    from mlxtune.api import exporting

    shipped = exporting.export(mlx_model, to="gguf", out=tmp_path / "a.gguf", type="q4_0")
    assert isinstance(shipped.proof, Report) and shipped.proof.verdict == "measured"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "FAR", shipped.proof.mean_kl / 2)
        warned = exporting.export(mlx_model, to="gguf", out=tmp_path / "b.gguf", type="q4_0")
    assert [note for note in warned.notes if "answers otherwise" in note and "q4_0" in note]
    assert warned.proof == shipped.proof and shipped.proof.text == SHIPPED


def test_rows_that_do_not_fit_are_hinted_to_drop_and_a_file_in_the_way_to_another_name(tmp_path: Path) -> None:
    turns = tiny.conversations(1)[0]["messages"]
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"messages": [*turns[-2:], *turns[-2:]]}, {"messages": turns}])
    words = ("data", "convert", rows, tmp_path / "out.jsonl", "--to", "alpaca")
    tiny.one_clear_line(tiny.mlxtune(*words), "one question and one answer", "--drop leaves them out.")
    assert "1 rows, 1 left out" in tiny.done(*words, "--drop").stdout
    tiny.one_clear_line(tiny.mlxtune("data", "convert", rows, rows, "--force"), "the source itself", "another name.")


def test_after_the_data_moved_exports_and_scores_say_how_to_name_them(run: Path, data: Path, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    config = moved / "config.yaml"
    config.write_text(config.read_text().replace(str(data), str(tmp_path / "elsewhere")))
    words = ("--adapter", moved, "--to", "peft", "--out", tmp_path / "out")
    tiny.one_clear_line(
        tiny.mlxtune("export", *words), "elsewhere", "was trained on it", "--data PATH; or leave it out: --no-verify."
    )
    tiny.one_clear_line(tiny.mlxtune("eval", "--adapter", moved), "elsewhere", "name it: --data PATH.")
    assert "evaluat" not in tiny.done("export", *words, "--no-verify").stderr


def test_dropped_rows_of_several_sources_are_named_with_their_file(mlx_model: Path, tmp_path: Path) -> None:
    bad = {"messages": [{"role": "user", "content": "Nobody answers."}]}
    for name, where in (("one", 2), ("two", 0)):
        rows = tiny.conversations(8)
        rows[where] = bad
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    sources = f"data.sources=[{{path: {tmp_path / 'one.jsonl'}}}, {{path: {tmp_path / 'two.jsonl'}}}]"
    said = tiny.done("train", "--model", mlx_model, "--set", sources, "--dry-run").stdout
    for place in ("in one.jsonl, 1 of 8 rows dropped: no assistant turn (line 3)", "in two.jsonl, 1 of 8 rows dropped"):
        assert place in said, said


def test_findings_of_one_row_are_said_of_one() -> None:
    assert lint.counted(1, "rows that teach nothing") == "1 row that teaches nothing"
    assert lint.counted(1, "rows that are both in train and valid") == "1 row that is both in train and valid"
    assert lint.counted(2, "rows that teach nothing") == "2 rows that teach nothing"
    for kind in lint.KINDS.values():
        one = lint.counted(1, kind.what)
        assert not re.search(r"\brows\b|that (are|seem|teach) |: their ", one.replace("to know", "")), one
