"""What mlx-lm makes of a config.json against what transformers makes of it: missing keys, windows, activations."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import conformance
import mlx.core as mx
import numpy as np
import pytest
import sweep
import tiny
import zoo
from mlx.utils import tree_flatten
from mlxtune_convert.families import table
from mlxtune_convert.hf import families as layouts
from mlxtune_convert.hf.configs import normalise
from safetensors.numpy import load_file, save_file
from test_rotary import SIZES
from training import tune

from mlxtune.config import resolve as configuration
from mlxtune.errors import UserError
from mlxtune.model.convert import Quantization, convert
from mlxtune.model.corrections import corrected
from mlxtune.model.corrections.reference import completed, described
from mlxtune.model.load import load, open_model
from mlxtune.train import preparation
from mlxtune.train.run_data import read_data

# Types of which mlx-lm reads other configurations than transformers writes.
UNREAD = ("dbrx", "kimi_linear", "longcat_flash", "mimo_v2_flash", "minimax", "ministral", "solar_open")
WHOLE = ("llama4_text", "gemma3n_text", "qwen3_5_moe_text")  # go to mlx-lm as a text part that it keeps as a dict
FAMILIES = sorted(
    family
    for family in zoo.SHAPES
    if "vision_config" not in zoo.SHAPES[family] and family not in (*UNREAD, *WHOLE) and " " not in family
)
# Of mlx-lm's arguments that have another meaning than the setting of the same name in transformers.
OTHER_MEANING = {
    "head_dim": ("gemma4_text",),  # of its windowed layers
    "layer_types": FAMILIES,  # checked by logits
    "rope_parameters": FAMILIES,
    "rope_scaling": FAMILIES,
    "sliding_window_pattern": ("exaone4",),
}
NEEDED = {"lfm2_moe": {"layer_types": ["conv", "full_attention"] * 4}}  # no default


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What mlx-lm's own class of a model's arguments reads of a configuration, its text part where it has one."""
    import importlib

    from mlx_lm.utils import _get_classes

    made = normalise(completed(config))
    model, kind = _get_classes(made)
    if "text_config" in made:
        kind = getattr(importlib.import_module(model.__module__), "TextModelArgs", None) or kind
        made = made["text_config"] if kind.__name__ == "TextModelArgs" else made
    read = kind.from_dict(corrected.readable(made))
    return {field.name: getattr(read, field.name) for field in fields(read)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_missing_key_has_transformers_default(family: str) -> None:
    """All of a config.json is missing but its type: each argument of mlx-lm is the default of transformers' class."""
    config = {"model_type": family, "num_hidden_layers": 8, **NEEDED.get(family, {})}
    theirs = described(config)
    assert theirs is not None
    values = {**theirs.to_dict(), **(theirs.rope_parameters or {} if hasattr(theirs, "rope_parameters") else {})}
    compared = 0
    for name, value in arguments(config).items():
        if name in values and family not in OTHER_MEANING.get(name, ()):
            if values[name] is not None:
                assert value == values[name], name
            compared += 1
    assert compared > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_may_be_missing_means_the_same_when_it_is(family: str) -> None:
    """Each key in turn is left out; where transformers then has the same configuration, mlx-lm's arguments stay."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **{**SIZES, **zoo.SHAPES[family]})
    full = json.loads(config.to_json_string(use_diff=False))
    wanted, known = arguments(full), described(full).to_dict()
    tried = 0
    for key in sorted(set(full) - {"model_type"}):
        fewer = {name: value for name, value in full.items() if name != key}
        theirs = described(fewer)
        if theirs is not None and theirs.to_dict() == known:
            assert arguments(fewer) == wanted, key
            tried += 1
    assert tried > 5


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "granite", "smollm3"])
def test_a_head_is_not_lost_where_no_key_says_that_it_is_tied(family: str, tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "model", family, tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    if family == "smollm3":  # tied by default: without the key, transformers too loads no head
        del config["rope_parameters"]
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    convert(str(folder), tmp_path / "mlx", Quantization.of(16, None, None))
    ours = conformance.mlx_logits(load(str(tmp_path / "mlx"), "float32").model)
    assert conformance.apart(ours, conformance.logits(conformance.reference(folder))) < 1e-5


@pytest.mark.parametrize("family", ["llama", "granite", "mistral3"])
def test_a_head_of_its_own_is_kept_though_the_configuration_calls_it_tied(family: str, tmp_path: Path) -> None:
    """As transformers does it, which looks into the files; and a copy of the embedding is no head of its own."""
    folder = tiny.make_model(tmp_path / "model", family, tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    parts = [config, *([config["text_config"]] if "text_config" in config else [])]
    for part in parts:
        part["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    convert(str(folder), tmp_path / "mlx", Quantization.of(16, None, None))
    wanted = conformance.logits(conformance.reference(folder))
    assert conformance.apart(conformance.mlx_logits(load(str(tmp_path / "mlx"), "float32").model), wanted) < 1e-5
    weights = load_file(folder / "model.safetensors")
    head = next(name for name in weights if name.endswith("lm_head.weight"))
    weights[head] = next(value for name, value in weights.items() if name.endswith("embed_tokens.weight")).copy()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert all(not name.endswith("lm_head.weight") for name in dict(tree_flatten(open_model(folder)[0].parameters())))


@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_configuration_says_whether_its_text_part_is_tied(tied: bool, tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "model", "mistral3", tie_word_embeddings=tied)
    ours = conformance.mlx_logits(load(str(folder), "float32").model)
    assert conformance.apart(ours, conformance.logits(conformance.reference(folder))) < 1e-5


WINDOW = {"sliding_window": 8}
QWEN = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
COMPUTED = [
    ("mistral", WINDOW),
    ("gemma2", WINDOW),
    ("ministral3", WINDOW),
    ("phi3", WINDOW),
    ("phimoe", WINDOW),
    ("qwen3_moe", QWEN),
    ("qwen2", QWEN),
    ("llama", {"hidden_act": "relu"}),
    ("gemma", {"hidden_act": "gelu_pytorch_tanh"}),
    ("starcoder2", {"hidden_act": "gelu_pytorch_tanh"}),
    ("gpt_neox", {"hidden_act": "gelu"}),
    ("glm4", {"hidden_act": "gelu"}),
    ("granitemoe", {"hidden_act": "relu"}),
    ("nemotron", {"hidden_act": "silu"}),
]


@pytest.mark.parametrize(("family", "changes"), COMPUTED)
def test_a_setting_that_mlx_lm_ignores_is_computed(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """And said, because mlx_lm itself runs such a folder as another model."""
    folder = tiny.make_model(tmp_path / "model", family, **changes)
    loaded = load(str(folder), "float32")
    wanted = conformance.logits(conformance.reference(folder))
    assert conformance.apart(conformance.mlx_logits(loaded.model), wanted) < 2e-5
    assert "to mlx_lm and the apps built on it" in "".join(corrected.notes(loaded.model, loaded.config))


def test_a_window_holds_while_an_answer_is_generated(tmp_path: Path) -> None:
    """Token by token through mlx-lm's cache, the logits are those of the row computed at once."""
    from mlx_lm.models.cache import make_prompt_cache

    model = load(str(tiny.make_model(tmp_path / "model", "mistral", **WINDOW)), "float32").model
    ids = mx.array(conformance.IDS[:1])
    cache = make_prompt_cache(model)
    parts = [model(ids[:, :11], cache=cache), *(model(ids[:, at : at + 1], cache=cache) for at in range(11, 24))]
    assert float(mx.abs(mx.concatenate(parts, axis=1) - model(ids)).max().item()) < 1e-5  # type: ignore[arg-type]


NAMED = [
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("phimoe", {"num_experts_per_tok": 1}),
    ("olmoe", {"clip_qkv": 0.05}),
    ("gpt_bigcode", {"multi_query": False}),
    ("gemma3_text", {"final_logit_softcapping": 0.5}),
    ("cohere2", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("deepseek_v3", {"num_experts_per_tok": 3}),
    ("llama", {"hidden_act": "quick_gelu"}),
    ("mamba2", {"n_groups": 2}),
]


@pytest.mark.parametrize(("family", "changes"), NAMED)
def test_what_is_not_computed_is_named(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """The logits do differ; convert, train and export say why."""
    folder = tiny.make_model(tmp_path / "model", family, **changes)
    loaded = load(str(folder), "float32")
    wanted = conformance.logits(conformance.reference(folder))
    assert conformance.apart(conformance.mlx_logits(loaded.model), wanted) > 1e-4
    note = corrected.notes(loaded.model, loaded.config)[0]
    assert note.startswith("this is not the model that transformers computes, and exports of it are refused: ")
    with pytest.raises(UserError, match="cannot be exported"):
        layouts.by_model_type(json.loads((folder / "config.json").read_text()))


REFUSED = [
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
    ("gemma3_text", {"layer_types": ["sliding_attention"] * 2}, "full_attention"),
    ("stablelm", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("mixtral", {"head_dim": 32}, "hidden_size / num_attention_heads"),
]


@pytest.mark.parametrize(("family", "changes", "why"), REFUSED)
def test_what_mlx_lm_cannot_hold_is_refused_with_the_reason(
    family: str, changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    """Not with advice to download the folder again."""
    folder = tiny.make_model(tmp_path / "model", family, **changes)
    with pytest.raises(UserError, match=why) as error:
        open_model(folder)
    assert "again" not in f"{error.value.message} {error.value.hint}"


def test_the_table_of_settings_names_families_and_settings_that_there_are() -> None:
    from transformers import CONFIG_MAPPING

    named = 0
    for name, family in table.FAMILIES.items():
        for key, computed in family.computes.items():
            assert computed
            assert hasattr(CONFIG_MAPPING[name](), key), (name, key)
            named += 1
    assert named > 50


def test_a_note_of_a_corrected_model_is_said_by_convert_and_at_the_start_of_training(
    data: Path, tmp_path: Path
) -> None:
    """By a run, and by the plan that --dry-run prints."""
    note = "mlx-lm lets this model see all of a row, transformers 8 tokens"
    folder = tiny.make_model(tmp_path / "model", "mistral", **WINDOW)
    assert note in "".join(convert(str(folder), tmp_path / "mlx", Quantization.of(16, None, None)).notes)
    events = tune(tmp_path / "mlx", data, tmp_path / "run", "train.steps=1", "train.accumulate=1")
    assert [event for event in events if event["kind"] == "note" and note in event["text"]]
    settings = {"model.path": str(tmp_path / "mlx"), "data.path": str(data)}
    read, resolved = read_data(configuration.load(None, (), settings))
    assert note in "".join(preparation.plan(resolved, read).notes)


def test_the_sweep_tells_silence_from_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What finds the differences, on one case of each kind."""
    same = sweep.outcome(tmp_path / "same", "llama", {"hidden_act": "relu"})
    named = sweep.outcome(tmp_path / "named", "olmoe", {"clip_qkv": 0.05})
    refused = sweep.outcome(tmp_path / "refused", "qwen3", {"attention_bias": True})
    monkeypatch.setattr(corrected.activations, "wanted", lambda config: None)
    silent = sweep.outcome(tmp_path / "silent", "llama", {"hidden_act": "relu"})
    assert [kind for kind, _ in (same, named, refused, silent)] == ["same", "named", "refused", "SILENT"]
    assert np.isfinite(float(silent[1]))
