"""Foreign quantized folders through the installed command: the model that transformers computes from their plain
formula, 4 bits where nothing is asked, and nothing foreign left behind.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import mlx.core as mx
import numpy as np
import pytest
import tiny
import zoo
from mlxtune_convert.errors import UserError

from mlxtune.model.convert import Quantization, convert
from mlxtune.model.load import load

IDS = np.random.default_rng(5).integers(3, 250, (2, 24))
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 80]}
STATIC = {
    "activation_scheme": "static",
    "dequantize": False,
    "quant_method": "fp8",
    "weight_block_size": None,
    "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
INT4 = foreign.config_of_compressed("pack-quantized", group_size=32)
TEXT = zoo._TEXT | {"model_type": "ministral3", "tie_word_embeddings": True}
WRAPPER = {
    "text_config": TEXT,
    "tie_word_embeddings": True,
    "vision_config": zoo._VISION | {"model_type": "pixtral", "head_dim": 16},
}
static = foreign.fp8_one("weight_scale_inv", "activation_scale")
MODELS: dict[str, tuple[str, dict[str, Any], foreign.Packer, dict[str, Any]]] = {
    "deepseek fp8 blocks": ("deepseek_v3", {}, foreign.fp8_blocks(48, 80), FP8),
    "ministral3 static fp8": ("ministral3", {}, static, STATIC),
    "ministral3 in a wrapper": ("mistral3", WRAPPER, static, STATIC),
    "qwen3 gptq, act-order": ("qwen3", {}, foreign.gptq(4, 32, shuffled=True), GPTQ),
    "qwen3 awq": ("qwen3", {}, foreign.awq(64), AWQ),
    "llama nf4": ("llama", {}, foreign.bnb4(foreign.NF4), BNB),
    "qwen3_moe int4": ("qwen3_moe", {"moe_intermediate_size": 64}, foreign.compressed(4, 32, symmetric=False), INT4),
}
Folders = tuple[Path, Path]  # a quantized model, and what it means in float32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folders]:
    """One of MODELS, made once."""
    known: dict[str, Folders] = {}

    def make(name: str) -> Folders:
        if name not in known:
            kind, changes, packer, settings = MODELS[name]
            folder = tiny.make_model(tmp_path_factory.mktemp("m") / "src", kind, dtype="bfloat16", **changes)
            known[name] = folder, foreign.quantized(folder, packer, settings)
        return known[name]

    return make


def theirs(folder: Path) -> np.ndarray:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model, info = getattr(transformers, config.architectures[0]).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


def ours(folder: Path) -> np.ndarray:
    return np.array(load(str(folder)).model(mx.array(IDS)))


def no_trace_of_it(folder: Path) -> dict[str, Any]:
    """Nothing in the written folder declares the foreign method. Returns its config.json."""
    for name in ("config.json", "mlxtune_source.json"):
        assert "quant_method" not in (folder / name).read_text()
    assert {path.name for path in folder.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors"}
    assert not (folder / "plain").exists()
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_dequantized_it_is_the_model_of_the_plain_formula(
    name: str, made: Callable[[str], Folders], tmp_path: Path
) -> None:
    source, plain = made(name)
    result = tiny.done("convert", source, tmp_path / "mlx", "--bits", "16", "--dtype", "float32")
    assert "dequantized\n" in result.stderr
    assert "quantization" not in no_trace_of_it(tmp_path / "mlx")
    assert np.abs(ours(tmp_path / "mlx") - theirs(plain)).max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_without_options_it_becomes_four_bits(name: str, made: Callable[[str], Folders], tmp_path: Path) -> None:
    source, plain = made(name)
    done = convert(str(source), tmp_path / "mlx", Quantization.of(None, None, None))
    config = no_trace_of_it(tmp_path / "mlx")
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (4, 64)
    said = done.notes[0]
    if name == "qwen3 awq":  # MLX has the same codes; what the source left in 16 bits stays so
        assert "codes are kept" in said
        assert np.abs(ours(tmp_path / "mlx") - theirs(plain)).max() < 5e-3
        return
    assert said.endswith("dequantized, then quantized as asked")
    direct = convert(str(plain), tmp_path / "direct", Quantization.of(None, None, None), "bfloat16")
    # Of tiny matrices, some of a width that stays in 16 bits; DeepSeek's routers keep float32 where nobody casts them.
    assert abs(direct.bits_per_weight - done.bits_per_weight) < 0.05 and done.bits_per_weight < 7
    assert np.abs(ours(tmp_path / "mlx") - ours(tmp_path / "direct")).max() < 1e-5


@pytest.mark.parametrize(("kind", "changes"), [("mistral3", WRAPPER), ("gemma2", {}), ("gpt_bigcode", {})])
def test_kept_codes_find_their_way_into_every_family(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Of float32 models: scales and biases are exact, so the model is that of the formula. A wrapper's names change on
    the way."""
    folder = tiny.make_model(tmp_path / "src", kind, **changes)
    plain = foreign.quantized(folder, foreign.gptq(4, 32), GPTQ)
    done = convert(str(folder), tmp_path / "mlx", Quantization.of(None, None, None))
    assert done.notes[0].startswith("GPTQ (4 bits, groups of 32): its codes are kept; ")
    quantization = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    assert (quantization["bits"], quantization["group_size"]) == (4, 32)
    assert np.abs(ours(tmp_path / "mlx") - theirs(plain)).max() < 1e-4


