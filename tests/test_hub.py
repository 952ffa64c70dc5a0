"""A hub id as the source: what is downloaded, what is not, and every way it can fail, against a hub on this machine."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from fake_hub import FakeHub
from safetensors.numpy import load_file

NAME = "acme/tiny"
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(hf_model: Path) -> Iterator[FakeHub]:
    """A hub that offers the tiny model as acme/tiny, pickled weights and a picture beside it."""
    with FakeHub() as hub:
        hub.add(NAME, hf_model, pytorch_model__bin=b"pickled", README__md=b"# tiny", picture__png=b"png")
        yield hub


class User:
    """Somebody with an empty home for the hub's cache, who runs the command."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.out = folder / "new" / "model"
        self.cache = folder / "home" / "hub"
        self.environment = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_CACHE": str(self.cache),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "",
            "NO_PROXY": "*",
        }

    def convert(self, name: str = NAME, **environment: str) -> subprocess.CompletedProcess[str]:
        return tiny.mlxtune("convert", name, self.out, "--bits", "16", "--force", **{**self.environment, **environment})

    def nothing_written(self) -> bool:
        """Neither the destination nor a part of it beside it."""
        return not self.out.parent.exists() or not any(self.out.parent.iterdir())

    def parts(self) -> list[Path]:
        """The beginnings of files that a cut download left in the cache."""
        return list(self.cache.rglob("*.incomplete"))


@pytest.fixture
def user(tmp_path: Path, hub: FakeHub) -> User:
    return User(tmp_path, hub.url)


def succeeded(result: subprocess.CompletedProcess[str], user: User, source: Path) -> None:
    """Assert that the command made a model with the source's own weights."""
    assert result.returncode == 0, result.stderr
    made, original = load_file(user.out / WEIGHTS), load_file(source / WEIGHTS)
    assert made.keys() == original.keys()
    for name, array in original.items():
        np.testing.assert_array_equal(made[name], array, err_msg=name)


def test_a_hub_id_is_downloaded_and_becomes_a_model_that_mlx_lm_loads(hub: FakeHub, user: User, hf_model: Path) -> None:
    result = user.convert(HF_TOKEN="hf_secret")
    succeeded(result, user, hf_model)
    model, tokenizer = mlx_lm.load(str(user.out))[:2]
    logits = model(mx.array([tokenizer.encode("hello")]))
    assert np.isfinite(np.array(logits)).all()
    # Only what a model needs was asked for; the token stayed with the site, and the weights crossed the wire once.
    fetched = {request.path.rsplit("/", 1)[1] for request in hub.requests if "/resolve/" in request.path}
    assert fetched == {path.name for path in hf_model.iterdir()}
    assert not any(request.path.endswith((".bin", ".md", ".png")) for request in hub.requests)
    stored = [request for request in hub.requests if request.host == "storage"]
    assert [request.method for request in stored if request.path.endswith(WEIGHTS)] == ["GET"]
    assert {request.authorization for request in stored} == {None}
    assert "Bearer hf_secret" in {request.authorization for request in hub.asked_for(WEIGHTS)}
    assert not user.parts()
    assert result.stderr.count("\n") <= 1, result.stderr


def test_a_cut_download_is_one_line_and_the_same_command_continues_it(hub: FakeHub, user: User, hf_model: Path) -> None:
    hub.cut_after = len(hub.repos[NAME].files[WEIGHTS]) // 2 + 7
    error = tiny.one_clear_line(user.convert(), NAME, "stopped at 50% of", "Run the same command again")
    assert len(error.splitlines()) <= 3, error
    assert user.nothing_written()
    kept, hub.cut_after = hub.cut_after, None
    hub.requests.clear()
    succeeded(user.convert(), user, hf_model)
    assert [request.range for request in hub.asked_for(WEIGHTS) if request.host == "storage"] == [f"bytes={kept}-"]
    assert not user.parts()


