"""Every family as GGUF: llama.cpp on our file has the logits of transformers on the original, and so has our import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import conformance
import gguf as gguf_names
import mlx.core as mx
import numpy as np
import pytest
import tiny
import zoo
from mlxtune_convert.gguf import architectures as gguf_families
from mlxtune_convert.gguf import container, metadata, model_read, quant_blocks, tensor_types
from mlxtune_convert.gguf.model_write import GgufPlan

from mlxtune.adapter import adapter_files, attach
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.config.schema import LoraSection
from mlxtune.errors import UserError
from mlxtune.model.load import load, open_model
from mlxtune.ship import gguf, llama_cpp, runners
from mlxtune.ship.export import ship
from mlxtune.ship.gguf import GgufAdapter
from mlxtune.ship.request import MergedModel, Request

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [2.0] * 8}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
WINDOWS = {"layer_types": None, "num_hidden_layers": 4, "sliding_window": 16}  # the family's own pattern
# Family, and what differs from the zoo's.
SHAPES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3_moe", "olmo2")},
    **{name: {} for name in ("nemotron", "ernie4_5", "hunyuan_v1_dense", "cohere")},
    "llama biases": {"attention_bias": True, "mlp_bias": True},
    "llama of 3.1": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192}},
    "llama linear rope": {"rope_parameters": LINEAR, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "qwen3 yarn": {"rope_parameters": {**YARN, "original_max_position_embeddings": 64}},
    "gemma": {"head_dim": 32},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {**WINDOWS, "num_hidden_layers": 6},
    "phi3": {"sliding_window": None},
    "phi3 longrope": {
        "max_position_embeddings": 1024,
        "original_max_position_embeddings": 512,
        "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 512},
    },
    "phi3 longrope of another scale": {
        "max_position_embeddings": 1024,
        "original_max_position_embeddings": 512,
        "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 512, "attention_factor": 1.3},
    },
    "qwen3_moe yarn of another scale": {
        "rope_parameters": {**YARN, "original_max_position_embeddings": 64, "attention_factor": 1.5}
    },
    "gemma2 linear rope": {"sliding_window": 16, "rope_parameters": LINEAR},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "smollm3": {"num_hidden_layers": 4},
    "olmo3": WINDOWS,
    "olmoe": {"num_key_value_heads": 4},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "granitemoe": {"attention_multiplier": 0.3},
    "starcoder2": {"sliding_window": None},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "seed_oss": {"attention_bias": True},
    "glm4": {"attention_bias": True},
    "cohere2": WINDOWS,
    # Written, and not read again.
    **{name: {} for name in ("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "mistral3", "gemma4")},
    **{name: {} for name in ("gemma4_text shared", "lfm2", "minimax_m2")},
    "gemma3": {"text_config": {**zoo.SHAPES["gemma3"]["text_config"], **WINDOWS, "num_hidden_layers": 6}},
    "glm4_moe": {"n_group": 1, "topk_group": 1},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention", "full_attention"]},
    "ministral3": {
        "rope_parameters": {
            **YARN,
            "original_max_position_embeddings": 16,
            "truncate": True,
            "llama_4_scaling_beta": 0.1,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        }
    },
    # llama.cpp rounds where the ramp begins and ends, as `truncate` says.
    "gpt_oss": {
        "max_position_embeddings": 4096,
        "rope_parameters": {**YARN, "original_max_position_embeddings": 128, "truncate": True},
    },
}
IDS = np.random.default_rng(0).integers(3, 250, 60)


def transformers_logits(folder: Path) -> np.ndarray:
    import torch

    model = runners.text_part(conformance.reference(folder))
    with torch.no_grad():
        return model(torch.from_numpy(IDS)[None]).logits[0].numpy()


def mlx_logits(folder: Path) -> np.ndarray:
    model, _ = open_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(IDS)[None]))[0]


def exported(folder: Path, out: Path, kind: str = "f32") -> GgufPlan:
    model = MergedModel(Request(folder, None, out))
    plan = gguf.plan_of(model, kind)
    plan.write(gguf.merged_tensors(model.to_read(mx.float32)), out)
    return plan


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_and_our_import_have_the_originals_logits(name: str, tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "hf", name if name in zoo.SHAPES else name.split()[0], **SHAPES[name])
    expected = transformers_logits(folder)
    plan = exported(folder, tmp_path / "model.gguf")
    # llama.cpp looks GELU up in a float16 table, in Gemma 4 for its per-layer inputs as well.
    limit = (1e-3 if plan.family.gguf == "gemma4" else 3e-4) if plan.family.tabled_gelu else 2e-6
    if name == "gemma4_text shared":
        limit *= 2  # of small logits
    with llama_cpp.runner(tmp_path / "model.gguf") as run:
        theirs = run.logits(IDS)
    assert np.abs(theirs - expected).max() < limit * max(1, np.abs(expected).max())
    if plan.family.written_only:
        with pytest.raises(UserError, match="cannot be converted yet"):
            model_read.open_gguf(tmp_path / "model.gguf")
        return
    (tmp_path / "mlx").mkdir()
    opened = model_read.open_gguf(tmp_path / "model.gguf")
    model_read.convert(opened, tmp_path / "mlx")
    direct, ours = (mlx_logits(path) for path in (folder, tmp_path / "mlx"))
    assert np.abs(ours - direct).max() < 2e-6 * max(1, np.abs(direct).max())


@pytest.mark.parametrize("name", ["qwen3_5_moe", "gemma4", "glm4_moe"])
def test_an_adapter_on_a_written_family_does_in_llama_cpp_what_it_does_here(name: str, tmp_path: Path) -> None:
    """Its factors move with the rows and columns of the base."""
    folder = tiny.make_model(tmp_path / "hf", name, **SHAPES[name])
    exported(folder, tmp_path / "base.gguf")
    model = load(str(folder), "float32").model
    before = np.array(model(mx.array(IDS)[None]))[0]
    spec = AdapterPlan.of(model, LoraSection(rank=2, alpha=4))
    attach.attach(model, spec, seed=1)
    conformance.train(model)
    (tmp_path / "run").mkdir()
    adapter_files.save_config(tmp_path / "run", spec)
    adapter_files.save_tensors(model, tmp_path / "run", spec.file)
    ship(Request(folder, tmp_path / "run", tmp_path / "adapter.gguf"), GgufAdapter())
    ours = np.array(model(mx.array(IDS)[None]))[0]
    with llama_cpp.runner(tmp_path / "base.gguf", tmp_path / "adapter.gguf") as run:
        theirs = run.logits(IDS)
    # Far below what one adapted layer does; a GELU of Gemma's is looked up in a table.
    assert np.abs(ours - theirs).max() < np.abs(ours - before).max() / (100 if name == "gemma4" else 20_000)


@pytest.mark.parametrize("width", [16, 32])
def test_the_columns_of_codes_move_with_their_groups_or_become_numbers(width: int) -> None:
    """width: of the heads that change places; groups are of 32."""
    weight, scales, biases = mx.quantize(mx.random.normal((8, 128)), 32, 4)
    codes = quant_blocks.Codes(np.array(weight), np.array(scales), np.array(biases), 4)
    order = np.arange(128).reshape(2, 64 // width, width).swapaxes(0, 1).reshape(-1)
    moved = tensor_types.columns_moved(codes, order)
    assert isinstance(moved, quant_blocks.Codes) == (width == 32)
    dense = quant_blocks.dequantize(moved) if isinstance(moved, quant_blocks.Codes) else moved
    np.testing.assert_array_equal(dense, quant_blocks.dequantize(codes)[:, order])


def test_a_pattern_of_layers_that_llama_cpp_cannot_have_is_refused() -> None:
    config = {**zoo.SHAPES["qwen3_5_text"], "hidden_size": 64, "num_attention_heads": 4, "full_attention_interval": 2}
    family = gguf_families.by_model_type("qwen3_5_text")
    assert metadata.metadata(family, config)["qwen35.full_attention_interval"].value == 2
    with pytest.raises(UserError, match="in every 2th layer alone"):
        metadata.metadata(family, {**config, "layer_types": ["full_attention", "linear_attention"]})


# (model_type, GGUF name, MLX name) that gguf's own map does not give, by reason.
TIED = "its embedding is its head: the architecture has no tensor for one, and no model of the family either"
UNGIVEN = {
    **{(name, "output", "lm_head"): TIED for name in ("gemma", "gemma2", "cohere", "cohere2")},
    ("lfm2", "output_norm", "model.norm"): "its last norm is embedding_norm, which the table has beside the usual name",
}
# How llama.cpp's converter, and mlx-lm, name what the map knows under another name.
RESPELLED = (
    ("block_sparse_moe.switch_mlp.gate_proj", "block_sparse_moe.experts.w1"),
    ("block_sparse_moe.switch_mlp.down_proj", "block_sparse_moe.experts.w2"),
    ("block_sparse_moe.switch_mlp.up_proj", "block_sparse_moe.experts.w3"),
    ("switch_mlp", "experts"),
    ("e_score_correction_bias", "e_score_correction.bias"),
    ("dt_bias", "dt_proj.bias"),
)


@pytest.mark.parametrize(
    "said, kind, read",
    [
        ({"scaling.type": "linear"}, "linear", {"factor": 1.0}),
        ({"scaling.type": "yarn", "scaling.attn_factor": 1.5}, "yarn", {"factor": 1.0, "attention_factor": 1.5}),
        ({"scaling.factor": 4.0}, "linear", {"factor": 4.0}),  # before there were types
        ({"scale_linear": 2.0}, "linear", {"factor": 2.0}),  # before that
        ({"scaling.factor": 1.0}, "", {}),
        ({"scaling.type": "none", "scaling.factor": 4.0}, "", {}),
    ],
)
def test_rope_scaling_that_a_file_says_in_part_is_what_llama_cpp_makes_of_it(
    said: dict[str, Any], kind: str, read: dict[str, float], tmp_path: Path
) -> None:
    """llama-model.cpp: linear where no type is said, a factor of 1 where none is, `scale_linear` its older name."""
    fields = {f"llama.rope.{key}": container.Field.of(value) for key, value in said.items()}
    file = container.File(tmp_path / "model.gguf", fields, {}, 0)
    found = metadata._read_scaling(gguf_families.by_model_type("llama"), file, {"head_dim": 8, "rope_theta": 1e4})
    assert found == ({"rope_type": kind, "type": kind, **read} if kind else None)


def test_every_family_that_a_gguf_is_written_for_is_compared_with_llama_cpp() -> None:
    compared = {name.split()[0] for name in SHAPES}
    for family in gguf_families.FAMILIES:
        name = family.model_type.removesuffix("_text")  # of a vision model its text part
        if name != "gemma4_unified":  # is gemma4 in llama.cpp and by its table
            assert compared & {family.model_type, name}, f"{family.model_type} needs a line in SHAPES"


def test_the_names_are_those_of_llama_cpps_own_table() -> None:
    """gguf, llama.cpp's own Python package, maps names in one direction; a map holds those of one architecture."""
    architectures = {name: number for number, name in gguf_names.MODEL_ARCH_NAMES.items()}
    ungiven, asked = set(), 0
    for family in gguf_families.FAMILIES:
        given_names = gguf_names.get_tensor_name_map(architectures[family.gguf], 2)
        block = {**family.names, **family.parameters}
        in_block = {f"blk.1.{stem}": f"model.layers.1.{name}" for stem, name in block.items()}
        for name, mlx_name in {**in_block, **family.outer}.items():
            respelled = mlx_name
            for spelled, other in RESPELLED:
                respelled = respelled.replace(spelled, other)
            given = given_names.get_name(respelled, (".weight", ".bias"))
            asked += 1
            if given is None:
                ungiven.add((family.model_type, name, mlx_name))
            else:  # a parameter without a layer of its own, such as layer_scalar, gets .weight in a GGUF
                assert given in (name, name.removesuffix(".weight")), (family.model_type, mlx_name)
    assert ungiven == set(UNGIVEN)
    assert asked > 500
