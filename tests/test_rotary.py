"""Rotary embeddings: our formulas against transformers' modules, and whole models against transformers' logits."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import conformance
import mlx.core as mx
import numpy as np
import pytest
import tiny
import zoo

from mlxtune.model.corrections import corrected, rotary
from mlxtune.model.corrections.families import family_of
from mlxtune.model.corrections.reference import described
from mlxtune.model.load import load

BASE = {"rope_theta": 12345.0, "rope_type": "default"}
KNOWN = {"original_max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "factor": 4.0, **KNOWN}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **KNOWN}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, **KNOWN}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn's attention factor": {**YARN, "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2},
    "yarn's mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
    "yarn not truncated": {**YARN, "truncate": False},
    "yarn of the whole context": {"rope_type": "yarn", "factor": 4.0},
    "llama3": LLAMA3,
    "longrope": LONGROPE,
    "alpha": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
}
LENGTHS = (24, 300, 600)  # within every context, beyond the original one, beyond max_position_embeddings
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
ONLY = {  # settings that a family alone has, or the only ones it has
    "hunyuan_v1_dense": {"alpha"},
    "gemma4_text": {"default", "proportional", "linear"},
}
HEADS = {"mixtral": {"head_dim": 16}}  # which transformers cannot do without where it scales
FAMILIES = sorted(family for family in zoo.SHAPES if family_of(family).rotary_compared)


def of_family(family: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Changes of a family's shape that give all of its layers that rotate over all positions a rotary setting."""
    from transformers import AutoConfig

    shape = {**SIZES, **zoo.SHAPES[family]}
    plain = AutoConfig.for_model(family, **shape)
    own = plain.rope_parameters
    values = {**BASE, **setting}
    sets = plain.nested_rope_parameter_keys(own)
    if setting.get("rope_type") == "longrope":
        width = getattr(plain, "head_dim", None) or plain.hidden_size // plain.num_attention_heads
        pairs = int(width * (own.get("partial_rotary_factor") or 1)) // 2
        values |= {"short_factor": [1 + 0.02 * i for i in range(pairs)], "short_mscale": 1.1}
        values |= {"long_factor": [1 + 4.0 * i for i in range(pairs)], "long_mscale": 1.3}
    if sets:
        return {"rope_parameters": {**dict.fromkeys(sets, BASE), "full_attention": values}}
    kept = ("partial_rotary_factor", "llama_4_scaling_beta", "original_max_position_embeddings")
    changes: dict[str, Any] = HEADS.get(family, {}) | {
        "rope_parameters": {**{key: own[key] for key in kept if own.get(key) is not None}, **values}
    }
    if hasattr(plain, "original_max_position_embeddings") and setting.get("rope_type") == "longrope":
        changes["original_max_position_embeddings"] = KNOWN["original_max_position_embeddings"]
    return changes