def test_sixteen_bits_are_the_type_of_the_config_rounded_once(made: Callable[[str], Folders], tmp_path: Path) -> None:
    source, plain = made("llama nf4")
    convert(str(source), tmp_path / "mlx", Quantization.of(16, None, None))
    name = "model.layers.0.mlp.up_proj.weight"
    got, exact = (mx.load(str(folder / "model.safetensors"))[name] for folder in (tmp_path / "mlx", plain))
    assert got.dtype == mx.bfloat16
    assert mx.array_equal(got, exact.astype(mx.bfloat16)).item()


def test_options_ask_for_other_bits_and_what_was_left_is_quantized_too(
    made: Callable[[str], Folders], tmp_path: Path
) -> None:
    source, _ = made("qwen3 awq")
    done = convert(str(source), tmp_path / "mlx", Quantization.of(8, 32, None))
    assert done.notes == ["AWQ (4 bits, groups of 64): dequantized, then quantized as asked"]
    assert 9 <= done.bits_per_weight < 9.1


def test_a_model_that_only_the_config_calls_quantized_is_read_as_it_is(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "src")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": FP8}))
    done = convert(str(folder), tmp_path / "mlx", Quantization.of(16, None, None))
    assert "no tensor is quantized" in done.notes[0]
    no_trace_of_it(tmp_path / "mlx")
    np.testing.assert_array_equal(ours(tmp_path / "mlx"), ours(tiny.make_model(tmp_path / "same")))


def test_what_mlx_quantized_once_loses_an_older_declaration(mlx_model: Path, tmp_path: Path) -> None:
    """Folders made by others keep the source's quant_method beside MLX's own entry."""
    folder = shutil.copytree(mlx_model, tmp_path / "src")
    config = json.loads((folder / "config.json").read_text())
    declared = {"quantization_config": FP8, "text_config": {"quantization_config": FP8}}
    (folder / "config.json").write_text(json.dumps({**config, **declared}))
    (folder / "mlxtune_source.json").unlink()
    convert(str(folder), tmp_path / "mlx", Quantization.of(None, None, None))
    config = no_trace_of_it(tmp_path / "mlx")
    assert config["quantization_config"] == config["quantization"]
    np.testing.assert_array_equal(ours(tmp_path / "mlx"), ours(mlx_model))


@pytest.mark.parametrize("empty", [None, {}])
def test_an_empty_entry_in_the_config_means_not_quantized(empty: Any, tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "src")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": empty}))
    assert convert(str(folder), tmp_path / "mlx", Quantization.of(None, None, None)).bits_per_weight < 6


def test_mxfp4_of_gpt_oss_keeps_its_codes(tmp_path: Path) -> None:
    """mlx-lm reads it as it is."""
    folder = tiny.make_model(tmp_path / "src", "gpt_oss", dtype="bfloat16", intermediate_size=64)
    tensors = mx.load(str(folder / "model.safetensors"))
    codes = {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        packed, scales = mx.quantize(tensors.pop(name).swapaxes(1, 2), 32, 4, mode="mxfp4")
        codes[name] = packed
        tensors[f"{name}_blocks"] = packed.view(mx.uint8).reshape(*packed.shape[:2], -1, 16)
        tensors[f"{name}_scales"] = scales
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    done = convert(str(folder), tmp_path / "mlx", Quantization.of(None, None, None))
    assert done.notes[0].startswith("MXFP4: its codes are kept")
    assert no_trace_of_it(tmp_path / "mlx")["quantization"]["mode"] == "mxfp4"
    kept = mx.load(str(tmp_path / "mlx" / "model.safetensors"))["model.layers.0.mlp.experts.down_proj.weight"]
    assert mx.array_equal(kept, codes["model.layers.0.mlp.experts.down_proj"]).item()


def test_gpt_oss_that_only_the_config_calls_mxfp4_becomes_four_bits(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "src", "gpt_oss", dtype="bfloat16", intermediate_size=64)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    done = convert(str(folder), tmp_path / "mlx", Quantization.of(None, None, None))
    assert "no tensor is quantized" in done.notes[0]
    assert no_trace_of_it(tmp_path / "mlx")["quantization"]["mode"] == "affine"
    assert done.bits_per_weight < 5


def test_a_full_disk_is_noticed_before_anything_is_written(
    made: Callable[[str], Folders], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = made("llama nf4")
    whole = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 2 * whole))
    with pytest.raises(UserError, match="not enough disk space"):
        convert(str(source), tmp_path / "mlx", Quantization.of(None, None, None))
    tiny.nothing_written(tmp_path / "mlx")
