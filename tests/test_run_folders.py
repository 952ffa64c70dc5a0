"""Run folders that other people and other processes have been at."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from training import options, tune

from mlxtune import errors
from mlxtune.train import events, run_data
from mlxtune.train import run as train_run
from mlxtune.train.run_folder import CONFIG_FILE, EVENTS_FILE, LOCK_FILE, RunFolder


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
    RunFolder(run).remove_unfinished()
    assert [path.name for path in run.iterdir() if path.suffix == ".txt"] == ["notes.txt"]


def test_a_run_that_began_and_ended_meanwhile_is_not_replaced(mlx_model: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    real = run_data.read_data

    def meanwhile(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_run, "read_data", real)
            tune(mlx_model, data, run, "train.steps=2")
        return real(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(errors.UserError, match="already exists"):
        patch.setattr(train_run, "read_data", meanwhile)
        tune(mlx_model, data, run)
    assert [event["steps"] for event in events.read(run) if event["kind"] == "begin"] == [2]


def test_events_with_any_text_are_read_and_odd_ones_left_out(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    with (tmp_path / "run" / EVENTS_FILE).open("a", encoding="utf-8") as file:
        file.write('null\n[1]\n{"kind": "note", "text": "one\u2028two\u0085"}\n')
    assert events.read(tmp_path / "run")[-1]["text"] == "one\u2028two\u0085"
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / CONFIG_FILE).write_text("")
    (tmp_path / "odd" / EVENTS_FILE).write_text('{"kind": "train"}\n{"kind": "end"}\n')
    listed = json.loads(tiny.mlxtune("runs", tmp_path, "--json").stdout)
    assert [(Path(one["path"]).name, one["state"]) for one in listed] == [("odd", "unreadable"), ("run", "killed")]


def planted(folder: Path) -> dict[str, str]:
    """A project of somebody else's, with the names that a run has. Returns its files and what they hold."""
    texts = {"config.yaml": "my: own config", "checkpoints/epoch1/model.ckpt": "weights", "wandb/run.log": "a log"}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return texts


def held(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("pid", ["", "4711", "held by make"], ids=["no lock", "a lock of another tool", "any text"])
def test_a_project_of_somebody_elses_is_never_taken_for_a_run_that_was_killed(
    pid: str, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    """Neither begun in, nor removed after a run that saved nothing."""
    texts = planted(tmp_path / "other")
    if pid:
        (tmp_path / "other" / LOCK_FILE).write_text(pid)
        texts[LOCK_FILE] = pid
    result = tiny.mlxtune(*options(mlx_model, data, tmp_path / "other"))
    tiny.one_clear_line(result, "other already exists", "Choose another --out.")
    RunFolder(tmp_path / "other").remove_unfinished()
    assert held(tmp_path / "other") == texts


def test_a_project_that_appeared_while_rows_were_read_is_left_alone(
    mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_data.read_data
    monkeypatch.setattr(train_run, "read_data", lambda *known: (planted(tmp_path / "run"), real(*known))[1])
    with pytest.raises(errors.UserError, match="already exists"):
        tune(mlx_model, data, tmp_path / "run")
    assert held(tmp_path / "run") == planted(tmp_path / "again")


def test_what_a_killed_run_left_is_begun_in_anew(mlx_model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with RunFolder(tmp_path / "run").locked():
        for name in ("config.yaml", "events.jsonl", "adapter_config.json"):
            (tmp_path / "run" / name).write_text("{}")
        (tmp_path / "run" / "checkpoints" / ".step-0000001.partial-1").mkdir(parents=True)
    assert RunFolder(tmp_path / "run").may_begin()
    tune(mlx_model, data, tmp_path / "run", "train.steps=2")
    assert [event["kind"] for event in events.read(tmp_path / "run")][-1] == "end"


def test_a_run_that_saved_nothing_leaves_what_others_put_among_its_checkpoints(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with RunFolder(run).locked():
        pass
    (run / "checkpoints" / ".step-0000001.partial-1").mkdir(parents=True)
    (run / "checkpoints" / "epoch1").mkdir()
    (run / "checkpoints" / "epoch1" / "model.ckpt").write_text("weights")
    RunFolder(run).remove_unfinished()
    assert held(run) == {"checkpoints/epoch1/model.ckpt": "weights"}
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["epoch1"]


def contents(path: Path) -> dict[str, bytes]:
    """Of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file): file.read_bytes() for file in files}


@pytest.mark.parametrize("name", [".lock", "events.jsonl", "checkpoints", "checkpoints/step-*", "config.yaml"])
def test_a_link_in_a_run_folder_is_never_followed(name: str, whole: Path, tmp_path: Path) -> None:
    """A stranger's run: going on would write into what it leads to, or remove it."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    name = str(max(run.glob(name)).relative_to(run))
    elsewhere = tmp_path / "elsewhere"
    (run / name).rename(elsewhere)
    (run / name).symlink_to(elsewhere)
    before = contents(elsewhere)
    result = tiny.mlxtune("train", "--resume-anyway", "--out", run, "--set", "train.steps=28")
    tiny.one_clear_line(result, f"{name} is a link")
    assert contents(elsewhere) == before


def test_a_lock_that_is_a_pipe_is_no_lock_and_stops_nobody_who_looks(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / LOCK_FILE).unlink()
    os.mkfifo(run / LOCK_FILE)
    assert not RunFolder(run).is_training() and not RunFolder(run).is_marked()
    with pytest.raises(errors.UserError, match="is no ordinary file"), RunFolder(run).locked():
        pass
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "empty")
    assert not RunFolder(tmp_path / "linked").may_begin()
