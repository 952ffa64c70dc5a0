"""A command that the tests fork is the command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import warm

import mlxtune.ship.export  # noqa: F401  what tests import before they run commands

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="commands are forked on Linux alone")


def ended(*words: str | Path, apart: bool) -> subprocess.CompletedProcess[str]:
    """The command, started apart from all others, or forked."""
    return tiny.mlxtune(*words, **({"MLXTUNE_APART": "1"} if apart else {}))


def test_commands_are_forked_unless_their_environment_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft  # noqa: F401  which sets a variable

    assert warm.fits({**os.environ, "COLUMNS": "200"})
    assert not warm.fits({**os.environ, "HF_ENDPOINT": "http://127.0.0.1:1"})
    monkeypatch.delenv("PATH")
    assert not warm.fits(dict(os.environ))


def test_a_forked_command_says_and_makes_what_a_started_one_does(
    hf_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With relative paths, a result on one stream, notes on the other, a refusal, and numbers to the last bit."""
    monkeypatch.chdir(tmp_path)
    settings = ("train.steps=2", "train.lr=1e-3", "lora.rank=2")
    words = ["train", "--model", hf_model, "--data", data, *(word for one in settings for word in ("--set", one))]
    for name, apart in (("started", True), ("forked", False)):
        done = ended(*words, "--out", name, apart=apart)
        assert done.returncode == 0 and done.stdout.startswith(f"{name}: 2 steps")
        assert "reading the model" in done.stderr
    started, forked = (Path(name, "adapters.safetensors").read_bytes() for name in ("started", "forked"))
    assert started == forked
    for words in (["chat", "--model", hf_model], ["fuse", "--nope"]):
        one, other = ended(*words, apart=True), ended(*words, apart=False)
        assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)
