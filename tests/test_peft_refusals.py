"""Adapters of PEFT that hold nothing, or something else than LoRA on weights: refused when they come in."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from mlxtune_convert.peft import adapter_folder as files
from safetensors.numpy import save_file

from mlxtune.adapter import peft
from mlxtune.errors import UserError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
EMBEDDING = "base_model.model.model.embed_tokens"
A, B = np.ones((2, 64), np.float32), np.ones((64, 2), np.float32)
PLAIN = {f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": B}
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "bias": "none"}


def adapter(folder: Path, tensors: dict[str, np.ndarray] = PLAIN, **settings: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({**SETTINGS, **settings}))
    return folder


def refusal(folder: Path, model: Path | None = None) -> str:
    """What an import says; it leaves nothing."""
    with pytest.raises(UserError) as refused:
        peft.import_adapter(folder, folder.with_name("ours"), str(model) if model else None, False)
    assert not folder.with_name("ours").exists()
    return f"{refused.value}"


OTHER_SETTINGS: dict[str, tuple[Any, str]] = {
    "peft_type": ("IA3", "merge_and_unload"),
    "peft_type=": ("PREFIX_TUNING", "virtual tokens"),
    "task_type": ("SEQ_CLS", "another head"),
    "bias": ("lora_only", "merge_and_unload"),
    "init_lora_weights": ("pissa_niter_16", "path_initial_model_for_weight_conversion"),
    "init_lora_weights=": ("loftq", "changed base"),
    "use_qalora": (True, "groups of a GPTQ layer's inputs"),
    "layer_replication": ([[0, 1], [0, 2]], "more than once"),
    "lora_bias": (True, "has no bias"),
    "alora_invocation_tokens": ([5, 6], "PEFT alone"),
    "arrow_config": ({"top_k": 2}, "for each token"),
    "kasa_config": ({"beta": 1}, "may change what the adapter computes"),
    "use_bdlora": ({"nblocks": 2}, "may change"),
    "some_key_of_next_year": ("on", "may change"),
    "trainable_token_indices": ([3], "has no rows"),
}


@pytest.mark.parametrize("key", OTHER_SETTINGS)
def test_a_setting_that_makes_it_another_function_is_refused_by_name(key: str, tmp_path: Path) -> None:
    value, hint = OTHER_SETTINGS[key]
    name = key.removesuffix("=")
    said = refusal(adapter(tmp_path / "peft", **{name: value}))
    assert name in said and hint in said


NO_EFFECT: dict[str, Any] = {
    "exclude_modules": ["lm_head"],
    "fan_in_fan_out": True,
    "target_modules": r".*\.q_proj",
    "init_lora_weights": "orthogonal",
    "corda_config": {"corda_method": "kpm"},
    "loftq_config": {"loftq_bits": 4},
    "velora_config": {"scale": 1.0},
    "qalora_group_size": 32,
    "use_qalora": False,
    "layers_pattern": "layers",
    "auto_mapping": {"unsloth_fixed": True},
    "task_type": None,
    "peft_version": "0.99",
}


def test_settings_that_only_say_how_it_was_made_change_nothing(tmp_path: Path) -> None:
    wanted = files.read_adapter(adapter(tmp_path / "plain")).updates
    for key, value in NO_EFFECT.items():
        found = files.read_adapter(adapter(tmp_path / key, **{key: value})).updates
        assert found.keys() == wanted.keys()
        for target, update in found.items():
            assert update.scale == 2.0 and update.a.tobytes() == wanted[target].a.tobytes()


NOTHING = np.zeros(0, np.float32)
TENSORS: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "no tensors": ({}, {}, "holds no tensors"),
    "empty factors": (dict.fromkeys(PLAIN, NOTHING), {}, f"{LAYER}.lora_A.weight holds no numbers"),
    "an empty head": (
        {**PLAIN, "base_model.model.lm_head.weight": NOTHING},
        {"modules_to_save": ["lm_head"]},
        "lm_head.weight holds no numbers",
    ),
    "a flat shard": ({name: array.reshape(-1) for name, array in PLAIN.items()}, {}, "have one axis"),
    "half a pair": ({f"{LAYER}.lora_A.weight": A}, {}, "lacks lora_A or lora_B"),
    "half an embedding's": ({f"{EMBEDDING}.lora_embedding_A": A}, {}, "lacks lora_embedding_A or lora_embedding_B"),
    "another rank": (PLAIN, {"r": 4}, "has rank 2, adapter_config.json says 4"),
    "factors apart": ({**PLAIN, f"{LAYER}.lora_B.weight": B[:, :1]}, {}, "do not fit each other"),
    "a convolution": ({name: array[..., None] for name, array in PLAIN.items()}, {}, "is no linear layer"),
    "a bias": ({**PLAIN, f"{LAYER}.lora_B.bias": B[:, 0]}, {}, "lora_B.bias is not understood"),
    "two adapters": (
        {f"{LAYER}.lora_{part}.{name}.weight": A if part == "A" else B for part in "AB" for name in ("one", "two")},
        {},
        "holds 2 adapters: one, two",
    ),
    "one layer twice": ({**PLAIN, f"{LAYER.removeprefix('base_model.model.')}.lora_A.weight": A}, {}, "two names"),
    "a copy alone": ({"base_model.model.lm_head.base_layer.weight": A}, {}, "adapts no layer"),
    "untied in spite of the setting": (
        {**PLAIN, f"{EMBEDDING}.weight": A, "base_model.model.lm_head.weight": A + 1},
        {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens", "lm_head"]},
        "says that they are one matrix",
    ),
    "rows of an unknown embedding": (
        {**PLAIN, f"{EMBEDDING}.token_adapter.trainable_tokens_delta": A},
        {"trainable_token_indices": [3, 4]},
        "--base DIR",
    ),
    "a vision model's names": (
        {name.replace("model.layers", "model.language_model.layers"): array for name, array in PLAIN.items()},
        {},
        "--base DIR",
    ),
    "a tower alone": (
        {name.replace("model.layers", "model.vision_tower.layers"): array for name, array in PLAIN.items()},
        {},
        "nothing of the language model",
    ),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_what_holds_no_adapter_is_refused_without_a_model_at_hand(kind: str, tmp_path: Path) -> None:
    tensors, settings, said = TENSORS[kind]
    assert said in refusal(adapter(tmp_path / "peft", tensors, **settings))


def test_the_command_says_who_writes_an_adapter_without_numbers(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "peft", {})
    expected = ("it holds no tensors", "DeepSpeed ZeRO-3", "stage3_gather_16bit_weights_on_model_save")
    tiny.refused(tmp_path / "ours", "convert", folder, tmp_path / "ours", expected=expected)


def test_folders_without_the_tensors_say_where_they_may_be(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "peft")
    (folder / WEIGHTS).unlink()
    assert peft.is_adapter(folder) and "Copy or download" in refusal(folder)
    (folder / "adapter_model.bin").write_bytes(b"pickled")
    assert "never loaded" in refusal(folder)
    several = tmp_path / "several"
    several.mkdir()
    for name in ("checkpoint-10", "default"):
        adapter(several / name)
    with pytest.raises(UserError, match="holds PEFT adapters in its folders") as refused:
        peft.refuse_several(several)
    assert f"convert {several}" in str(refused.value.hint)
    tiny.refused(tmp_path / "ours", "convert", several, tmp_path / "ours", expected=("checkpoint-10",))


def test_an_adapter_beside_a_model_is_left_out_and_said(hf_model: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_model, tmp_path / "both")
    save_file(PLAIN, tmp_path / "both" / WEIGHTS)
    said = tiny.done("convert", tmp_path / "both", tmp_path / "mlx", "--bits", "16").stderr
    assert "the adapter beside the model is left out" in said


def test_an_adapter_for_something_else_says_that_the_names_may_differ(hf_model: Path, tmp_path: Path) -> None:
    """Without a model GPT-2's names go through; with one, and in use, they are refused with what helps."""
    other = {name.replace("model.layers.0", "transformer.h.0"): array for name, array in PLAIN.items()}
    folder = adapter(tmp_path / "peft", other)
    assert peft.import_adapter(folder, tmp_path / "alone", None, False).notes == ()
    expected = ("does not fit this model", "convert it again with --base MODEL")
    command = ("generate", "--model", hf_model, "--adapter", tmp_path / "alone", "--prompt", "Hi")
    tiny.refused(tmp_path / "none", *command, expected=expected)
    assert "the model has no layer transformer.h.0" in refusal(folder, hf_model)


def test_values_of_any_kind_are_one_clear_refusal_or_an_adapter(hf_model: Path, tmp_path: Path) -> None:
    """500 mutated configurations, seeded."""
    wild = [
        None,
        True,
        -1,
        0,
        3,
        1e400,
        2.5,
        "",
        "x",
        "[",
        [],
        [1],
        ["a"],
        {},
        {"(": 2},
        {"a": "b"},
        {"q_proj": 2},
        [[]],
    ]
    keys = [*SETTINGS, "rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters", "lora_dropout"]
    keys += [
        "trainable_token_indices",
        "base_model_name_or_path",
        "use_rslora",
        "target_modules",
        "ensure_weight_tying",
    ]
    folder = adapter(tmp_path / "peft")
    draw = random.Random(3)
    outcomes = {"refused": 0, "read": 0}
    for _ in range(500):
        changes = {key: draw.choice(wild) for key in draw.sample(keys, draw.choice([1, 2]))}
        (folder / CONFIG).write_text(json.dumps({**SETTINGS, **changes}))
        try:
            files.read_adapter(folder)
            outcomes["read"] += 1
        except UserError as error:
            outcomes["refused"] += 1
            assert "\n" not in error.message
    assert min(outcomes.values()) > 50
