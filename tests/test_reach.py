"""What a file of somebody's turns on beyond this machine: told before it happens, or not done unless asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import yaml
from fake_hub import FakeHub, Repo
from huggingface_hub import constants

from mlxtune.cli import cli, ship
from mlxtune.config import resolve as configuration
from mlxtune.errors import UserError
from mlxtune.model import hub as models
from mlxtune.train import loggers
from mlxtune.train.identity import Identity, _flat

ROWS, MODEL = "acme/rows", "acme/tiny"


@dataclass
class Away:
    """A run whose model or data may be on a hub, of a user whose own cache is empty."""

    hub: FakeHub
    run: Path
    capsys: pytest.CaptureFixture[str]

    def mlxtune(self, *words: str | Path) -> tuple[str, str]:
        """(what the command says, its notes); a refusal is raised."""
        self.hub.requests.clear()
        models._download.cache_clear()
        self.capsys.readouterr()
        cli.main([*map(str, words)], standalone_mode=False)
        return self.capsys.readouterr()

    def refused(self, *words: str | Path) -> str:
        """The refusal's message and hint; the hub was not asked."""
        with pytest.raises(UserError) as caught:
            self.mlxtune(*words)
        assert not self.hub.requests
        return f"{caught.value.message}\n{caught.value.hint}"

    def configure(self, **keys: object) -> None:
        """Change keys of the run's configuration: data__path is data.path."""
        file = self.run / "config.yaml"
        tree = yaml.safe_load(file.read_text())
        for key, value in keys.items():
            section, _, name = key.partition("__")
            tree[section][name] = value
        file.write_text(yaml.safe_dump(tree))


@pytest.fixture
def away(
    mlx_model: Path,
    data: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Away]:
    """The libraries read where the hub and its caches are when they are imported; here they are told afterwards."""
    with FakeHub() as hub:
        hub.add(MODEL, mlx_model)
        hub.repos[f"datasets/{ROWS}"] = Repo({file.name: file.read_bytes() for file in data.iterdir()})
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template[template.index("/{") :])
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setenv("NO_PROXY", "*")
        shutil.copytree(run, tmp_path / "run")
        yield Away(hub, tmp_path / "run", capsys)


def test_a_runs_own_dataset_is_fetched_only_when_it_is_named_and_is_then_found_here(
    away: Away, mlx_model: Path, data: Path
) -> None:
    """Scored on the same rows, those that the run held out, as where the data is a file."""
    words = ("eval", "--model", mlx_model, "--adapter", away.run, "--json")
    del away.hub.repos[f"datasets/{ROWS}"].files["valid.jsonl"]
    away.configure(data__path=ROWS, data__cap=15, data__valid_fraction=0.4)
    said = away.refused(*words)
    assert f"{ROWS}, a dataset of the hub" in said and f"name it: --data {ROWS}" in said
    named, _ = away.mlxtune(*words, "--data", ROWS)
    assert [request for request in away.hub.requests if request.path.endswith("/train.jsonl")]
    again, _ = away.mlxtune(*words)
    assert not away.hub.requests
    away.configure(data__path=str(data / "train.jsonl"))
    here, _ = away.mlxtune(*words)
    assert json.loads(named) == json.loads(again) == json.loads(here)


@pytest.mark.parametrize("command", ["export", "fuse", "verify"])
def test_no_proof_asks_the_hub_for_rows_that_only_the_run_names(
    command: str, away: Away, mlx_model: Path, tmp_path: Path
) -> None:
    words: dict[str, tuple[str | Path, ...]] = {
        "export": ("export", "--to", "peft", "--out", tmp_path / "out"),
        "fuse": ("fuse", "--out", tmp_path / "out"),
        "verify": ("verify", tmp_path / "out"),
    }
    for streamed in ("download", "stream"):
        away.configure(data__path=ROWS, data__hub=streamed, data__cap=20)
        said = away.refused(*words[command], "--model", mlx_model, "--adapter", away.run)
        assert ROWS in said and f"--data {ROWS}" in said
    away.configure(data__path="", data__cap=None, data__hub="download", data__sources=[{"path": ROWS}])
    assert "--data PATH" in away.refused(*words[command], "--model", mlx_model, "--adapter", away.run)


