"""Every foreign format gives exactly the weights that its formula says; the formulas are those of tests/foreign.py."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import torch
from mlxtune_convert.foreign.folder import Opened, open_foreign, write
from mlxtune_convert.foreign.method import of_folder
from mlxtune_convert.gguf.quant_blocks import Codes, dequantize

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
NVFP4 = foreign.config_of_compressed("nvfp4-pack-quantized", type="float", group_size=16)
INT4 = foreign.config_of_compressed("pack-quantized", group_size=32)
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
BLOCKED = foreign.config_of_compressed("float-quantized", num_bits=8, strategy="block", block_structure=[48, 80])
FORMS: dict[str, tuple[foreign.Packer, dict[str, Any], str]] = {
    "fp8 blocks": (foreign.fp8_blocks(48, 80), {**FP8, "weight_block_size": [48, 80]}, "48x80 blocks"),
    "fp8 blocks of half the size": (foreign.fp8_blocks(32, 64), {**FP8, "weight_block_size": [32, 64]}, "32x64 blocks"),
    "fp8 blocks, no size given": (foreign.fp8_blocks(32, 64), FP8, "32x64 blocks"),
    "fp8 blocks of bfloat16 scales": (
        foreign.fp8_blocks(48, 80, kind=torch.bfloat16),
        {**FP8, "weight_block_size": [48, 80]},
        "48x80 blocks",
    ),
    "fp8 static": (foreign.fp8_one("weight_scale_inv", "activation_scale"), FP8, "one scale per tensor"),
    "fp8 static, one-element scale": (foreign.fp8_one("weight_scale", "input_scale", (1,)), FP8, "per tensor"),
    "fp8 rows": (foreign.fp8_rows, FP8, "one scale per row"),
    "compressed fp8 rows": (
        foreign.fp8_rows,
        foreign.config_of_compressed("float-quantized", num_bits=8),
        "compressed-tensors (fp8, one scale per row)",
    ),
    "compressed fp8 blocks": (foreign.fp8_blocks(48, 80, "weight_scale"), BLOCKED, "fp8, 48x80 blocks"),
    "compressed int8": (
        foreign.int8_rows,
        foreign.config_of_compressed("int-quantized", num_bits=8, symmetric=False),
        "int8, one scale per row",
    ),
    "compressed int4": (foreign.compressed(4, 32), INT4, "4 bits, groups of 32"),
    "compressed int4 with zero points": (foreign.compressed(4, 32, symmetric=False), INT4, "groups of 32"),
    "compressed int4, act-order": (foreign.compressed(4, 32, shuffled=True), INT4, "groups of 32, act-order"),
    "compressed int4 rows": (foreign.compressed(4, 0), INT4, "groups of 128"),
    "compressed int8 packed": (
        foreign.compressed(8, 64, symmetric=False),
        foreign.config_of_compressed("pack-quantized", num_bits=8),
        "8 bits, groups of 64",
    ),
    "compressed int3": (
        foreign.compressed(3, 64),
        foreign.config_of_compressed("pack-quantized", num_bits=3),
        "3 bits, groups of 64",
    ),
    "compressed nvfp4": (foreign.nvfp4("weight_packed", "weight_global_scale", True), NVFP4, "NVFP4"),
    "compressed mxfp4": (foreign.mxfp4, foreign.config_of_compressed("mxfp4-pack-quantized"), "MXFP4"),
    "modelopt nvfp4": (foreign.nvfp4("weight", "weight_scale_2", False), MODELOPT, "ModelOpt NVFP4 (NVFP4)"),
    "modelopt fp8": (foreign.fp8_one("weight_scale", "input_scale"), {**MODELOPT, "quant_algo": "FP8"}, "ModelOpt FP8"),
    "bnb nf4 nested": (foreign.bnb4(foreign.NF4), BNB, "bitsandbytes (nf4, double quantization)"),
    "bnb nf4": (foreign.bnb4(foreign.NF4, nested=False), BNB, "bitsandbytes (nf4)"),
    "bnb fp4": (foreign.bnb4([x / 6 for x in foreign.FP4], 128, False, "fp4"), BNB, "bitsandbytes (fp4)"),
    "bnb int8": (foreign.bnb8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes (int8)"),
    "gptq": (foreign.gptq(4, 32), GPTQ, "GPTQ (4 bits, groups of 32)"),
    "gptq without g_idx": (foreign.gptq(4, 32, index=False), GPTQ, "GPTQ (4 bits, groups of 32)"),
    "gptq, act-order": (foreign.gptq(4, 32, shuffled=True), GPTQ, "groups of 32, act-order"),
    "gptq v2": (foreign.gptq(4, 32, later=True), {**GPTQ, "checkpoint_format": "gptq_v2"}, "groups of 32"),
    "gptq of one group": (foreign.gptq(4, 128), {**GPTQ, "group_size": -1}, "groups of 128"),
    "gptq 2 bits": (foreign.gptq(2, 32), {**GPTQ, "bits": 2}, "2 bits"),
    "gptq 3 bits": (foreign.gptq(3, 32, shuffled=True), {**GPTQ, "bits": 3}, "3 bits"),
    "gptq 8 bits": (foreign.gptq(8, 32), {**GPTQ, "bits": 8}, "8 bits"),
    "gptq, bits by module": (foreign.gptq(8, 32), {**GPTQ, "dynamic": {"+:.*": {"bits": 8}}}, "8 bits"),
    "awq": (foreign.awq(32), AWQ, "AWQ (4 bits, groups of 32)"),
}
WEIGHT = np.random.default_rng(0).normal(0, 0.05, (96, 128)).astype(np.float32)


def opened(folder: Path, **options: Any) -> Opened:
    found = of_folder(folder, json.loads((folder / "config.json").read_text()))
    assert found is not None
    return open_foreign(found, **{"keep": False, "dtype": "float32", **options})


def one(tmp_path: Path, packer: foreign.Packer, settings: dict[str, Any] | None, **options: Any) -> Any:
    """What is read of one module, and what its tensors mean."""
    tensors, means = packer(WEIGHT)
    named = {f"model.layers.0.up_proj.{part}": tensor for part, tensor in tensors.items()}
    named["model.norm.weight"] = torch.ones(4, dtype=torch.bfloat16)
    return opened(foreign.written(tmp_path / "m", named, settings), **options), means


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_weights_of_its_formula(form: str, tmp_path: Path) -> None:
    packer, settings, title = FORMS[form]
    model, means = one(tmp_path, packer, settings)
    (part,) = model.found.parts
    assert title in model.found.title
    assert (part.name, part.shape, model.plain) == (
        "model.layers.0.up_proj.weight",
        WEIGHT.shape,
        ["model.norm.weight"],
    )
    np.testing.assert_allclose(part.dense(np.dtype(np.float32)), means, rtol=3e-7, atol=1e-12)
    assert 0 < np.abs(means - WEIGHT).max() < 0.06, "the formula itself must be near what was packed"


@pytest.mark.parametrize(
    "form", ["gptq", "gptq 3 bits in order", "gptq v2", "awq", "compressed int4", "compressed int4 with zero points"]
)
def test_codes_that_mlx_can_hold_are_kept(form: str, tmp_path: Path) -> None:
    """In float32 scales they are exact; in float16 a bias is rounded as the weights themselves would be."""
    forms = {**FORMS, "gptq 3 bits in order": (foreign.gptq(3, 32), {**GPTQ, "bits": 3}, "")}
    packer, settings, _ = forms[form]
    model, means = one(tmp_path, packer, settings, keep=True, dtype=None)
    assert model.kept
    (part,) = model.found.parts
    exact = part.codes(np.dtype(np.float32))
    np.testing.assert_allclose(dequantize(exact), means, rtol=2e-6, atol=2e-7)
    assert np.abs(dequantize(part.codes(np.dtype(np.float16))) - means).max() < np.abs(means).max() * 2**-9


def test_mxfp4_codes_are_kept_bit_for_bit(tmp_path: Path) -> None:
    packer, settings, _ = FORMS["compressed mxfp4"]
    model, means = one(tmp_path, packer, settings, keep=True, dtype=None)
    (part,) = model.found.parts
    codes: Codes = part.codes(model.dtype)
    assert model.kept and codes.mode == "mxfp4"
    np.testing.assert_array_equal(dequantize(codes), means)


@pytest.mark.parametrize("form", ["gptq, act-order", "gptq 8 bits", "compressed int4 rows", "fp8 blocks", "bnb nf4"])
def test_codes_that_mlx_cannot_hold_or_of_more_than_four_bits_become_floats(form: str, tmp_path: Path) -> None:
    packer, settings, _ = FORMS[form]
    if form == "compressed int4 rows":
        packer = lambda weight: foreign.compressed(4, 0)(np.tile(weight, (1, 2)))  # noqa: E731
    assert not one(tmp_path, packer, settings, keep=True, dtype=None)[0].kept


def test_codes_are_not_kept_where_mlx_lm_stacks_or_splits_the_matrices(tmp_path: Path) -> None:
    tensors, _ = foreign.gptq(4, 32)(WEIGHT)
    named = {f"model.layers.0.mlp.experts.0.up_proj.{part}": tensor for part, tensor in tensors.items()}
    folder = foreign.written(tmp_path / "m", named, GPTQ, model_type="qwen3_moe")
    assert not opened(folder, keep=True, dtype=None).kept


def test_experts_in_one_tensor_are_computed_one_by_one(tmp_path: Path) -> None:
    """fp8 with a block grid per expert, and gpt-oss's MXFP4, whose matrices are turned."""
    packs = [foreign.fp8_blocks(48, 80)(WEIGHT * factor) for factor in (1, 2, 3)]
    tensors = {
        "model.layers.0.mlp.experts.up_proj": torch.stack([tensors["weight"] for tensors, _ in packs]),
        "model.layers.0.mlp.experts.up_proj_scale_inv": torch.stack([t["weight_scale_inv"] for t, _ in packs]),
    }
    folder = foreign.written(tmp_path / "fp8", tensors, {**FP8, "weight_block_size": [48, 80]})
    (part,) = opened(folder).found.parts
    np.testing.assert_array_equal(part.dense(np.dtype(np.float32)), np.stack([means for _, means in packs]))

    packs = [foreign.mxfp4(WEIGHT * factor) for factor in (1, 2, 3)]
    blocks = torch.stack([tensors["weight_packed"] for tensors, _ in packs]).reshape(3, 96, -1, 16)
    scales = torch.stack([tensors["weight_scale"] for tensors, _ in packs])
    named = {"e.up_proj_blocks": blocks, "e.up_proj_scales": scales}
    (part,) = opened(foreign.written(tmp_path / "mxfp4", named, {"quant_method": "mxfp4"})).found.parts
    expected = np.stack([means.T for _, means in packs])
    np.testing.assert_array_equal(part.dense(np.dtype(np.float32)), expected)


