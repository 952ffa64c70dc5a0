"""Run folders and adapters that others wrote or changed: told in one line, and never read as something else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlxtune_convert.peft import adapter_folder
from safetensors.numpy import load_file, save_file

from mlxtune.config import resolve
from mlxtune.data.template.tokenizer_changes import Changes
from mlxtune.errors import UserError
from mlxtune.ship import export, runners
from mlxtune.train import checkpoint, run, runs
from mlxtune.train.run_folder import CHECKPOINTS, EVENTS_FILE, RunFolder

BEGIN = '{"kind": "begin", "step": 0, "steps": 4, "model": "m", "computed": "so"}\n'
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "begin", "step": 0, "steps": 1e999}',
        '{"kind": "begin", "step": 0, "steps": "4"}',
        '{"kind": "begin", "steps": 4}',
        '{"kind": "begin", "step": null, "steps": 4}',
        '{"kind": "train", "step": 1e999, "loss": 1.0}',
        '{"kind": "train", "step": true, "loss": 1.0}',
        '{"kind": "train", "step": 1}',
        '{"kind": "eval", "step": 1, "loss": "2.5"}',
        '{"kind": "eval", "step": 1, "loss": 1e999}',
        '{"kind": "eval", "step": 1, "loss": NaN}',
        f'{{"kind": "eval", "step": 1, "loss": {10**400}}}',
        '{"kind": "note", "step": [1], "text": ""}',
        '{"kind": ["end"], "step": "x"}',
    ],
)
def test_a_run_whose_events_hold_other_things_than_numbers_is_listed_as_unreadable(line: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / EVENTS_FILE).write_text(f"{BEGIN}{line}\n")
    (found,) = runs.find(tmp_path)
    assert (found.state, found.best_loss) == ("unreadable", None)
    assert run._way_before(RunFolder(tmp_path)) == ""


@pytest.mark.parametrize(
    "line", [DEEP, f'{{"kind": "eval", "step": {"9" * 5000}, "loss": 1}}', "null", "{", '{"a": 1}']
)
def test_a_line_that_is_no_event_is_left_out(line: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / EVENTS_FILE).write_text(f'{BEGIN}{line}\n{{"kind": "eval", "step": 3, "loss": null}}\n')
    (found,) = runs.find(tmp_path)
    assert (found.state, found.steps, found.best_loss) == ("killed", 4, None)
    assert run._way_before(RunFolder(tmp_path)) == "so"


def put(*keys: str, value: Any) -> Callable[[Path], None]:
    """Change state.json in a checkpoint."""

    def change(folder: Path) -> None:
        tree = inner = json.loads((folder / "state.json").read_text())
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (folder / "state.json").write_text(json.dumps(tree))

    return change


def folder_in_place(folder: Path) -> None:
    (folder / checkpoint.OPTIMIZER_FILE).unlink()
    (folder / checkpoint.OPTIMIZER_FILE).mkdir()


def pipe_in_place(folder: Path) -> None:
    (folder / checkpoint.OPTIMIZER_FILE).unlink()
    os.mkfifo(folder / checkpoint.OPTIMIZER_FILE)


def unreadable(folder: Path) -> None:
    """Root may read everything; a name that is too long is refused to all."""
    (folder / "state.json").unlink()
    (folder / "state.json").symlink_to("x" * 300)


@pytest.mark.parametrize(
    "change",
    [
        put("state", "step", value="24"),
        put("state", "step", value=1e999),
        put("state", "step", value=7),
        put("state", "stale", value=-1),
        put("state", "halved", value=10**9),
        put("state", "best_loss", value="low"),
        put("state", "best_loss", value=float("nan")),
        put("state", "checkpointed", value=0),
        put("state", "more", value=0),
        put("state", value=[]),
        put("identity", "config", value=[]),
        put("identity", "model", value=None),
        put("sha256", value={}),
        put("sha256", value=["optimizer.safetensors"]),
        put("sha256", "../../../../../../etc/passwd", value=""),
        folder_in_place,
        pipe_in_place,
        unreadable,
    ],
)
def test_a_checkpoint_that_is_not_as_it_was_written_is_left_for_the_one_before(
    change: Callable[[Path], None], whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    *_, before, last = sorted((tmp_path / "run" / CHECKPOINTS).glob("step-*"))
    change(last)
    said: list[str] = []
    assert RunFolder(tmp_path / "run").newest(said.append).folder == before
    assert len(said) == 1 and last.name in said[0]


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": []},
        {"tokens": {"<a>": "7"}},
        {"tokens": {"<a>": -1}},
        {"tokens": {"<a>": 1 << 40}},
        {"tokens": {"<a>": True}},
        {"eos_token": 3},
        {"chat_template": ["x"]},
        {"chat_template": {"default": None}},
        {"chat_template": None},
    ],
)
def test_changes_of_a_tokenizer_that_are_none_are_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mlxtune_tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"mlxtune_tokenizer\.json is none that mlxtune wrote"):
        Changes.read(tmp_path)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1" * 90, "a whole number of more than 64 bits"),
        ("[1, {b: " + "9" * 20 + "}]", "a whole number of more than 64 bits"),
        ("!!binary aGk=", "bytes|tag"),
        ("!!set {b}", "set|tag"),
        ("[" * 40 + "]" * 40, "lists or tables more than 32 deep in one another"),
        (r'"\ud800"', "half of a character"),
    ],
)
def test_a_value_that_a_run_could_not_keep_is_refused_where_it_stands(
    value: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(f"data:\n  template_kwargs:\n    a: {value}\n")
    with pytest.raises(UserError, match=rf"^{tmp_path}/c\.yaml line [23]: .*({expected})"):
        resolve.load(tmp_path / "c.yaml")
    with pytest.raises(UserError, match=expected):
        resolve.load(None, (f"data.template_kwargs={{a: {value}}}",))


def test_numbers_and_texts_of_every_usual_kind_are_kept(tmp_path: Path) -> None:
    values = {"a": 2**63 - 1, "b": -0.5, "c": "ü\u200b😀", "d": [None, True, {"e": [1]}]}
    resolved = resolve.load(None, (), {"data.template_kwargs": values})
    (tmp_path / "c.yaml").write_text(resolved.to_yaml())
    assert resolve.load(tmp_path / "c.yaml") == resolved


def peft_folder(folder: Path, width: int, **settings: Any) -> Path:
    folder.mkdir()
    own = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / adapter_folder.CONFIG_FILE).write_text(json.dumps({**own, **settings}))
    name = f"{adapter_folder.PREFIX}model.layers.0.self_attn.q_proj"
    factors = {"lora_A": np.zeros((2, width), np.float32), "lora_B": np.zeros((width, 2), np.float32)}
    save_file({f"{name}.{key}.weight": array for key, array in factors.items()}, folder / adapter_folder.WEIGHTS_FILE)
    return folder


@pytest.mark.parametrize("module", ["this", "evilmod", "megatron.core"])
def test_an_adapter_that_has_peft_import_a_module_is_refused_before_peft_is_asked(
    module: str, mlx_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(runners, "peft_folder", lambda model, folder: asked.append(folder))
    folder = peft_folder(tmp_path / "adapter", 64, megatron_core=module, megatron_config={"a": 1})
    with pytest.raises(UserError, match="megatron_config"):
        export.check(folder, mlx_model, None, ())
    assert asked == []


def test_an_adapter_that_peft_cannot_load_is_one_line(hf_model: Path, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "adapter", 63)
    settings = json.loads((hf_model / "config.json").read_text())
    with pytest.raises(UserError, match=rf"^PEFT [\d.]+ does not load {folder} \(.*size mismatch"):
        runners.peft_runner(load_file(hf_model / "model.safetensors"), settings, folder)