def settings_of(family: str) -> list[str]:
    """The settings that transformers has for a family."""
    special = ONLY.get(family, set())
    if family == "gemma4_text":
        return sorted(special)
    if family in ("phi3", "phimoe"):
        return ["default", "longrope"]
    return [name for name in SETTINGS if name in special or name not in ("alpha", "proportional")]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_gives_the_angles_of_transformers(family: str) -> None:
    """Cosines at the last position of rows of three lengths, from transformers' module of the family."""
    import torch
    from transformers import AutoConfig

    for name in settings_of(family):
        changes = of_family(family, SETTINGS[name])
        config = AutoConfig.for_model(family, **{**SIZES, **zoo.SHAPES[family], **changes})
        module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
        own = [
            value
            for key, value in vars(module).items()
            if key.endswith("RotaryEmbedding") and "Vision" not in key and value.__module__ == module.__name__
        ]
        theirs = own[0](config)
        sets = config.nested_rope_parameter_keys(config.rope_parameters)
        for layer in range(2):
            ours = rotary.rotation(config, layer)
            if ours is None:  # a layer that does not rotate
                assert family in ("smollm3", "llama4_text", "cohere2", "exaone4", "lfm2", "lfm2_moe", "qwen3_next")
                continue
            for tokens in LENGTHS:
                frequencies, scale = ours.of_length(tokens)
                angles = np.float32(tokens - 1) * frequencies
                place = torch.arange(tokens)[None]
                found = theirs(torch.zeros(1, 1), place, *([config.layer_types[layer]] if sets else []))
                last = torch.view_as_real(found)[0, -1, :, 0] if torch.is_tensor(found) else found[0][0, -1]
                wanted = np.sort(last.numpy())
                cosines = np.tile(np.cos(angles) * scale, len(wanted) // len(angles))
                assert np.abs(np.sort(cosines) - wanted).max() < 5e-5, (name, layer, tokens)


# What mlx-lm alone computes otherwise, or refuses, and what it computes alike (identity).
MODELS = [
    ("llama", "yarn's attention factor"),
    ("llama", "dynamic"),
    ("qwen3", "yarn not truncated"),
    ("qwen3_moe", "yarn"),
    ("gemma2", "linear"),
    ("stablelm", "llama3"),
    ("starcoder2", "yarn of the whole context"),
    ("helium", "linear"),
    ("ernie4_5", "dynamic"),
    ("glm", "default"),
    ("glm4", "yarn"),
    ("phi3", "longrope"),
    ("phimoe", "longrope"),
    ("nemotron", "yarn"),
    ("qwen2_moe", "llama3"),
    ("mixtral", "linear"),
    ("deepseek_v2", "default"),
    ("deepseek_v3", "yarn's mscale"),
    ("gpt_oss", "dynamic"),
    ("gemma3_text", "yarn"),
    ("hunyuan_v1_dense", "alpha"),
    ("hunyuan_v1_dense", "linear"),
    ("cohere2", "yarn"),
    ("gpt_neox", "linear"),
    ("smollm3", "longrope"),
]
ALIKE = {
    ("llama", "dynamic"),
    ("deepseek_v2", "default"),
    ("gemma3_text", "yarn"),
    ("hunyuan_v1_dense", "alpha"),
    ("deepseek_v3", "yarn's mscale"),
}
ROWS = [conformance.IDS[:1], np.random.default_rng(1).integers(3, 250, (1, 300))]


@pytest.mark.parametrize(("family", "setting"), MODELS)
def test_a_model_with_the_setting_computes_transformers_logits(family: str, setting: str, tmp_path: Path) -> None:
    """Rows of 24 tokens and of 300, beyond the original context of 128. Where mlx-lm agrees, its module stays."""
    changes = of_family(family, SETTINGS[setting])
    folder = tiny.make_model(tmp_path / "model", family, **changes)
    loaded = load(str(folder), "float32")
    reference = conformance.reference(folder)
    for ids in ROWS:
        ours = np.array(loaded.model(mx.array(ids)))
        assert conformance.apart(ours, _logits(reference, ids)) < 5e-5
    assert corrected.rotates_anew(loaded.model) != ((family, setting) in ALIKE)


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        (family, setting)
        for family in ("llama", "gemma3_text", "gemma4_text", "olmo3", "phi3", "qwen3_moe")
        for setting in ("linear", "yarn", "longrope", "proportional")
        if setting in settings_of(family)
    ],
)
def test_a_normalised_config_means_the_same_to_transformers(family: str, setting: str) -> None:
    """What convert writes is read again by transformers, for the tokenizer and whoever loads the folder there."""
    from mlxtune_convert.hf.configs import normalise
    from transformers import AutoConfig

    from mlxtune.model.corrections.reference import completed

    config = AutoConfig.for_model(family, **{**SIZES, **zoo.SHAPES[family], **of_family(family, SETTINGS[setting])})
    original = json.loads(config.to_json_string(use_diff=False))
    written = json.loads(json.dumps(normalise(completed(original))))
    again = AutoConfig.for_model(**written)
    assert _pruned(again.rope_parameters) == _pruned(config.rope_parameters)
    assert _pruned(described(written).rope_parameters) == _pruned(config.rope_parameters)
    assert normalise(completed(written)) == written


def _pruned(sets: dict[str, Any]) -> dict[str, Any]:
    """Without `type`, the older name of rope_type, at either depth."""
    return {
        key: _pruned(value) if isinstance(value, dict) else value
        for key, value in sets.items()
        if key != "type" and value is not None
    }


def _logits(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        found: np.ndarray = model(torch.from_numpy(ids)).logits.numpy()
    return found