def test_scales_that_are_powers_of_two_in_bytes_are_read(tmp_path: Path) -> None:
    """MXFP8 and DeepSeek's later fp8 store exponents, with and without a type of their own."""
    values, means = foreign._float8(WEIGHT, np.full_like(WEIGHT, 2.0**-10))
    for number, kind in enumerate((torch.uint8, torch.float8_e8m0fnu)):
        scale = torch.full((96, 4), 127 - 10, dtype=torch.uint8).view(kind)
        tensors = {"a.weight": values, "a.weight_scale_inv": scale}
        folder = foreign.written(tmp_path / str(number), tensors, {"quant_method": "mxfp8", "scale_fmt": "ue8m0"})
        (part,) = opened(folder).found.parts
        np.testing.assert_array_equal(part.dense(np.dtype(np.float32)), means)


def test_a_zero_point_of_zero_comes_back_from_the_first_gptq_format(tmp_path: Path) -> None:
    """It was stored as one less by subtracting from the whole word, so it borrowed from its neighbour."""
    tensors, _ = foreign.gptq(4, 32, later=True)(WEIGHT)
    zeros = np.random.default_rng(1).integers(0, 16, (4, 96))
    assert (zeros == 0).any()
    words = foreign.stream(zeros, 4).numpy().view(np.uint32)
    stored = torch.tensor((words - np.uint32(0x11111111)).view(np.int32))
    named = {f"a.{part}": tensor for part, tensor in {**tensors, "qzeros": stored}.items()}
    (first,) = opened(foreign.written(tmp_path / "v1", named, GPTQ)).found.parts
    later = {**named, "a.qzeros": foreign.stream(zeros, 4)}
    (second,) = opened(foreign.written(tmp_path / "v2", later, {**GPTQ, "checkpoint_format": "gptq_v2"})).found.parts
    np.testing.assert_array_equal(first.dense(np.dtype(np.float32)), second.dense(np.dtype(np.float32)))


