"""A dry run is the real run's preparation: what it says of memory, batches and the adapter is what the run does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
import training
from safetensors.numpy import load_file, save_file

from mlxtune.adapter import adapter_files, attach
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.compute.fit_memory import Given
from mlxtune.config import resolve
from mlxtune.config.schema import LoraSection
from mlxtune.errors import UserError
from mlxtune.model.load import load
from mlxtune.train import preparation
from mlxtune.train.run_data import Data, read_data
from mlxtune.train.run_folder import RunFolder

PLAIN = 257  # tokens of the plain tokenizer; ChatML adds two


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose vocabulary has no tokens for chats, in 4 bits."""
    folder = tmp_path_factory.mktemp("plain")
    tiny.make_model(folder / "hf", eos_token_id=0, vocab_size=PLAIN)
    tiny.make_plain_tokenizer(folder / "hf")
    tiny.done("convert", folder / "hf", folder / "mlx", "--group-size", "32")
    return folder / "mlx"


def configured(model: Path, data: Path, *settings: str) -> tuple[resolve.Config, Data]:
    flags = {"model.path": str(model), "data.path": str(data)}
    found, config = read_data(resolve.load(None, ("train.steps=2", "lora.rank=3", *settings), flags))
    return config, found


def adapter_of_rank(rank: int, model: Path, folder: Path) -> Path:
    """An adapter that no step has trained, saved as a run leaves it."""
    loaded = load(str(model))
    spec = AdapterPlan.of(loaded.model, LoraSection(rank=rank, layers=1))
    attach.attach(loaded.model, spec)
    folder.mkdir()
    adapter_files.save_config(folder, spec)
    adapter_files.save_tensors(loaded.model, folder, spec.file)
    return folder


CASES: dict[str, tuple[str, ...]] = {
    "as configured": (),
    "dora": ("lora.variant=dora",),
    "ranks": ("lora.ranks={down_proj: 7}", "lora.layers=1"),
    "layers trained in full": ("lora.train_also=[norms, embeddings, layers.1.mlp]", "lora.targets=[q_proj]"),
    "noise": ("train.neftune_alpha=5", "lora.dropout=0.1"),
    "going on": ("lora.start_from=ADAPTER",),
    "new tokens": ("data.template=chatml", "lora.train_also=[embeddings, head]"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_predicts_the_adapter_and_the_memory_of_the_run(
    case: str, mlx_model: Path, plain_model: Path, data: Path, tmp_path: Path
) -> None:
    """The adapter's bytes are those of the arrays that the run trains; an adapter to go on from has a rank, and blocks,
    of its own.
    """
    model = plain_model if case == "new tokens" else mlx_model
    settings = CASES[case]
    if case == "going on":
        settings = (f"lora.start_from={adapter_of_rank(11, model, tmp_path / 'first')}",)
    config, found = configured(model, data, *settings)
    planned = preparation.plan(config, found)
    prepared = preparation.prepare(config, found, RunFolder(tmp_path / "run"))
    trained = attach.trained_tensors(prepared.job.model)
    assert planned.memory is not None
    assert planned.memory.adapter == sum(array.nbytes for array in trained.values())
    assert planned.memory.total == prepared.job.predicted
    assert planned.config == prepared.config
    assert planned.plan.shapes() == prepared.job.plan.shapes()


def test_a_dry_run_computes_no_weight(
    plain_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the rows of new tokens, which are the mean of the others."""
    config, found = configured(plain_model, data, *CASES["new tokens"])
    sizes: list[int] = []
    real = mx.eval

    def watched(*trees: Any) -> None:
        sizes.extend(array.size for array in training.arrays_in(trees))
        real(*trees)

    monkeypatch.setattr(mx, "eval", watched)
    preparation.plan(config, found)
    assert sizes == []
    preparation.prepare(config, found, RunFolder(tmp_path / "run"))
    assert len(sizes) > 20


def test_a_dry_run_refuses_what_the_run_refuses(mlx_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that the model has no embedding for."""
    config, found = configured(mlx_model, data)
    real = preparation.load

    def smaller(*args: Any, **named: Any) -> Any:
        loaded = real(*args, **named)
        loaded.config["vocab_size"] = found.train.highest
        return loaded

    monkeypatch.setattr(preparation, "load", smaller)
    with pytest.raises(UserError, match="the tokenizer makes the token"):
        preparation.plan(config, found)


@pytest.mark.parametrize("kind", ["of PEFT", "of another model", "torn"])
def test_an_adapter_to_start_from_is_refused_by_both_in_the_same_words(
    kind: str, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    start = adapter_of_rank(5, mlx_model, tmp_path / "start")
    file = start / adapter_files.ADAPTER_FILE
    if kind == "of PEFT":
        (start / adapter_files.CONFIG_FILE).write_text('{"peft_type": "LORA"}')
    elif kind == "of another model":
        tensors = load_file(file)
        name = min(tensors)
        save_file({**tensors, name: np.zeros((9, 9), np.float32)}, file)
    else:
        file.write_bytes(file.read_bytes()[:-100])
    config, found = configured(mlx_model, data, f"lora.start_from={start}")
    said = []
    for refuse in (preparation.plan, lambda *given: preparation.prepare(*given, RunFolder(tmp_path / "run"))):
        with pytest.raises(UserError) as refused:
            refuse(config, found)
        said.append(refused.value.message)
    assert said[0] == said[1] or kind == "torn"  # by two readers
    assert all(str(start) in message for message in said)


def test_a_run_and_its_dry_run_are_given_the_same(mlx_model: Path, data: Path) -> None:
    """All that the memory is fitted to, apart from the arrays themselves."""
    config, found = configured(mlx_model, data, "train.memory_limit=123456789")
    read, opened = (preparation.attached(config, found, read=read) for read in (True, False))

    def facts(given: Given) -> tuple[Any, ...]:
        classes = {path: type(module).__name__ for path, module in given.model.named_modules()}
        return given.model_config, given.dtype, given.limit, given.narrower, classes

    assert facts(read.given) == facts(opened.given)
    assert read.adapter == opened.adapter and read.changes == opened.changes
