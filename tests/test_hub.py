"""A hub id as the source: what is downloaded, what is not, and every way it can fail, against a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from fake_hub import FakeHub, Request, environment, own_port
from safetensors.numpy import load_file, save_file

NAME = "acme/tiny"
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(hf_model: Path) -> Iterator[FakeHub]:
    """A hub that offers the tiny model as acme/tiny, pickled weights and a picture beside it."""
    with FakeHub(own_port()) as hub:
        hub.add(NAME, hf_model, pytorch_model__bin=b"pickled", README__md=b"# tiny", picture__png=b"png")
        yield hub


CHUNK = 10 << 20  # huggingface_hub writes a download to the disk in pieces of this many bytes


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("large") / "model", hidden_size=640, intermediate_size=2048)


@pytest.fixture
def large(hub: FakeHub, large_model: Path) -> Path:
    """acme/tiny becomes a model of some 40 MiB, so that a cut download leaves something behind."""
    hub.add(NAME, large_model)
    return large_model


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with environment(tmp_path_factory.mktemp("hub") / "home") as found:
        yield found


class User:
    """Somebody with an empty home for the hub's cache, who runs the command."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.out = folder / "new" / "model"
        self.environment = environment
        self.home = Path(environment["HF_HOME"])
        shutil.rmtree(self.home, ignore_errors=True)

    @property
    def cache(self) -> Path:
        return self.home / "hub"

    def convert(self, name: str = NAME, **environment: str) -> subprocess.CompletedProcess[str]:
        return tiny.mlxtune("convert", name, self.out, "--bits", "16", **{**self.environment, **environment})

    def nothing_written(self) -> bool:
        """Neither the destination nor a part of it beside it."""
        return not self.out.parent.exists() or not any(self.out.parent.iterdir())

    def parts(self) -> list[Path]:
        """The beginnings of files that a cut download left in the cache."""
        return list(self.cache.rglob("*.incomplete"))


@pytest.fixture
def user(tmp_path: Path, surroundings: dict[str, str]) -> User:
    return User(tmp_path, surroundings)


@dataclass(frozen=True)
class First:
    """A finished first conversion: who did it, what the command said, and what the hub was asked."""

    user: User
    result: subprocess.CompletedProcess[str]
    requests: list[Request]


@pytest.fixture(scope="module")
def first(hf_model: Path, surroundings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> First:
    """The one download that the tests with a filled cache start from; its hub is gone, and its home lies aside."""
    folder = tmp_path_factory.mktemp("first")
    with FakeHub(own_port()) as hub:
        hub.add(NAME, hf_model, pytorch_model__bin=b"pickled", README__md=b"# tiny", picture__png=b"png")
        user = User(folder, surroundings)
        result = user.convert(HF_TOKEN="hf_secret")
    user.home = user.home.rename(folder / "home")
    return First(user, result, hub.requests)


def with_cache(first: First, folder: Path) -> User:
    """A user whose cache already holds the model, and whose hub is gone."""
    user = User(folder, first.user.environment)
    shutil.copytree(first.user.home, user.home, symlinks=True)
    return user


def succeeded(result: subprocess.CompletedProcess[str], user: User, source: Path) -> None:
    """Assert that the command made a model with the source's own weights."""
    assert result.returncode == 0, result.stderr
    made, original = load_file(user.out / WEIGHTS), load_file(source / WEIGHTS)
    assert made.keys() == original.keys()
    for name, array in original.items():
        np.testing.assert_array_equal(made[name], array, err_msg=name)


def test_a_hub_id_is_downloaded_and_becomes_a_model_that_mlx_lm_loads(first: First, hf_model: Path) -> None:
    succeeded(first.result, first.user, hf_model)
    model, tokenizer = mlx_lm.load(str(first.user.out))[:2]
    logits = model(mx.array([tokenizer.encode("hello")]))
    assert np.isfinite(np.array(logits)).all()
    assert json.loads((first.user.out / "mlxtune_source.json").read_text())["name"] == NAME


def test_only_what_a_model_needs_is_downloaded_and_the_weights_only_once(first: First, hf_model: Path) -> None:
    files = [request.path.rsplit("/", 1)[1] for request in first.requests if "/resolve/" in request.path]
    assert set(files) == {path.name for path in hf_model.iterdir()}
    stored = [request.method for request in first.requests if request.host == "storage" and WEIGHTS in request.path]
    assert stored == ["GET"]
    assert not first.user.parts()


def test_of_the_weights_only_the_files_of_the_index_are_downloaded(
    hub: FakeHub, user: User, hf_model: Path, tmp_path: Path
) -> None:
    """Strays and other programs' formats stay where they are; the cache, which lacks them, is whole without a hub.
    The model's own code comes only where it is asked for."""
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    tensors = load_file(hf_model / WEIGHTS)
    folder = tmp_path / "sharded"
    shutil.copytree(hf_model, folder)
    (folder / WEIGHTS).unlink()
    table = {name: shards[place % 2] for place, name in enumerate(tensors)}
    for shard in shards:
        save_file({n: array for n, array in tensors.items() if table[n] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "own.Own"}}))
    repo = hub.add(NAME, folder, own__py=b"import this")
    needed = set(repo.files) - {"own.py"}
    for stray in ("model-4bit.safetensors", "model-00003-of-00003.safetensors", "consolidated.safetensors"):
        repo.files[stray] = b"other weights"
    succeeded(user.convert(), user, hf_model)
    assert {request.path.rsplit("/", 1)[1] for request in hub.requests if "/resolve/" in request.path} == needed
    result = tiny.mlxtune("convert", NAME, tmp_path / "code", "--trust-remote-code", **user.environment)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "code" / "own.py").read_bytes() == b"import this"
    hub.stop()
    shutil.rmtree(user.out)
    succeeded(user.convert(HF_HUB_OFFLINE="1"), user, hf_model)


