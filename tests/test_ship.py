"""What was trained is what ships: fuse and export, against transformers, PEFT and formulas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlxtune.adapter import adapter_files
from mlxtune.adapter.layers import LoRALinear
from mlxtune.data.chat.masking import Example
from mlxtune.errors import UserError
from mlxtune.model.load import load
from mlxtune.ship import verify
from mlxtune.ship.artefacts import HuggingFace
from mlxtune.ship.export import ship
from mlxtune.ship.request import Request

IDS = np.random.default_rng(5).integers(3, 250, (1, 48))


def trained_logits(model: Path, run: Path) -> np.ndarray:
    loaded = load(str(model), "float32")
    adapter_files.load_adapter(loaded.model, run)
    return np.array(loaded.model(mx.array(IDS)))


def torch_logits(model) -> np.ndarray:  # type: ignore[no-untyped-def]
    import torch

    model.eval()
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.float().numpy()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, Path]:
    """A Qwen2 (biases on q, k, v), 4 bits, with a run of the last block alone."""
    folder = tmp_path_factory.mktemp("qwen")
    tiny.make_model(folder / "hf", "qwen2", rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    tiny.done("convert", folder / "hf", folder / "mlx", "--group-size", "32")
    settings = ("train.steps=8", "train.lr=1e-2", "lora.layers=1", "lora.rank=3")
    return folder / "mlx", tiny.trained(folder / "mlx", data, folder / "run", *settings)


@pytest.fixture(params=["llama", "qwen2"])
def tuned(request: pytest.FixtureRequest, mlx_model: Path, run: Path) -> tuple[Path, Path]:
    return (mlx_model, run) if request.param == "llama" else request.getfixturevalue("qwen")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.3), (None, 1e-3)])
def test_an_hf_export_is_the_trained_model_in_transformers(
    dtype: str | None, tolerance: float, tuned: tuple[Path, Path], tmp_path: Path
) -> None:
    """Loaded with no missing and no unexpected key, on other tokens than the command's own proof used. Its config.json
    is the one that transformers wrote: rope_parameters, no quantization, no normalised extras."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, adapter = tuned
    extra = ("--dtype", dtype) if dtype else ()
    tiny.done("export", "--model", model, "--adapter", adapter, "--to", "hf", "--out", tmp_path / "hf", *extra)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert str(loaded.dtype).removeprefix("torch.") == (dtype or "float32")
    expected = trained_logits(model, adapter)
    assert np.abs(torch_logits(loaded.float()) - expected).max() < tolerance
    with_no_adapter = np.array(load(str(model), "float32").model(mx.array(IDS)))
    assert np.abs(with_no_adapter - expected).max() > 0.3
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == tiny.CHATML
    report = json.loads((tmp_path / "hf" / "verification.json").read_text())
    assert report["verdict"] == "passed"
    assert "transformers" in report["candidate"]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    original = json.loads((model / "mlxtune_source.json").read_text())["config"]
    assert {**config, "dtype": None} == {**original, "dtype": None}
    assert "rope_parameters" in config and "rope_theta" not in config