def test_rows_to_choose_codes_by_are_read_with_the_named_model_and_not_fetched(
    away: Away, mlx_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away.configure(model__path=MODEL)
    assert len(ship._training_rows(mlx_model, away.run, None)) == 24
    away.configure(data__path=ROWS)
    assert ship._training_rows(mlx_model, away.run, None) == ()
    assert f"{ROWS}, a dataset of the hub" in capsys.readouterr().err
    assert not away.hub.requests
    assert len(ship._training_rows(mlx_model, away.run, ROWS)) == 24


def test_a_run_goes_on_with_what_the_hub_has_only_when_that_is_named(away: Away) -> None:
    words = ("train", "--resume", "--out", away.run)
    away.configure(model__path=MODEL)
    assert f"name it: --model {MODEL}" in away.refused(*words)
    away.configure(data__path="", data__sources=[{"path": ROWS}])
    assert f"name the configuration that holds it: -c {away.run}/config.yaml" in away.refused(*words)
    away.configure(data__path=ROWS, data__sources=None)
    assert f"name it: --data {ROWS}" in away.refused(*words)
    away.mlxtune(*words, "--data", ROWS, "--model", MODEL)
    asked = {request.path for request in away.hub.requests}
    assert {f"/api/datasets/{ROWS}", f"/api/models/{MODEL}"} <= asked
    said, notes = away.mlxtune(*words)
    assert not away.hub.requests
    assert f"{away.run}: 12 steps" in said
    assert "names a" not in notes


TURNED_ON = """
model: {path: acme/tiny}
data: {path: acme/rows, cache: CACHE}
train: {steps: 1, loggers: [tensorboard, wandb, trackio]}
"""


def test_what_a_configuration_turns_on_beyond_this_machine_is_told_but_not_what_the_command_line_names(
    away: Away, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "require", lambda names: None)
    file = tmp_path / "c.yaml"
    file.write_text(TURNED_ON.replace("CACHE", str(tmp_path / "rows")))
    _, said = away.mlxtune("train", "-c", file, "--dry-run")
    assert [line for line in said.splitlines() if str(file) in line] == [
        f"note: {file} names a model of the hub, which is asked for it: acme/tiny",
        f"note: {file} names a dataset of the hub, which is asked for it: acme/rows",
        f"note: {file} has the numbers and settings of the run sent to Weights & Biases (train.loggers)",
        f"note: {file} has the numbers and settings of the run sent to Trackio, which can send them to the hub "
        "(train.loggers)",
        f"note: {file} has the tokenized rows kept in {tmp_path / 'rows'} (data.cache)",
    ]
    assert (tmp_path / "rows").stat().st_mode & 0o777 == 0o700
    named = ("--model", MODEL, "--data", ROWS, "--set", "train.loggers=[wandb]", "--set", f"data.cache={tmp_path}/rows")
    _, said = away.mlxtune("train", "-c", file, *named, "--dry-run")
    assert str(file) not in said
    _, said = away.mlxtune("train", "-c", "quick", *named, "--dry-run")
    assert "note: quick" not in said


@pytest.mark.parametrize("command", [("train", "--dry-run"), ("data", "check", "--model", ".")])
def test_what_is_told_of_a_file_is_told_before_anything_is_asked(
    command: tuple[str, ...], away: Away, tmp_path: Path
) -> None:
    away.hub.repos.clear()
    file = tmp_path / "c.yaml"
    file.write_text("data: {path: acme/rows}\nmodel: {path: nowhere}\n")
    with pytest.raises(UserError, match="acme/rows"):
        away.mlxtune(*command, "-c", file)
    assert "names a dataset of the hub" in away.capsys.readouterr().err


def test_a_run_that_goes_on_or_is_scored_tells_of_its_loggers_and_its_cache(
    away: Away, mlx_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, object]] = []

    def opened(names: list[str], run: Path, config: dict[str, object], *_: object) -> AbstractContextManager[list[str]]:
        sent.append(config)
        return nullcontext([])

    monkeypatch.setattr(loggers, "require", lambda names: None)
    monkeypatch.setattr(loggers, "opened", opened)
    away.configure(train__loggers=["wandb"], data__cache=str(tmp_path / "rows"))
    file = away.run / "config.yaml"
    _, said = away.mlxtune("train", "--resume-anyway", "--out", away.run)
    assert f"{file} has the numbers and settings of the run sent to Weights & Biases" in said
    kept = f"{file} has the tokenized rows kept in {tmp_path / 'rows'} (data.cache)"
    assert kept in said
    assert kept in away.mlxtune("eval", "--model", mlx_model, "--adapter", away.run)[1]
    # What the loggers got names no place on this machine.
    (config,) = sent
    assert config["model.path"] == mlx_model.name
    assert config["data.cache"] == "rows"
    assert str(tmp_path.parent) not in json.dumps(config)


def test_loggers_get_of_every_path_its_last_name_and_of_a_hub_id_all(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    places = {"model.path": MODEL, "data.path": str(file), "data.cache": "~/rows", "lora.start_from": str(file)}
    section = configuration.load(None, ("data.template_kwargs={a: /b}",), {**places, "data.template": str(file)})
    found = Identity(_flat(section), "", "", "", "").without_places()
    assert [found[key] for key in places] == [MODEL, file.name, "rows", file.name]
    assert found["data.template"] == file.name
    assert found["data.template_kwargs"] == {"a": "/b"}