def test_the_token_is_sent_to_the_hub_and_not_to_its_storage(first: First) -> None:
    assert {request.authorization for request in first.requests if request.host == "storage"} == {None}
    site = [request for request in first.requests if request.host == "site" and request.path.endswith(WEIGHTS)]
    assert {request.authorization for request in site} == {"Bearer hf_secret"}


def test_a_cut_download_is_one_line_and_the_same_command_continues_it(hub: FakeHub, user: User, large: Path) -> None:
    size = len(hub.repos[NAME].files[WEIGHTS])
    hub.cut_after = CHUNK + 1234
    tiny.one_clear_line(user.convert(), f"the download of {NAME} stopped: 10.49 MB of", "Run the same command again")
    assert [part.stat().st_size for part in user.parts()] == [CHUNK]
    assert user.nothing_written()
    # The second time the hub hangs up once more, and the command goes on by itself.
    hub.cut_after, hub.cuts = size - 1000, 1
    hub.requests.clear()
    succeeded(user.convert(), user, large)
    ranges = [request.range for request in hub.asked_for(WEIGHTS) if request.host == "storage"]
    assert ranges[0] == f"bytes={CHUNK}-"
    assert len(ranges) == 2
    assert ranges[1] > ranges[0]
    assert not user.parts()


def test_ctrl_c_keeps_what_was_downloaded(hub: FakeHub, user: User, large: Path) -> None:
    hub.hold_after = CHUNK + 1234
    process = tiny.started("convert", NAME, user.out, **user.environment)
    assert hub.held.wait(60)
    while not any(part.stat().st_size for part in user.parts()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "stopped"
    assert user.nothing_written()
    (part,) = user.parts()
    assert hub.repos[NAME].files[WEIGHTS].startswith(part.read_bytes())


def test_a_hub_that_cannot_continue_a_file_sends_it_again(hub: FakeHub, user: User, hf_model: Path) -> None:
    hub.ignores_ranges = True
    blob = hashlib.sha256(hub.repos[NAME].files[WEIGHTS]).hexdigest()
    part = user.cache / "models--acme--tiny" / "blobs" / f"{blob}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"old" * 1000)
    succeeded(user.convert(), user, hf_model)


def test_weights_that_do_not_match_their_checksum_are_thrown_away(hub: FakeHub, user: User) -> None:
    hub.corrupt = WEIGHTS
    tiny.one_clear_line(user.convert(), f"of {NAME} arrived damaged", "Run the same command again")
    assert user.nothing_written()
    assert not user.parts()
    assert not list(user.cache.rglob(WEIGHTS))


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


def test_offline_without_a_cache_the_reason_is_named(hub: FakeHub, user: User) -> None:
    tiny.one_clear_line(user.convert(HF_HUB_OFFLINE="1"), NAME, "HF_HUB_OFFLINE")
    assert not hub.requests


def test_offline_the_cache_serves(first: First, tmp_path: Path, hf_model: Path) -> None:
    user = with_cache(first, tmp_path)
    succeeded(user.convert(HF_HUB_OFFLINE="1"), user, hf_model)


def test_the_model_of_a_run_is_taken_from_the_cache_and_the_hub_is_not_asked(
    first: First, hub: FakeHub, tmp_path: Path
) -> None:
    user = with_cache(first, tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"model:\n  path: {NAME}\n")
    (run / "adapters.safetensors").write_bytes(b"")
    result = tiny.mlxtune("chat", "--adapter", run, **user.environment)
    assert f"--model {NAME}, from {run / 'config.yaml'}" in result.stderr
    assert "no folder" not in result.stderr and not hub.requests


def test_without_a_network_the_cache_serves(first: First, tmp_path: Path, hf_model: Path) -> None:
    user = with_cache(first, tmp_path)
    succeeded(user.convert(), user, hf_model)


def test_without_a_network_and_without_a_cache_it_is_one_line_and_quick(hub: FakeHub, user: User) -> None:
    hub.stop()
    began = time.monotonic()
    tiny.one_clear_line(user.convert(), f"cannot reach the hub for {NAME}", "with a network")
    assert time.monotonic() - began < 30
    assert user.nothing_written()


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


@pytest.fixture
def peft_adapter(hub: FakeHub, hf_model: Path, tmp_path: Path) -> Path:
    """acme/adapter: what PEFT saves of a LoRA on the tiny model, and a checkpoint below it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(hf_model, dtype=torch.float32)
    theirs = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "peft")
    repo = hub.add("acme/adapter", tmp_path / "peft")
    repo.files["checkpoint-5/adapter_model.safetensors"] = b"older"
    return tmp_path / "peft"


def test_a_peft_adapter_on_the_hub_is_converted_as_its_folder_is(
    hub: FakeHub, user: User, peft_adapter: Path, tmp_path: Path
) -> None:
    """Bit for bit what the folder gives, the weights fetched once, the checkpoint not at all; then from the cache."""
    result = tiny.mlxtune("convert", "acme/adapter", user.out, **user.environment)
    assert result.returncode == 0, result.stderr
    assert "an adapter of 2 layers" in result.stdout
    local = tiny.mlxtune("convert", peft_adapter, tmp_path / "local")
    assert local.returncode == 0, local.stderr
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (user.out / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    fetched = [r.path for r in hub.requests if r.host == "storage" and r.method == "GET"]
    assert len(fetched) == 1 and "checkpoint" not in fetched[0]
    assert sum(request.path == "/api/models/acme/adapter" for request in hub.requests) == 1
    shutil.rmtree(user.out)
    hub.stop()
    assert tiny.mlxtune("convert", "acme/adapter", user.out, **user.environment).returncode == 0


def test_options_of_a_model_are_refused_for_an_adapter_on_the_hub(user: User, peft_adapter: Path) -> None:
    said = user.convert("acme/adapter")
    tiny.one_clear_line(said, "acme/adapter is a PEFT adapter: --bits", "no effect")
    assert user.nothing_written()


def test_a_pickled_adapter_on_the_hub_is_refused(hub: FakeHub, user: User, peft_adapter: Path) -> None:
    files = hub.repos["acme/adapter"].files
    files["adapter_model.bin"] = files.pop("adapter_model.safetensors")
    tiny.one_clear_line(user.convert("acme/adapter"), "only pickled weights (adapter_model.bin)")
