"""Hugging Face folders in: configuration normalised, every bit width and mode, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from mlxtune_convert.hf.configs import normalise

from mlxtune.model.load import load, open_model

IDS = np.random.default_rng(0).integers(3, 250, (1, 40))
ROPE = {"rope_type": "default", "rope_theta": 777.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def hf_logits(folder: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.from_numpy(IDS)).logits.numpy()


@pytest.mark.parametrize(
    ("kind", "rope"),
    [("llama", ROPE), ("llama", LLAMA3), ("qwen2", ROPE), ("mixtral", ROPE), ("qwen3", ROPE), ("granite", ROPE)],
)
def test_logits_equal_transformers_whatever_the_rotary_base(kind: str, rope: dict, tmp_path: Path) -> None:
    """transformers 5 writes `rope_parameters` alone; read naively, the rotary base would silently be the default."""
    hf = tiny.make_model(tmp_path / "hf", kind, rope_parameters=rope)
    assert "rope_theta" not in json.loads((hf / "config.json").read_text())
    tiny.done("convert", hf, tmp_path / "mlx", "--bits", "16")
    ours = np.array(load(str(tmp_path / "mlx")).model(mx.array(IDS)))
    straight = np.array(load(str(hf)).model(mx.array(IDS)))
    expected = hf_logits(hf)
    assert np.abs(ours - expected).max() < 1e-4
    np.testing.assert_array_equal(straight, ours)


def test_old_style_configs_come_back_unchanged() -> None:
    config = {"model_type": "llama", "rope_theta": 5.0, "rope_scaling": None, "hidden_size": 8}
    assert normalise(config) == config


def test_windowed_models_keep_both_rotary_bases() -> None:
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    config = normalise({"rope_parameters": rope})
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)


@pytest.mark.parametrize(
    ("options", "bits", "group", "mode"),
    [
        ((), 4, 64, "affine"),
        (("--bits", "1"), 1, 64, "affine"),
        (("--bits", "2", "--group-size", "32"), 2, 32, "affine"),
        (("--bits", "3"), 3, 64, "affine"),
        (("--bits", "5"), 5, 64, "affine"),
        (("--bits", "6"), 6, 64, "affine"),
        (("--bits", "8", "--group-size", "128"), 8, 128, "affine"),
        (("--mode", "mxfp4"), 4, 32, "mxfp4"),
        (("--mode", "mxfp8"), 8, 32, "mxfp8"),
        (("--mode", "nvfp4"), 4, 16, "nvfp4"),
    ],
)
def test_every_width_and_mode_is_mlxs_own_quantization_and_loads_in_mlx_lm(
    options: tuple[str, ...], bits: int, group: int, mode: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """mx.quantize of the original matrix is the oracle for the codes."""
    import mlx_lm
    from safetensors.numpy import load_file

    folder = tmp_path_factory.mktemp("widths")
    hf = tiny.make_model(folder / "hf", hidden_size=128, intermediate_size=256)
    tiny.done("convert", hf, folder / "mlx", *options)
    model, _ = mlx_lm.load(str(folder / "mlx"))
    layer = model.layers[1].mlp.down_proj
    assert (layer.bits, layer.group_size, layer.mode) == (bits, group, mode)
    weight = mx.array(load_file(hf / "model.safetensors")["model.layers.1.mlp.down_proj.weight"])
    for ours, theirs in zip((layer.weight, layer.scales), mx.quantize(weight, group, bits, mode=mode), strict=False):
        assert mx.array_equal(ours, theirs).item()


def test_sixteen_bits_keep_every_tensor_bit_for_bit(tmp_path: Path) -> None:
    hf = tiny.make_model(tmp_path / "hf", dtype="bfloat16")
    tiny.done("convert", hf, tmp_path / "mlx", "--bits", "16")
    theirs, ours = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("hf", "mlx"))
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
        assert array.dtype == ours[name].dtype == mx.bfloat16
        assert mx.array_equal(array.view(mx.uint16), ours[name].view(mx.uint16)).item(), name


def test_a_quantized_source_keeps_its_codes_unless_asked(mlx_model: Path, tmp_path: Path) -> None:
    tiny.done("convert", mlx_model, tmp_path / "same")
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (mlx_model, tmp_path / "same"))
    assert all(mx.array_equal(array, after[name]).item() for name, array in before.items())
    result = tiny.done("convert", mlx_model, tmp_path / "dense", "--bits", "16")
    assert "already quantized" in result.stderr
    model, config = open_model(tmp_path / "dense")
    assert "quantization" not in config
    assert not any(isinstance(module, nn.QuantizedLinear) for _, module in model.named_modules())


def test_layers_whose_width_does_not_divide_are_named(tmp_path: Path) -> None:
    hf = tiny.make_model(tmp_path / "hf", hidden_size=64, intermediate_size=96)
    result = tiny.done("convert", hf, tmp_path / "mlx")
    assert "2 layers stay unquantized (first: model.layers" in result.stderr


def test_many_shards_are_read_and_written(tmp_path: Path) -> None:
    """The original in three shards with an index; ours in shards of 64 KiB through the writer itself."""
    from mlxtune_convert.tensors import ShardWriter, weight_files

    hf = tiny.make_model(tmp_path / "hf")
    whole = mx.load(str(hf / "model.safetensors"))
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    writer = ShardWriter(sharded, {"format": "pt"}, shard_bytes=64 << 10)
    for name, array in whole.items():
        writer.add(name, np.array(array))
    writer.close()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (sharded / name).write_bytes((hf / name).read_bytes())
    assert len(weight_files(sharded)) > 3
    tiny.done("convert", sharded, tmp_path / "mlx", "--bits", "16")
    ours = dict(tree_flatten(open_model(tmp_path / "mlx")[0].parameters()))
    assert all(mx.array_equal(array, ours[name]).item() for name, array in whole.items())


def test_every_end_of_turn_id_survives(tmp_path: Path) -> None:
    hf = tiny.make_model(tmp_path / "hf")
    (hf / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    tiny.done("convert", hf, tmp_path / "mlx")
    assert load(str(tmp_path / "mlx")).eos_ids == [0, 2]
