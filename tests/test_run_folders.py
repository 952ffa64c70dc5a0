"""Run folders that other people and other processes have been at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from training import options, tune

from mlxtune import errors, session, tuning
from mlxtune.train import checkpoint, events


def test_what_others_put_into_a_run_folder_neither_stops_it_nor_goes_away(
    mlx_model: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    """Finder's .DS_Store, somebody's notes, a zip of a checkpoint; a folder with a .lock that is no run."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    others = [run / "checkpoints" / name for name in (".DS_Store", "step-0000000.zip", "step-0000010 copy")]
    for path in (*others, run / "notes.txt"):
        path.write_text("mine")
    resumed = tiny.mlxtune("train", "--resume-anyway", "--out", run, "--set", "train.steps=28")
    assert resumed.returncode == 0, resumed.stderr
    assert all(path.read_text() == "mine" for path in others)
    (tmp_path / "other").mkdir()
    for name in (".lock", "notes.txt"):
        (tmp_path / "other" / name).write_text("mine")
    result = tiny.mlxtune(*options(mlx_model, data, tmp_path / "other"))
    tiny.one_clear_line(result, "other already exists", "Choose another --out.")
    checkpoint.remove(run)
    assert [path.name for path in run.iterdir() if path.suffix == ".txt"] == ["notes.txt"]


def test_a_run_that_began_and_ended_meanwhile_is_not_replaced(mlx_model: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    real = tuning.read_data

    def meanwhile(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tuning, "read_data", real)
            tune(mlx_model, data, run, "train.steps=2")
        return real(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(errors.UserError, match="already exists"):
        patch.setattr(tuning, "read_data", meanwhile)
        tune(mlx_model, data, run)
    assert [event["steps"] for event in events.read(run) if event["kind"] == "begin"] == [2]


def test_events_with_any_text_are_read_and_odd_ones_left_out(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    with (tmp_path / "run" / events.FILE).open("a", encoding="utf-8") as file:
        file.write('null\n[1]\n{"kind": "note", "text": "one\u2028two\u0085"}\n')
    assert events.read(tmp_path / "run")[-1]["text"] == "one\u2028two\u0085"
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / session.CONFIG_FILE).write_text("")
    (tmp_path / "odd" / events.FILE).write_text('{"kind": "train"}\n{"kind": "end"}\n')
    listed = json.loads(tiny.mlxtune("runs", tmp_path, "--json").stdout)
    assert [(Path(one["path"]).name, one["state"]) for one in listed] == [("odd", "unreadable"), ("run", "killed")]