def test_a_peft_export_is_the_trained_model_on_the_dense_base(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    """transformers on an HF export of the base alone, PEFT on top: within 1e-3 of ours."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, adapter = tuned
    options = ("--to", "hf", "--out", tmp_path / "base", "--dtype", "float32", "--no-verify")
    tiny.done("export", "--model", model, *options)
    tiny.done(
        *("export", "--model", model, "--adapter", adapter, "--to", "peft", "--out", tmp_path / "peft"),
        *("--base-name", "acme/tiny"),
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = torch_logits(PeftModel.from_pretrained(base, str(tmp_path / "peft")))
    assert np.abs(theirs - trained_logits(model, adapter)).max() < 1e-3
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "acme/tiny"
    assert json.loads((tmp_path / "peft" / "verification.json").read_text())["verdict"] == "passed"


def test_peft_factors_are_the_runs_bit_for_bit(mlx_model: Path, run: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    out = tmp_path / "peft"
    options = ("--adapter", run, "--to", "peft", "--out", out, "--no-verify")
    result = tiny.mlxtune("export", "--model", mlx_model, *options)
    assert "--base-name" in result.stderr  # the converted folder came from a path: its hub name is unknown
    theirs = load_file(out / "adapter_model.safetensors")
    ours = load_file(run / "adapters.safetensors")
    assert len(theirs) == len(ours) == 28
    for name, array in ours.items():
        path, letter = name.rsplit(".lora_", 1)
        np.testing.assert_array_equal(theirs[f"base_model.model.{path}.lora_{letter.upper()}.weight"], array.T)


def test_a_16_bit_fuse_is_the_trained_model(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    """Loaded by mlx_lm alone."""
    import mlx_lm

    model, adapter = tuned
    result = tiny.done("fuse", "--model", model, "--adapter", adapter, "--out", tmp_path / "fused")
    assert "100.0% of the adapter's effect survived" in result.stdout
    fused, _ = mlx_lm.load(str(tmp_path / "fused"))
    assert np.abs(np.array(fused(mx.array(IDS))) - trained_logits(model, adapter)).max() < 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_fuse_quantizes_what_changed_and_keeps_the_rest(
    bits: int, qwen: tuple[Path, Path], tmp_path: Path
) -> None:
    """The run adapted the last block alone: every other tensor keeps its codes; the share is printed."""
    model, adapter = qwen
    out = tmp_path / "fused"
    result = tiny.done("fuse", "--model", model, "--adapter", adapter, "--out", out, "--bits", str(bits))
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (model, out))
    for name, array in before.items():
        same = array.shape == after[name].shape and mx.array_equal(array, after[name]).item()
        changed = "layers.1." in name and name.endswith(("proj.weight", "proj.scales", "proj.biases"))
        # At 4 bits a group may keep the base's scale; its codes move.
        assert same != changed or (changed and bits == 4 and not name.endswith("weight")), name
    loaded = load(str(out))
    assert loaded.model.layers[1].mlp.up_proj.bits == bits
    assert loaded.model.layers[0].mlp.up_proj.bits == 4
    report = json.loads((out / "verification.json").read_text())
    assert f"{report['share']:.1%} of the adapter's effect survived" in result.stdout
    assert report["mean_kl"] < (1e-3 if bits == 4 else 1e-6)


def test_rounding_that_drowns_the_tune_is_said(hf_model: Path, data: Path, tmp_path: Path) -> None:
    """A barely trained adapter on a dense base, fused to 4 bits: noise far above the effect."""
    run = tiny.trained(hf_model, data, tmp_path / "run", "train.steps=1", "train.lr=1e-5")
    options = ("--adapter", run, "--out", tmp_path / "fused", "--bits", "4")
    result = tiny.done("fuse", "--model", hf_model, *options)
    assert "4-bit rounding changed the model by up to" in result.stderr


def test_routers_keep_the_bits_their_family_gives_them(data: Path, tmp_path: Path) -> None:
    """mlx-lm quantizes Qwen3-MoE's routers to 8 bits; so does a 4-bit fuse of the dense model."""
    hf = tiny.make_model(tmp_path / "hf", "qwen3_moe")
    run = tiny.trained(hf, data, tmp_path / "run", "train.steps=2", "lora.targets=[q_proj]")
    options = ("--adapter", run, "--out", tmp_path / "fused", "--bits", "4")
    tiny.done("fuse", "--model", hf, *options)
    model = load(str(tmp_path / "fused")).model
    assert (model.layers[0].mlp.gate.bits, model.layers[0].self_attn.q_proj.bits) == (8, 4)


@pytest.fixture(scope="module")
def ref(mlx_model: Path, run: Path, held_out: Sequence[Example]) -> verify.Reference:
    return verify.reference(str(mlx_model), run, held_out)


def measured(ref: verify.Reference, logits: np.ndarray, storage: str) -> verify.Report:
    """The report on a candidate with these logits [N, V]."""
    rows = iter(np.split(logits, np.cumsum([batch.targets for batch in ref.batches])[:-1]))
    return verify.measure(ref, lambda batch: next(rows), "made up", storage)


def test_the_share_is_the_projection_on_the_adapters_effect(ref: verify.Reference) -> None:
    """A candidate that applies half of the effect, by construction, has half of the share; the full one all of it."""
    half = measured(ref, ref.base + 0.5 * (ref.trained - ref.base), "4 bits")
    assert half.share == pytest.approx(0.5, abs=1e-6)
    assert half.verdict == ("lossy" if half.gain_kept < 0.95 else "passed")
    full = measured(ref, ref.trained, "float32")
    assert (full.share, full.max_difference, full.top1, full.verdict) == (pytest.approx(1.0), 0.0, 1.0, "passed")


def test_verdicts_follow_the_limits(ref: verify.Reference) -> None:
    """An error of 2e-3 fails in float32; one that passes is inconclusive beside a tune five times its size."""
    assert measured(ref, ref.trained + 2e-3, "float32").verdict == "failed"
    assert measured(ref, ref.trained + 9e-4, "float32").verdict == "passed"
    small = verify.Reference(ref.batches, ref.targets, ref.trained, ref.trained + 4e-3)
    assert measured(small, small.trained + 8e-4, "float32").verdict == "inconclusive"


def test_an_export_that_is_not_the_trained_model_is_not_kept(
    mlx_model: Path, run: Path, held_out: Sequence[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that forgets the scale, planted: the proof refuses it and leaves nothing behind."""
    monkeypatch.setattr(LoRALinear, "delta", lambda self: self.lora_b.T @ self.lora_a.T)
    with pytest.raises(UserError, match="not the model that was trained"):
        ship(Request(mlx_model, run, tmp_path / "hf", examples=held_out), HuggingFace("float32"))
    assert list(tmp_path.iterdir()) == []


def test_an_export_on_the_original_base_merges_into_it(
    hf_model: Path, mlx_model: Path, run: Path, tmp_path: Path
) -> None:
    """--base: W of the original plus the update, the formula written out."""
    from safetensors.numpy import load_file

    out = tmp_path / "hf"
    options = ("--adapter", run, "--to", "hf", "--out", out, "--base", hf_model)
    tiny.done("export", "--model", mlx_model, *options)
    merged, base, factors = (
        load_file(path)
        for path in (out / "model.safetensors", hf_model / "model.safetensors", run / "adapters.safetensors")
    )
    name = "model.layers.1.mlp.up_proj"
    update = 8.0 * (factors[f"{name}.lora_a"] @ factors[f"{name}.lora_b"]).T
    np.testing.assert_allclose(merged[f"{name}.weight"], base[f"{name}.weight"] + update, atol=1e-6)
    assert json.loads((out / "verification.json").read_text())["verdict"] == "measured"
