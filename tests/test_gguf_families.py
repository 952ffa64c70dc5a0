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
    # llama.cpp rounds where the ramp begins and ends, as `truncate` says.
    "gpt_oss": {
        "max_position_embeddings": 4096,
        "rope_parameters": {**YARN, "original_max_position_embeddings": 128, "truncate": True},
    },
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
    folder = tiny.make_model(tmp_path / "hf", name.split()[0], **SHAPES[name])
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