def test_scales_may_lie_in_another_shard(tmp_path: Path) -> None:
    tensors, means = foreign.fp8_rows(WEIGHT)
    folder = foreign.written(tmp_path / "m", {"a.weight": tensors["weight"]}, FP8)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    foreign.save_file({"a.weight_scale": tensors["weight_scale"]}, folder / "model-00002-of-00002.safetensors")
    files = {"a.weight": "model-00001-of-00002.safetensors", "a.weight_scale": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "out").mkdir()
    write(opened(folder), tmp_path / "out")
    out = foreign.load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(out["a.weight"].numpy(), means)


def test_no_more_than_a_few_matrices_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32. Joining a shard's header and data takes a buffer of its own, the same for any model."""
    monkeypatch.setattr("mlxtune_convert.tensors.shutil.copyfileobj", lambda *_: None)
    weight = np.random.default_rng(0).normal(0, 0.05, (256, 256)).astype(np.float32)
    tensors, _ = foreign.fp8_blocks(128, 128)(weight)
    named = {f"{n}.{part}": tensor.clone() for n in range(32) for part, tensor in tensors.items()}
    model = opened(foreign.written(tmp_path / "m", named, {**FP8, "weight_block_size": [128, 128]}))
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    write(model, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(model.found.parts) == 32
    assert peak < 8 * weight.nbytes


def test_a_model_of_many_matrices_needs_no_more_open_files_than_shards(tmp_path: Path) -> None:
    """macOS lets a process open 256."""
    tensors, _ = foreign.gptq(4, 32)(WEIGHT)
    named = {f"{n}.{part}": tensor.clone() for n in range(100) for part, tensor in tensors.items()}
    folder = foreign.written(tmp_path / "m", named, GPTQ)
    before = len(os.listdir("/dev/fd"))
    model = opened(folder)
    assert len(model.found.parts) == 100
    assert len(os.listdir("/dev/fd")) < before + 10


def test_what_is_no_weight_is_copied_and_what_declares_the_quantization_is_not(tmp_path: Path) -> None:
    folder = foreign.written(tmp_path / "m", {f"a.{k}": t for k, t in foreign.fp8_rows(WEIGHT)[0].items()}, FP8)
    kept = ("preprocessor_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja", "modeling.py")
    left = ("quantize_config.json", "hf_quant_config.json", "pytorch_model.bin", "consolidated.safetensors")
    (folder / "additional_chat_templates").mkdir()
    for name in (*kept, *left):
        (folder / name).write_text("{}")
    (tmp_path / "out").mkdir()
    write(opened(folder), tmp_path / "out")
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {*kept, "config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("config", "bias", "kept"),
    [({}, 0.0, False), ({}, 0.5, True), ({"attention_bias": True}, 0.0, True), ({"model_type": "qwen2"}, 0.0, True)],
)
def test_biases_of_zeros_are_left_out_where_the_family_has_none(
    config: dict[str, Any], bias: float, kept: bool, tmp_path: Path
) -> None:
    """AutoGPTQ wrote one for each matrix; mlx-lm's llama refuses what it does not know."""
    named = {f"a.{part}": tensor for part, tensor in foreign.gptq(4, 32)(WEIGHT)[0].items()}
    folder = foreign.written(tmp_path / "m", {**named, "a.bias": torch.full((96,), bias)}, GPTQ, **config)
    assert ("a.bias" in opened(folder).plain) is kept


def test_a_hybrid_keeps_what_is_not_quantized_in_its_own_type(tmp_path: Path) -> None:
    tensors, means = foreign.fp8_rows(WEIGHT)
    named = {f"language_model.up_proj.{part}": tensor for part, tensor in tensors.items()}
    named |= {
        "vision_tower.conv.weight": torch.randn(2, 3, 4, 4, dtype=torch.float16),
        "router.bias": torch.randn(8, dtype=torch.float32),
        "positions": torch.arange(3),
    }
    folder = foreign.written(tmp_path / "m", named, FP8, text_config={"dtype": "bfloat16"})
    (tmp_path / "out").mkdir()
    write(opened(folder, dtype=None), tmp_path / "out")
    out = foreign.load_file(tmp_path / "out" / "model.safetensors")
    for name in ("vision_tower.conv.weight", "router.bias", "positions"):
        assert out[name].dtype == named[name].dtype and torch.equal(out[name], named[name])
    assert out["language_model.up_proj.weight"].dtype == torch.bfloat16
    assert torch.equal(out["language_model.up_proj.weight"], torch.tensor(means).to(torch.bfloat16))
    assert set(out) == {"language_model.up_proj.weight", "vision_tower.conv.weight", "router.bias", "positions"}
