"""Small parts of a run, without a model: the folder it takes, its paths, its events, losses that jump."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxtune.config import resolve
from mlxtune.config.paths import SHIPPED_TEMPLATES, with_absolute_paths
from mlxtune.data.template.choice import BUILT_IN
from mlxtune.train import events
from mlxtune.train.events import Event, Events
from mlxtune.train.run_folder import EVENTS_FILE, RunFolder, default_folder
from mlxtune.train.spikes import ENOUGH, RECENT, Spikes


def test_a_run_that_is_not_named_takes_a_folder_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = default_folder("somewhere/tiny.v2")
    assert first.parent == Path("runs") and first.name.endswith("-tiny.v2")
    first.mkdir(parents=True)
    assert default_folder("somewhere/tiny.v2") == Path(f"{first}-2")
    Path(f"{first}-2").mkdir()
    assert default_folder("somewhere/tiny.v2") == Path(f"{first}-3")


def test_local_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder called alpaca is not the template alpaca."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "rows", "start", "alpaca"):
        (tmp_path / name).mkdir()
    (tmp_path / "own.jinja").write_text("")
    settings = ("data.template=alpaca", "lora.start_from=start", "data.sources=[{path: rows}, {path: owner/name}]")
    found = with_absolute_paths(resolve.load(None, settings, {"model.path": "model"}))
    assert found.model.path == str(tmp_path / "model")
    assert [source.path for source in found.data.sources or []] == [str(tmp_path / "rows"), "owner/name"]
    assert found.lora.start_from == str(tmp_path / "start")
    assert found.data.template == "alpaca"
    found = with_absolute_paths(resolve.load(None, ("data.template=own.jinja",), {"data.path": "owner/name"}))
    assert (found.data.template, found.data.path) == (str(tmp_path / "own.jinja"), "owner/name")
    assert set(SHIPPED_TEMPLATES) == set(BUILT_IN)


def test_what_is_only_shown_is_not_written(tmp_path: Path) -> None:
    shown: list[Event] = []
    log = Events(tmp_path, shown.append)
    log.emit("doing", what="reading")
    log.emit("reading", source="a.jsonl", rows=3)
    log.emit("begin", step=0, steps=2, model="m", computed="so")
    log.emit("start", steps=2, eval_every=1)
    log.emit("end", step=0, state="failed")
    log.close()
    assert [event["kind"] for event in shown] == ["doing", "reading", "begin", "start", "end"]
    lines = (tmp_path / EVENTS_FILE).read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["begin", "end"]
    assert [event["kind"] for event in events.read(tmp_path)] == ["begin", "end"]


def test_a_loss_is_noted_that_is_six_deviations_above_the_recent_ones() -> None:
    """Losses of 2 and 4 by turns: mean 3, deviation 1. A jump counts as a recent loss from then on."""
    spikes = Spikes()
    usual = [2.0, 4.0] * (ENOUGH // 2)
    assert [spikes.add(loss) for loss in (*usual[:-1], 99.0)] == [""] * ENOUGH  # too few to compare it with
    spikes = Spikes()
    for loss in usual:
        assert spikes.add(loss) == ""
    assert spikes.add(8.9) == "" and Spikes().add(9.1) == ""
    spikes = Spikes()
    for loss in [2.0, 4.0] * RECENT:
        spikes.add(loss)
    assert spikes.add(9.1) == "9.100, 3.000 was usual"
    assert spikes.add(9.1) == ""


def test_what_others_put_into_a_run_folder_is_told_apart(tmp_path: Path) -> None:
    for name in ("config.yaml", "events.jsonl", "adapters.safetensors", ".lock", "notes.txt", "a.zip", ".DS_Store"):
        (tmp_path / name).write_text("")
    folder = RunFolder(tmp_path)
    assert folder.is_run() and folder.has_work() and not folder.has_checkpoint()
    assert folder.strangers() == ["a.zip", "notes.txt"]
    assert not folder.may_begin()
    (tmp_path / "adapters.safetensors").unlink()
    assert not folder.has_work()
    (tmp_path / "checkpoints" / "step-0000003").mkdir(parents=True)
    assert folder.has_checkpoint() and folder.has_work()
