"""rsLoRA, DoRA, ranks per target and layers trained in full: saved, loaded, resumed and merged as they were trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlxtune_convert.adapters import AdapterConfig

from mlxtune.adapter import adapter_files, attach
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.cli.display import Display
from mlxtune.config import resolve
from mlxtune.config.schema import LoraSection
from mlxtune.errors import Interrupted, UserError
from mlxtune.model.load import load
from mlxtune.ship.merge import open_merged
from mlxtune.train.run import tune as train
from mlxtune.train.run_folder import RunFolder

IDS = mx.array(np.random.default_rng(3).integers(3, 250, (1, 40)))
KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"variant": "rslora"},
    "dora": {"variant": "dora"},
    "ranks": {"ranks": {"down_proj": 5, "self_attn.q_proj": 2}, "targets": ["q_proj", "down_proj", "lm_head"]},
    "norms": {"train_also": ["norms"]},
    "everything": {"targets": ["q_proj"], "train_also": ["norms", "embeddings", "head", "layers.1.mlp"]},
    "dora and head": {"variant": "dora", "ranks": {"v_proj": 2}, "train_also": ["head"]},
}


def adapted(folder: Path, out: Path | None = None, **section: Any) -> Any:
    """A model whose adapter does something: every trained number moved by a seeded draw."""
    loaded = load(str(folder), "float32")
    spec = AdapterPlan.of(loaded.model, LoraSection(**{"rank": 3, "alpha": 6, **section}))
    attach.attach(loaded.model, spec, seed=1)
    moved = [
        (name, array + 0.05 * mx.random.normal(array.shape, key=mx.random.key(index)))
        for index, (name, array) in enumerate(attach.trained_tensors(loaded.model).items())
    ]
    loaded.model.load_weights(moved, strict=False)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        adapter_files.save_config(out, spec)
        adapter_files.save_tensors(loaded.model, out, spec.file)
    return loaded.model


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_loaded_and_merged_as_it_was_trained(kind: str, mlx_model: Path, tmp_path: Path) -> None:
    """Bits after loading; logits of the merged float32 model; the base when switched off."""
    model = adapted(mlx_model, tmp_path, **KINDS[kind])
    wanted = np.array(model(IDS))
    again = load(str(mlx_model), "float32").model
    base = np.array(again(IDS))
    adapter_files.load_adapter(again, tmp_path)
    for name, array in attach.trained_tensors(model).items():
        assert mx.array_equal(array, attach.trained_tensors(again)[name]).item(), name
    np.testing.assert_array_equal(np.array(again(IDS)), wanted)
    assert np.abs(wanted - base).max() > 0.05
    with attach.switched_off(again):
        np.testing.assert_array_equal(np.array(again(IDS)), base)
    np.testing.assert_array_equal(np.array(again(IDS)), wanted)
    dense = load(str(mlx_model), "float32").model
    merged = dict(open_merged(mlx_model, tmp_path, mx.float32).tensors())
    dense = _dense(dense, merged)
    np.testing.assert_allclose(np.array(dense(IDS)), wanted, atol=5e-5)


def _dense(model: Any, tensors: dict[str, mx.array]) -> Any:
    from mlx_lm.utils import dequantize_model

    dense = dequantize_model(model)
    dense.load_weights(list(tensors.items()))
    return dense


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_mlx_lm_runs_the_variants_that_its_layout_holds(kind: str, mlx_model: Path, tmp_path: Path) -> None:
    from mlx_lm.utils import load_adapters, load_model

    wanted = np.array(adapted(mlx_model, tmp_path, **KINDS[kind])(IDS))
    theirs = load_adapters(load_model(mlx_model)[0], str(tmp_path))
    theirs.eval()
    np.testing.assert_allclose(np.array(theirs(IDS)), wanted, atol=5e-5)


@pytest.mark.parametrize("kind", ["ranks", "norms"])
def test_mlx_lm_refuses_what_its_layout_cannot_hold(kind: str, mlx_model: Path, tmp_path: Path) -> None:
    from mlx_lm.utils import load_adapters, load_model

    adapted(mlx_model, tmp_path, **KINDS[kind])
    assert (tmp_path / "mlxtune_adapters.safetensors").is_file()
    assert not (tmp_path / "adapters.safetensors").exists()
    with pytest.raises(Exception):  # noqa: B017 (any refusal of theirs will do)
        load_adapters(load_model(mlx_model)[0], str(tmp_path))


def test_scales_are_those_of_the_papers(mlx_model: Path) -> None:
    """alpha / r, alpha / sqrt(r) in rsLoRA, each target with its own r."""
    model = adapted(mlx_model, rank=4, alpha=6, variant="rslora", ranks={"up_proj": 9})
    layers = attach.adapted_layers(model)
    assert layers["model.layers.0.self_attn.q_proj"].scale == 3.0
    assert (layers["model.layers.1.mlp.up_proj"].scale, layers["model.layers.1.mlp.up_proj"].rank) == (2.0, 9)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"ranks": {"qproj": 4}}, "Did you mean q_proj"),
        ({"train_also": ["nrms"]}, "norms, embeddings, head"),
        ({"train_also": ["layers.1.mlp"]}, "has an adapter as well"),
    ],
)
def test_a_name_that_means_nothing_is_refused(section: dict, expected: str, mlx_model: Path) -> None:
    with pytest.raises(UserError) as refused:
        AdapterPlan.of(load(str(mlx_model)).model, LoraSection(**section))
    assert expected in str(refused.value)


def _config(model: Path, data: Path, *settings: str, steps: int = 6) -> resolve.Config:
    flags = {"model.path": str(model), "data.path": str(data)}
    common = (f"train.steps={steps}", "train.lr=5e-3", "train.save_every=3", "lora.rank=3", "lora.alpha=6")
    return resolve.load(None, (*common, *settings), flags)


def _quiet() -> Display:
    from rich.console import Console

    return Display(Console(quiet=True))


@pytest.mark.parametrize(
    "settings", [["lora.variant=dora"], ["lora.train_also=[norms,embeddings,head]", "lora.ranks={down_proj: 5}"]]
)
def test_a_run_stopped_and_resumed_ends_with_the_same_bits(
    settings: list[str], mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = _config(mlx_model, data, *settings)
    with _quiet() as display:
        train(wanted, tmp_path / "whole", display)
    with monkeypatch.context() as patch, pytest.raises(Interrupted), _quiet() as display:
        tiny.interrupt_after(patch, 1)
        train(wanted, tmp_path / "cut", display)
    with _quiet() as display:
        train(RunFolder(tmp_path / "cut").config(), tmp_path / "cut", display, resume=True)
    one, other = (mx.load(str(adapter_files.adapter_file(tmp_path / name))) for name in ("whole", "cut"))
    assert sorted(one) == sorted(other)
    for name, array in one.items():
        assert mx.array_equal(array, other[name]).item(), name


def test_training_goes_on_from_an_adapter(mlx_model: Path, data: Path, tmp_path: Path) -> None:
    """The first evaluation is the adapter's own, its ranks are kept, and it gets better."""
    with _quiet() as display:
        first = train(_config(mlx_model, data, "lora.ranks={down_proj: 5}"), tmp_path / "first", display)
    more = _config(mlx_model, data, f"lora.start_from={tmp_path / 'first'}", "lora.rank=7")
    with _quiet() as display:
        second = train(more, tmp_path / "second", display)
    events = [json.loads(line) for line in (tmp_path / "second" / "events.jsonl").read_text().splitlines()]
    start = next(event for event in events if event["kind"] == "eval")
    assert start["loss"] == pytest.approx(first.best_loss, abs=1e-6)
    assert second.best_loss < first.best_loss
    assert AdapterConfig.read(tmp_path / "second").modules == AdapterConfig.read(tmp_path / "first").modules
    assert any("going on from" in event.get("text", "") for event in events)


def test_a_tied_head_is_trained_with_its_embedding(tmp_path: Path, data: Path) -> None:
    """Both uses of the matrix see the new numbers, and `head` alone is refused."""
    hf = tiny.make_model(tmp_path / "hf", "llama", tie_word_embeddings=True)
    model = adapted(hf, targets=["q_proj"], train_also=["embeddings"])
    wanted = np.array(model(IDS))
    model.model.embed_tokens.weight = model.model.embed_tokens.frozen.module.weight
    assert np.abs(np.array(model(IDS)) - wanted).max() > 0.05
    with pytest.raises(UserError, match="no 'head'") as refused:
        AdapterPlan.of(load(str(hf)).model, LoraSection(train_also=["head"]))
    assert "embeddings" in refused.value.hint