def test_ctrl_c_keeps_what_was_downloaded(hub: FakeHub, user: User, hf_model: Path) -> None:
    hub.hold_after = 100_000
    command = [str(Path(sys.executable).with_name("mlxtune")), "convert", NAME, str(user.out), "--bits", "16"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**tiny.os.environ, **user.environment}, start_new_session=True
    )
    assert hub.held.wait(60)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not any(part.stat().st_size for part in user.parts()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert user.nothing_written()
    hub.hold_after = None
    hub.requests.clear()
    succeeded(user.convert(), user, hf_model)
    assert [request.range for request in hub.asked_for(WEIGHTS) if request.host == "storage"] == ["bytes=100000-"]


def test_weights_that_do_not_match_their_checksum_are_thrown_away(hub: FakeHub, user: User, hf_model: Path) -> None:
    hub.corrupt = True
    tiny.one_clear_line(user.convert(), WEIGHTS, "damaged", "Run the same command again")
    assert user.nothing_written()
    assert not user.parts()
    hub.corrupt = False
    succeeded(user.convert(), user, hf_model)


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_says_how_to_log_in(hub: FakeHub, user: User, status: int) -> None:
    repo = hub.repos[NAME]
    repo.refusal = (status, "GatedRepo", f"Access to model {NAME} is restricted.")
    repo.refuses_files_only = True
    tiny.one_clear_line(user.convert(), f"{NAME} is gated", "hf auth login")
    assert user.nothing_written()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [(404, "RepoNotFound", "Repository not found"), (401, "", "Invalid username or password.")],
)
def test_an_unknown_model_is_one_line(hub: FakeHub, user: User, status: int, code: str, message: str) -> None:
    hub.repos[NAME].refusal = (status, code, message)
    tiny.one_clear_line(user.convert(), f"no model {NAME} on the hub", "Check the spelling")
    assert user.nothing_written()


def test_a_token_that_the_hub_does_not_know_is_named_as_the_reason(hub: FakeHub, user: User) -> None:
    hub.repos[NAME].refusal = (401, "", "Invalid credentials in Authorization header")
    tiny.one_clear_line(user.convert(HF_TOKEN="hf_old"), "token", "hf auth login")


def test_a_name_that_no_hub_model_can_have_is_one_line(hub: FakeHub, user: User) -> None:
    tiny.one_clear_line(user.convert("acme/ti--ny"), "acme/ti--ny")
    assert not hub.requests


def test_offline_the_cache_serves_and_without_one_the_reason_is_named(hub: FakeHub, user: User, hf_model: Path) -> None:
    tiny.one_clear_line(user.convert(HF_HUB_OFFLINE="1"), NAME, "HF_HUB_OFFLINE")
    assert not hub.requests
    succeeded(user.convert(), user, hf_model)
    hub.stop()
    user.out = user.out.with_name("second")
    succeeded(user.convert(HF_HUB_OFFLINE="1"), user, hf_model)


def test_without_a_network_the_cache_serves_and_without_one_it_is_one_line(
    hub: FakeHub, user: User, tmp_path: Path, hf_model: Path
) -> None:
    succeeded(user.convert(), user, hf_model)
    hub.stop()
    user.out = user.out.with_name("second")
    succeeded(user.convert(), user, hf_model)
    stranger = User(tmp_path / "other", hub.url)
    began = time.monotonic()
    tiny.one_clear_line(stranger.convert(), f"cannot reach the hub for {NAME}")
    assert time.monotonic() - began < 30
    assert stranger.nothing_written()


def test_a_hub_that_never_answers_is_given_up(hub: FakeHub, user: User) -> None:
    hub.silent = True
    began = time.monotonic()
    tiny.one_clear_line(user.convert(HF_HUB_ETAG_TIMEOUT="1"), f"cannot reach the hub for {NAME}")
    assert time.monotonic() - began < 30


def test_a_model_with_pickled_weights_only_is_refused_before_anything_is_downloaded(hub: FakeHub, user: User) -> None:
    del hub.repos[NAME].files[WEIGHTS]
    tiny.one_clear_line(user.convert(), "only pickled weights (pytorch_model.bin)", "safetensors")
    assert not [request for request in hub.requests if "/resolve/" in request.path]
    assert user.nothing_written()


def test_a_model_that_does_not_fit_the_disk_is_refused_before_its_weights_are_requested(
    hub: FakeHub, user: User
) -> None:
    hub.repos[NAME].claimed[WEIGHTS] = 1 << 60
    tiny.one_clear_line(user.convert(), "not enough disk space")
    assert not hub.asked_for(WEIGHTS)
    assert user.nothing_written()
