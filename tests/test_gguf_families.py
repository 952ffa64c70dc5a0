"""Every family as GGUF: llama.cpp on our file has the logits of transformers on the original, and so has our import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlxtune_convert import gguf_model

from mlxtune.model.load import open_model
from mlxtune.ship import gguf, llama_cpp
from mlxtune.ship.merge import open_merged

KV = {"num_key_value_heads": 2}
HEADS = {**KV, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
TIED = {"tie_word_embeddings": True}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192}}),
    "llama linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", {**HEADS, "sliding_window": None}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", {**KV, **EXPERTS, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 yarn": (
        "qwen3",
        {"rope_parameters": {**YARN, "original_max_position_embeddings": 64}},
    ),
    "qwen3_moe": ("qwen3_moe", {}),
    "gemma": ("gemma", {**KV, "head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"sliding_window": 16}),
    "gemma3_text": (
        "gemma3_text",
        {
            **HEADS,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
            "num_hidden_layers": 6,
            "sliding_window": 16,
        },
    ),
    "phi3": ("phi3", {**KV, "sliding_window": None}),
    "phi3 longrope": (
        "phi3",
        {
            **KV,
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 512,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
                "long_factor": [2.0] * 8,
            },
        },
    ),
    "phi": ("phi", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "smollm3": ("smollm3", {**KV, "num_hidden_layers": 4}),
    "olmo2": ("olmo2", KV),
    "olmo3": ("olmo3", {**KV, "num_hidden_layers": 4, "sliding_window": 16}),
    "olmoe": ("olmoe", EXPERTS),
    "granite": ("granite", {"attention_multiplier": 0.3, "residual_multiplier": 0.5}),
    "granitemoe": (
        "granitemoe",
        {**KV, "num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    ),
    "starcoder2": ("starcoder2", {**KV, "sliding_window": None}),
    "stablelm": ("stablelm", {**KV, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "nemotron": ("nemotron", KV),
    "ernie4_5": ("ernie4_5", HEADS),
    "seed_oss": ("seed_oss", {**HEADS, "attention_bias": True}),
    "glm4": ("glm4", {**HEADS, "partial_rotary_factor": 0.5, "attention_bias": True}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", HEADS),
    "cohere": ("cohere", {**KV, "tie_word_embeddings": True}),
    "cohere2": ("cohere2", {**KV, "num_hidden_layers": 4, "sliding_window": 16, "tie_word_embeddings": True}),
}
IDS = np.random.default_rng(0).integers(3, 250, 60)


def transformers_logits(folder: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(IDS)[None]).logits[0].numpy()


def mlx_logits(folder: Path) -> np.ndarray:
    model, _ = open_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(IDS)[None]))[0]


def exported(folder: Path, out: Path, kind: str = "f32") -> gguf.Plan:
    merged = open_merged(folder, None, mx.float32)
    plan = gguf.Plan.of(merged, kind, folder, "tiny")
    plan.write(merged, out)
    return plan


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_and_our_import_have_the_originals_logits(name: str, tmp_path: Path) -> None:
    kind, shape = SHAPES[name]
    folder = tiny.make_model(tmp_path / "hf", kind, **shape)
    expected = transformers_logits(folder)
    plan = exported(folder, tmp_path / "model.gguf")
    # llama.cpp looks GELU up in a float16 table.
    limit = 3e-4 if plan.family.tabled_gelu else 2e-6
    with llama_cpp.runner(tmp_path / "model.gguf") as run:
        theirs = run.logits(IDS)
    assert np.abs(theirs - expected).max() < limit * max(1, np.abs(expected).max())
    (tmp_path / "mlx").mkdir()
    opened = gguf_model.open_gguf(tmp_path / "model.gguf")
    gguf_model.convert(opened, tmp_path / "mlx")
    direct, ours = (mlx_logits(path) for path in (folder, tmp_path / "mlx"))
    assert np.abs(ours - direct).max() < 2e-6 * max(1, np.abs(direct).max())


def test_gpt_oss_with_sinks_and_biased_experts_has_transformers_logits(tmp_path: Path) -> None:
    """mlx-lm does not load what transformers saves for it, so its own model gets transformers' numbers by hand."""
    import torch
    from mlx_lm.models import gpt_oss
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    rope = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
    config = GptOssConfig(
        **{**HEADS, "vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
        num_attention_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        rope_parameters={**rope, "truncate": True, "original_max_position_embeddings": 128},
        max_position_embeddings=4096,
    )
    model = GptOssForCausalLM(config)
    tensors: dict[str, Any] = {}
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(0.1 * torch.randn_like(value) + ("norm" in name))
            array = value.numpy()
            if name.endswith(("gate_up_proj", "gate_up_proj_bias")):
                bias = name.endswith("bias")
                stem = name.removesuffix("_bias").removesuffix("gate_up_proj")
                for part, at in (("gate", 0), ("up", 1)):
                    half = array[..., at::2]
                    half = half if bias else half.swapaxes(1, 2)
                    tensors[f"{stem}{part}_proj.{'bias' if bias else 'weight'}"] = half
            elif name.endswith("experts.down_proj"):
                tensors[f"{name}.weight"] = array.swapaxes(1, 2)
            else:
                tensors[name.replace("down_proj_bias", "down_proj.bias")] = array
        expected = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    folder = tmp_path / "mlx"
    tiny.make_tokenizer(folder)
    config.save_pretrained(folder)
    mx.save_safetensors(str(folder / "model.safetensors"), {name: mx.array(value) for name, value in tensors.items()})
    assert isinstance(open_model(folder)[0], gpt_oss.Model)
    exported(folder, tmp_path / "model.gguf")
    with llama_cpp.runner(tmp_path / "model.gguf") as run:
        assert np.abs(run.logits(IDS) - expected).max() < 1e-5 * np.abs(expected).max()
    (tmp_path / "again").mkdir()
    gguf_model.convert(gguf_model.open_gguf(tmp_path / "model.gguf"), tmp_path / "again")
    assert np.abs(mlx_logits(tmp_path / "again") - mlx_logits(folder)).max() < 1e-4
