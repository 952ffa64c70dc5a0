"""The machine around a run: stand-ins for macOS's commands, and file systems that refuse what its own one knows."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from mlx_lm.models.switch_layers import SwitchLinear
from mlxtune_convert import files
from mlxtune_convert.hf import chat_templates
from training import tune

from mlxtune.adapter import attach
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.config.resolve import Config
from mlxtune.errors import UserError
from mlxtune.machine import backend, diagnosis, surroundings
from mlxtune.model import load
from mlxtune.train import events, preparation
from mlxtune.train.preparation import unrepeatable
from mlxtune.train.run_folder import EVENTS_FILE, LOCK_FILE, RunFolder

GIB = 1 << 30


def tool(folder: Path, name: str, prints: str) -> None:
    """A command of the system that prints this."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.txt").write_text(prints)
    (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{folder}/calls\ncat {folder}/{name}.txt\n')
    (folder / name).chmod(0o755)


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path that begins with a folder for macOS's commands, where mlxtune takes the system for macOS."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for module in (surroundings, diagnosis):
        monkeypatch.setattr(module, "sys", SimpleNamespace(platform="darwin"))
    for name in ("caffeinate", "pmset", "ps", "sysctl"):
        tool(folder, name, "")
    return folder


# `pmset -g` of a MacBook Air and, with three modes, of a MacBook Pro.
AIR = """System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 lowpowermode         {}
 powernap             1
"""
PRO = AIR.replace("lowpowermode ", "powermode    ")


@pytest.mark.parametrize(
    ("settings", "low"),
    [
        *((AIR.format(0), False), (AIR.format(1), True), (PRO.format(0), False), (PRO.format(1), True)),
        *((PRO.format(2), False), ("Currently in use:\n sleep 1\n", None)),
    ],
)
def test_low_power_mode_is_read_and_warned_of(settings: str, low: bool | None, mac: Path, tmp_path: Path) -> None:
    tool(mac, "pmset", settings)
    assert surroundings.low_power() is low
    assert any("Low Power Mode is on" in line for line in surroundings.warnings(tmp_path, 0)) == (low is True)
    assert "pmset -g\n" in (mac / "calls").read_text()


def test_a_system_without_low_power_mode_or_without_its_commands_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert surroundings.low_power() is None  # Linux
    monkeypatch.setattr(surroundings, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (surroundings.low_power(), surroundings.battery(), surroundings.holders()) == (None, None, {})


# What ps prints: kilobytes and command lines.
PROCESSES = """
 2097152 /Applications/Ollama.app/Contents/Resources/ollama runner --model /Volumes/me/.ollama/models/blobs/sha256-1
  524288 ollama serve
 3145728 /Volumes/me/.lmstudio/extensions/backends/mlx-llm-mac/node worker.js
 1048576 /Applications/LM Studio.app/Contents/MacOS/LM Studio
 4194304 /Volumes/brew/bin/llama-server -m model.gguf
  104857 /usr/local/bin/python3.12 -m mlx_lm.server --model small
 8388608 /Volumes/me/.venv/bin/python3 /Volumes/me/.venv/bin/mlxtune train --model /Volumes/me/.lmstudio/models/ollama
 9999999 vim ollama
"""
HELD = {"LM Studio": 4 * GIB, "llama-server": 4 * GIB, "Ollama": 5 * GIB // 2}


def test_programs_that_hold_a_model_are_found_by_their_command_and_told_with_their_size(mac: Path) -> None:
    tool(mac, "ps", PROCESSES)
    assert surroundings.holders() == HELD  # mlx_lm.server is too small to hold one
    assert surroundings.listed(HELD) == "LM Studio 4.29 GB, llama-server 4.29 GB, Ollama 2.68 GB"


@pytest.mark.parametrize(
    "command", ["/bin/mlx_lm.server", "python -m mlx_lm server", "/a/python3 /b/mlx_lm.server -m x"]
)
def test_mlx_lm_s_server_is_found_however_it_is_started(command: str, mac: Path) -> None:
    tool(mac, "ps", f"1048576 {command}\n")
    assert surroundings.holders() == {"mlx_lm.server": GIB}


def test_the_system_s_own_ps_is_understood(tmp_path: Path) -> None:
    """A stand-in for Ollama that holds 600 MiB: this Python, under that name."""
    (tmp_path / "ollama").symlink_to(sys.executable)
    code = f"held = bytearray({600 << 20})\nprint('up', flush=True)\ninput()"
    with tiny.popen(tmp_path / "ollama", "-c", code) as process:
        assert process.stdout and process.stdout.readline() == "up\n"
        assert surroundings.holders()["Ollama"] >= 600 << 20
        process.kill()


def test_other_programs_are_warned_of_only_where_the_run_does_not_fit_beside_them(mac: Path) -> None:
    held = sum(HELD.values())
    tool(mac, "ps", PROCESSES)
    assert surroundings.crowded(3 * GIB, held + 7 * GIB) == []
    (said,) = surroundings.crowded(3 * GIB, held + 7 * GIB - 1)
    assert "LM Studio 4.29 GB" in said and "beside the 3.22 GB of this run" in said
    tool(mac, "ps", "")
    assert surroundings.crowded(100 * GIB, GIB) == []  # the memory limit of the run says that


def test_doctor_tells_of_the_lid_low_power_mode_and_other_models(mac: Path) -> None:
    tool(mac, "pmset", AIR.format(1))
    tool(mac, "ps", PROCESSES)
    facts, advice = diagnosis.examine()
    assert facts["sleep"] == "held off while training, as long as the lid is open (caffeinate)"
    assert facts["low power mode"] == "on (the GPU is slower)"
    assert facts["other models in memory"].startswith("LM Studio 4.29 GB")
    assert [line for line in advice if "unload them before training" in line]
    assert [line for line in advice if "Low Power Mode is on" in line]
    tool(mac, "pmset", AIR.format(0))
    tool(mac, "ps", "")
    facts, advice = diagnosis.examine()
    assert facts["low power mode"] == "off" and facts["other models in memory"].startswith("none found (Ollama, ")
    assert not [line for line in advice if "unload" in line or "Low Power" in line]


def test_doctor_s_json_has_the_new_facts(tmp_path: Path) -> None:
    tool(tmp_path / "tools", "ps", PROCESSES)
    done = tiny.done("doctor", "--json", PATH=f"{tmp_path / 'tools'}:{os.environ['PATH']}")
    found = json.loads(done.stdout)
    assert found["facts"]["other models in memory"] == surroundings.listed(HELD)
    assert "power" in found["facts"]
    of_macs = {"sleep", "low power mode"}  # elsewhere they would say nothing
    assert found["facts"].keys() & of_macs == (of_macs if sys.platform == "darwin" else set())
    assert any("other programs hold models in memory" in line for line in found["advice"])


def leave(folder: Path, *names: str) -> Path:
    """A folder with files of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"\0")
    return folder


FINDER = (".DS_Store", ".localized", "Icon\r", "._.DS_Store", "._model.safetensors")


@pytest.mark.parametrize("name", FINDER)
def test_a_folder_with_nothing_but_what_macos_leaves_is_empty(name: str, tmp_path: Path) -> None:
    folder = leave(tmp_path / "out", name)
    files.refuse_existing(folder, force=False)
    assert RunFolder(folder).may_begin() and not files.holds_something(folder)
    with files.new_folder(folder) as work:
        (work / "model").write_text("x")
    assert [path.name for path in folder.iterdir()] == ["model"]
    assert files.holds_something(folder) and files.holds_something(folder / "model")
    for other in ("x", ".hidden"):
        full = leave(tmp_path / f"full{other}", name, other)
        with pytest.raises(UserError, match="already exists"):
            files.refuse_existing(full, force=False)
        assert not RunFolder(full).may_begin()


def test_a_run_that_saved_nothing_takes_its_folder_with_it_though_finder_was_there(tmp_path: Path) -> None:
    with RunFolder(leave(tmp_path / "run", *FINDER, EVENTS_FILE)).locked():
        pass
    RunFolder(tmp_path / "run").remove_unfinished()
    assert not (tmp_path / "run").exists()
    with RunFolder(leave(tmp_path / "run", *FINDER, "mine.txt")).locked():
        pass
    RunFolder(tmp_path / "run").remove_unfinished()
    assert (tmp_path / "run/mine.txt").exists() and not (tmp_path / "run" / LOCK_FILE).exists()


def test_the_demo_begins_in_folders_that_finder_looked_at(tmp_path: Path) -> None:
    leave(tmp_path / "model", ".DS_Store", "config.json")
    leave(tmp_path / "run", ".DS_Store")
    tiny.one_clear_line(tiny.mlxtune("demo", "--out", tmp_path), f"{tmp_path / 'model'} already exists")
    (tmp_path / "model/config.json").unlink()
    done = tiny.mlxtune("demo", "--out", tmp_path, "--model", tmp_path / "nowhere")
    assert "nowhere" in tiny.one_clear_line(done) and "already exists" not in done.stderr


def test_what_exfat_keeps_beside_a_template_is_no_template(tmp_path: Path) -> None:
    more = leave(tmp_path / "model" / chat_templates.MORE, "._tool_use.jinja")
    (more / "tool_use.jinja").write_text("tools")
    leave(tmp_path / "model", "._other.jinja")
    assert chat_templates.of_folder(tmp_path / "model") == {"tool_use": "tools"}
    assert chat_templates.unread(tmp_path / "model") == []


def refusing(number: int) -> Any:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EINVAL, errno.ENOSYS])
def test_file_systems_without_fsync_are_left_alone_and_a_failed_one_is_not(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS's F_FULLFSYNC and fsync both refused, as on a network volume; then a disk that broke."""
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", refusing(errno.ENOTTY))
    monkeypatch.setattr(os, "fsync", refusing(number))
    with files.new_folder(tmp_path / "out") as work:
        (work / "model").write_text("x")
    log = events.Events(tmp_path)
    log.emit("end", step=1)
    log.close()
    assert events.read(tmp_path) == [{"kind": "end", "step": 1}]
    monkeypatch.setattr(os, "fsync", refusing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        files.flush(tmp_path / "out")


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK])
def test_a_run_on_a_volume_without_locks_goes_on_with_a_note(
    number: int, mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    found = tune(mlx_model, data, tmp_path / "run", "train.steps=1", "train.eval_every=0")
    assert sum("has no locks" in event.get("text", "") for event in found) == 1
    assert found[-1]["state"] == "finished"
    assert not RunFolder(tmp_path / "run").is_training()
    monkeypatch.setattr(fcntl, "flock", refusing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), RunFolder(tmp_path).locked():
        pass


def test_a_run_is_seen_on_a_volume_that_locks_exclusively_only_what_is_open_for_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux's NFS, where an exclusive lock of a file that is open for reading is EBADF."""
    real = fcntl.flock

    def flock(handle: int, how: int) -> None:
        if how & fcntl.LOCK_EX and fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            refusing(errno.EBADF)()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert not RunFolder(tmp_path).is_training()
    with RunFolder(tmp_path).locked():
        assert RunFolder(tmp_path).is_training()
    assert not RunFolder(tmp_path).is_training()
    with (tmp_path / LOCK_FILE).open() as looking:
        real(looking.fileno(), fcntl.LOCK_SH)
        assert not RunFolder(tmp_path).is_training()  # another that looks is no run


def test_a_run_tells_what_holds_its_memory_and_is_kept_awake_while_it_reads_the_model(
    mac: Path, mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(mac, "ps", PROCESSES)
    monkeypatch.setattr(backend, "memory_bytes", lambda: 14 * GIB)
    awake = []
    real = preparation.load

    def load(*args: Any, **named: Any) -> Any:
        awake.append((mac / "calls").read_text())
        return real(*args, **named)

    monkeypatch.setattr(preparation, "load", load)
    found = tune(mlx_model, data, tmp_path / "run", "train.steps=1", "train.eval_every=0")
    assert sum("memory is tight: LM Studio 4.29 GB" in event.get("text", "") for event in found) == 1
    assert f"caffeinate -i -w {os.getpid()}" in awake[0]


def test_what_a_gpu_adds_up_in_its_own_order_is_told_there_and_only_there(mlx_model: Path) -> None:
    """A trained embedding (here tied to the head), not the usual adapter."""
    for also, expected in (([], ""), (["norms"], ""), (["embeddings"], "trained embeddings")):
        model = load.load(str(mlx_model), "float32").model
        section = Config.model_validate({"lora": {"train_also": also}}).lora
        attach.attach(model, AdapterPlan.of(model, section), 0)
        assert attach.summed_in_any_order(model) == expected
        (*said,) = unrepeatable(model, "metal")
        assert len(said) == bool(expected) and all("may differ in its last bits" in line for line in said)
        assert unrepeatable(model, "cpu") == []
    model.experts = SwitchLinear(4, 4, 2)
    assert attach.summed_in_any_order(model) == "trained embeddings and experts"
