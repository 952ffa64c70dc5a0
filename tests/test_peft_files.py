"""Adapters as people save them with PEFT: read to the same function as PEFT makes of them, or refused truly."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from test_peft import IDS, exported, hf, logits, same_files
from test_variants import adapted

from mlxtune.adapter import adapter_files, peft
from mlxtune.errors import UserError
from mlxtune.model import convert as conversion
from mlxtune.model.load import load

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
P = "base_model.model."
SEEN = int(IDS[0, 0])  # a token of the text
EMBED, BOTH, TIE = ["embed_tokens"], ["embed_tokens", "lm_head"], {"ensure_weight_tying": True}


@dataclass(frozen=True)
class Case:
    """An adapter that PEFT saves. model: which; settings: of its LoraConfig; rows: the size that its vocabulary is
    given first; embeddings: PEFT's save_embedding_layers."""

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    embeddings: Any = "auto"


def made(models: dict[str, Path], case: Case, out: Path) -> np.ndarray:
    """Save the adapter, every trained number moved by a seeded draw; return PEFT's logits."""
    import torch
    from peft import LoraConfig, get_peft_model

    base = hf(models[case.model])
    if case.rows:
        torch.manual_seed(2)
        base.resize_token_embeddings(case.rows, mean_resizing=False)
    torch.manual_seed(1)
    settings = copy.deepcopy(case.settings)  # PEFT changes lists that it is given
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj"], "init_lora_weights": False, **settings}
    theirs = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif "lora_" in name:
                tensor.mul_(0.2 if "embedding" in name else 3.0)
    theirs.save_pretrained(out, save_embedding_layers=case.embeddings)
    return logits(theirs)


def ours(model: Path, adapter: Path) -> np.ndarray:
    """Logits here with an imported adapter."""
    loaded = load(str(model), "float32")
    adapter_files.load_adapter(loaded.model, adapter, loaded.config)
    return np.array(loaded.model(mx.array(IDS)))


def changed(source: Path, out: Path, name: Callable[[str], str] = str, **settings: Any) -> Path:
    """A copy of an adapter with other tensor names or settings."""
    shutil.copytree(source, out)
    tensors = load_file(source / WEIGHTS)
    rewrite(out, {name(key): array for key, array in tensors.items()})
    config = json.loads((source / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps({**config, **settings}))
    return out


def rewrite(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file({name: np.array(array) for name, array in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    kinds = ("llama", "gpt_neox", "gemma3", "gemma3_text", "mixtral", "qwen3_moe", "qwen3_5_text", "gpt_oss")
    shapes = {kind: (kind, {}) for kind in kinds} | {
        "tied": ("llama", {"tie_word_embeddings": True}),
        "gpt2": ("gpt2", {"tie_word_embeddings": True}),
    }
    return {name: tiny.make_model(root / name, kind, **shape) for name, (kind, shape) in shapes.items()}


READ = {
    "one tied matrix": Case("tied", {"modules_to_save": EMBED, **TIE}),
    "one tied matrix, named twice": Case("tied", {"modules_to_save": BOTH, **TIE}),
    "tied matrices saved by themselves": Case("tied", embeddings=True),
    "matrices saved by themselves": Case("llama", embeddings=True),
    "token rows": Case("llama", {"trainable_token_indices": [SEEN, 6, 319]}),
    "token rows of a tied matrix": Case("tied", {"trainable_token_indices": [SEEN, 6, 319]}),
    "token rows of both": Case("llama", {"trainable_token_indices": {"embed_tokens": [SEEN], "lm_head": [7, 9]}}),
    "LoRA on the embedding": Case("llama", {"target_modules": ["q_proj", *EMBED]}),
    "LoRA on the embedding, no copy": Case("llama", {"target_modules": ["q_proj", *EMBED]}, embeddings=False),
    "LoRA on both": Case("llama", {"target_modules": ["q_proj", *BOTH], "use_rslora": True}),
    "LoRA on a tied matrix": Case("tied", {"target_modules": ["q_proj", *EMBED], **TIE}),
    "LoRA on a tied matrix, no copy": Case("tied", {"target_modules": ["q_proj", *EMBED], **TIE}, embeddings=False),
    "LoRA on the head, with a copy": Case("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "gpt2's tied embedding": Case("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"], **TIE}),
    "gpt2's token rows": Case("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [SEEN, 6]}),
    "gpt2 in DoRA": Case("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "gpt_neox": Case("gpt_neox", {"target_modules": ["query_key_value", "dense"]}),
    "qwen3_5_text": Case("qwen3_5_text", {"target_modules": ["q_proj", "in_proj_qkv", "up_proj"]}),
    "experts": Case("qwen3_moe", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "gpt-oss's experts": Case(
        "gpt_oss", {"target_parameters": ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]}
    ),
    "a wrapper": Case("gemma3", {"target_modules": r".*language_model.*\.(q_proj|down_proj)"}),
}


@pytest.mark.parametrize("kind", READ)
def test_it_is_the_same_function_here_as_in_peft_and_goes_back_unchanged(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    case = READ[kind]
    wanted = made(models, case, tmp_path / "peft")
    base = models[case.model]
    peft.import_adapter(tmp_path / "peft", tmp_path / "ours", str(base), False)
    np.testing.assert_allclose(ours(base, tmp_path / "ours"), wanted, atol=1e-4)
    assert np.abs(logits(hf(base)) - wanted).max() > 0.01
    out = exported(base, tmp_path / "ours", tmp_path / "again")
    np.testing.assert_allclose(logits(hf(base, out)), wanted, atol=1e-5 + 1e-6 * np.abs(wanted).max())


NAMES: dict[str, tuple[str, Callable[[str], str]]] = {
    "older wrappers": ("gemma3", lambda name: name.replace(f"{P}model.language_model.", f"{P}language_model.model.")),
    "the text model alone": ("gemma3", lambda name: name.replace(f"{P}model.language_model.", f"{P}model.")),
    "a wrapper around the text model": (
        "gemma3_text",
        lambda name: name.replace(f"{P}model.", f"{P}model.language_model."),
    ),
    "no prefix": ("llama", lambda name: name.removeprefix(P)),
    "a doubled prefix": ("llama", lambda name: P + name),
    "the adapter's name": ("llama", lambda name: name.replace(".weight", ".default.weight")),
    "torch.compile": ("llama", lambda name: name.replace(P, f"{P}_orig_mod.")),
    "FSDP": ("llama", lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module.")),
    "data parallel": ("llama", lambda name: f"module.{name}"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_other_names_of_the_same_layers_are_the_same_adapter(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Bit for bit what comes of PEFT's own names, and exported under these."""
    model, name = NAMES[kind]
    made(models, Case(model, {"target_modules": r".*language_model.*q_proj|model\.layers.*q_proj"}), tmp_path / "peft")
    other = changed(tmp_path / "peft", tmp_path / "other", name)
    assert sorted(load_file(other / WEIGHTS)) != sorted(load_file(tmp_path / "peft" / WEIGHTS))
    for source in ("peft", "other"):
        peft.import_adapter(tmp_path / source, tmp_path / f"{source}-mlx", str(models[model]), False)
    same_files(tmp_path / "peft-mlx", tmp_path / "other-mlx", adapter_files.ADAPTER_FILE)
    same_files(tmp_path / "peft", exported(models[model], tmp_path / "other-mlx", tmp_path / "again"), WEIGHTS)


def of_single_experts(model: Path, folder: Path, place: str, parts: list[str]) -> Path:
    """Add to an adapter one for each expert and router, as transformers 4 had them. parts: gate, up and down."""
    shape = json.loads((model / "config.json").read_text())
    width, inner = shape["hidden_size"], shape.get("moe_intermediate_size") or shape["intermediate_size"]
    inputs, outputs = [width, width, inner], [inner, inner, width]
    layers = {
        f"experts.{expert}.{part}": (inputs[index], outputs[index])
        for expert in range(4)
        for index, part in enumerate(parts)
    }
    generator, tensors = np.random.default_rng(4), load_file(folder / WEIGHTS)
    for block in range(2):
        for layer, (rows, columns) in {**layers, "gate": (width, 4)}.items():
            name = f"{P}model.layers.{block}.{place}.{layer}.lora_"
            tensors[f"{name}A.weight"] = generator.normal(size=(3, rows)).astype(np.float32)
            tensors[f"{name}B.weight"] = 0.1 * generator.normal(size=(columns, 3)).astype(np.float32)
    rewrite(folder, tensors)
    return changed(folder, folder.with_name("old"), target_modules=["q_proj", "gate", *parts])


@pytest.mark.parametrize(
    ("model", "place", "parts"),
    [
        ("mixtral", "block_sparse_moe", ["w1", "w3", "w2"]),
        ("qwen3_moe", "mlp", ["gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_adapters_of_single_experts_are_stacked_and_those_that_lack_are_zero(
    model: str, place: str, parts: list[str], models: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT converts them to the experts that transformers 5 has."""
    from peft import PeftModel

    made(models, Case(model), tmp_path / "peft")
    old = of_single_experts(models[model], tmp_path / "peft", place, parts)
    result = peft.import_adapter(old, tmp_path / "ours", str(models[model]), False)
    assert result.notes == ()
    theirs = PeftModel.from_pretrained(hf(models[model]), str(old)).eval()
    np.testing.assert_allclose(ours(models[model], tmp_path / "ours"), logits(theirs), atol=1e-4)
    tensors = load_file(old / WEIGHTS)
    rewrite(old, {name: array for name, array in tensors.items() if ".experts.2." not in name})
    result = peft.import_adapter(old, tmp_path / "few", str(models[model]), False)
    assert len(result.notes) == 6 and "1 of 4 experts of model.layers.0" in result.notes[0]
    saved = load_file(
        tmp_path / "few" / adapter_files.OWN_FILE
        if result.saved.modules
        else tmp_path / "few" / adapter_files.ADAPTER_FILE
    )
    stacked = [array for name, array in saved.items() if "switch_mlp" in name]
    assert len(stacked) == 12 and all(array[1].any() and not array[2].any() for array in stacked)
    with pytest.raises(UserError, match="names depend on the model's family"):
        peft.import_adapter(changed(old, tmp_path / "hub", base_model_name_or_path="a/b"), tmp_path / "n", None, False)
    different = dict(tensors)
    name = next(name for name in tensors if ".experts.2." in name and "lora_A" in name)
    different |= {name: tensors[name][:2], name.replace("lora_A", "lora_B"): tensors[name.replace("_A.", "_B.")][:, :2]}
    rewrite(old, different)
    changed(old, tmp_path / "ranks", rank_pattern={name.removeprefix(P).removesuffix(".lora_A.weight"): 2})
    with pytest.raises(UserError, match="have different ranks or scales"):
        peft.import_adapter(tmp_path / "ranks", tmp_path / "none", str(models[model]), False)


REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "embedding beside a tied head": ("tied", {"modules_to_save": EMBED}, "trained beside the old head", "untied"),
    "drifted apart": ("tied", {"modules_to_save": BOTH}, "trained apart from the embedding", "ensure_weight_tying"),
    "LoRA on a tied head": ("tied", {"target_modules": ["q_proj", "lm_head"]}, "apart from the embedding", "untied"),
    "LoRA beside it": ("tied", {"target_modules": ["q_proj", *EMBED]}, "beside the old head", "untied"),
    "gpt2's beside it": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"], **TIE}, "beside", "untied"),
    "biases": ("llama", {"lora_bias": True}, "lora_bias True is not understood", "no bias"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_it_cannot_be_here_is_refused_with_the_reason(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    model, settings, said, hint = REFUSED[kind]
    made(models, Case(model, settings), tmp_path / "peft")
    with pytest.raises(UserError, match=said) as refused:
        peft.import_adapter(tmp_path / "peft", tmp_path / "ours", str(models[model]), False)
    assert hint in str(refused.value.hint) and not (tmp_path / "ours").exists()


APART = {
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", *EMBED]},
    "both trained": {"modules_to_save": BOTH},
    "the embedding trained": {"modules_to_save": EMBED},
}


@pytest.mark.parametrize("kind", APART)
def test_a_base_untied_as_the_refusal_says_takes_the_adapter(
    kind: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    wanted = made(models, Case("tied", APART[kind]), tmp_path / "peft")
    monkeypatch.chdir(tmp_path)
    exec(adapter_files.UNTIE.split("`")[1], {"m": hf(models["tied"]), "torch": torch})
    tiny.make_tokenizer(tmp_path / "untied")
    conversion.convert("untied", tmp_path / "base", conversion.Quantization.of(16, None, None))
    peft.import_adapter(tmp_path / "peft", tmp_path / "ours", str(tmp_path / "base"), False)
    got = ours(tmp_path / "base", tmp_path / "ours")
    np.testing.assert_allclose(got, wanted, atol=1e-5 + 1e-6 * np.abs(wanted).max())


def test_an_adapter_beside_a_changed_base_is_refused_until_saved_as_the_refusal_says(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """PiSSA takes the largest singular values out of the base and trains them."""
    import torch
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    theirs = get_peft_model(hf(models["llama"]), settings).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "before")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "lora_" in name:
                tensor.add_(0.3 * torch.randn_like(tensor))
    theirs.save_pretrained(tmp_path / "peft")
    with pytest.raises(UserError, match="init_lora_weights 'pissa'") as refused:
        peft.import_adapter(tmp_path / "peft", tmp_path / "ours", str(models["llama"]), False)
    assert "path_initial_model_for_weight_conversion" in str(refused.value.hint)
    wanted = logits(theirs)
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    peft.import_adapter(tmp_path / "plain", tmp_path / "ours", str(models["llama"]), False)
    np.testing.assert_allclose(ours(models["llama"], tmp_path / "ours"), wanted, atol=1e-4)


def test_one_matrix_for_both_becomes_two_where_the_model_has_two(models: dict[str, Path], tmp_path: Path) -> None:
    """With the model; without it the adapter is kept as one, and a model with two refuses it."""
    wanted = made(models, Case("tied", {"modules_to_save": BOTH, **TIE}), tmp_path / "peft")
    adapter = changed(tmp_path / "peft", tmp_path / "hub", base_model_name_or_path="acme/tied")
    peft.import_adapter(adapter, tmp_path / "alone", None, False)
    np.testing.assert_allclose(ours(models["tied"], tmp_path / "alone"), wanted, atol=1e-4)
    with pytest.raises(UserError, match="this model has a matrix for each") as refused:
        ours(models["llama"], tmp_path / "alone")
    assert "--base MODEL" in str(refused.value.hint)
    made_of = peft.import_adapter(adapter, tmp_path / "two", str(models["llama"]), False)
    assert set(made_of.saved.trained) == {"model.embed_tokens", "lm_head"}
    saved = load_file(tmp_path / "two" / adapter_files.OWN_FILE)
    assert saved["lm_head.weight"].tobytes() == saved["model.embed_tokens.weight"].tobytes()


QUIET: dict[str, tuple[str, dict[str, Any]]] = {
    "several ranks": ("llama", {"ranks": {"down_proj": 2}, "train_also": ["norms"]}),
    "a tied embedding": ("tied", {"targets": ["q_proj"], "train_also": ["embeddings"]}),
    "gpt2's": ("gpt2", {"targets": ["c_attn"], "train_also": ["embeddings"]}),
    "a wrapper": ("gemma3", {}),
    "gpt-oss's experts": ("gpt_oss", {"targets": ["q_proj", "gate_proj", "up_proj", "down_proj"]}),
}


@pytest.mark.parametrize("kind", QUIET)
def test_peft_loads_what_is_exported_without_a_word(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    """No missing or unexpected key, no pattern that matches nothing, no matrix untied; and it is what was trained."""
    from peft import PeftModel

    model, section = QUIET[kind]
    wanted = np.array(adapted(models[model], tmp_path / "run", **section)(mx.array(IDS)))
    out = exported(models[model], tmp_path / "run", tmp_path / "peft")
    base = hf(models[model])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        theirs = PeftModel.from_pretrained(base, str(out)).eval()
    said = [str(one.message) for one in heard if "/peft/" in one.filename and "deprecated" not in str(one.message)]
    # Of patterns for parameters PEFT says so though they do match: it looks for modules alone.
    assert [text for text in said if "experts" not in text] == []
    np.testing.assert_allclose(logits(theirs), wanted, atol=1e-4)
    if "embedding" in str(section):
        theirs.set_adapter("default")
        matrices = [theirs.get_input_embeddings(), theirs.get_output_embeddings()]
        assert len({layer.modules_to_save["default"].weight.data_ptr() for layer in matrices}) == 1


def test_layers_of_a_vision_tower_are_left_out_and_said(models: dict[str, Path], tmp_path: Path) -> None:
    """The logits of a text are PEFT's; an adapter of the tower alone is refused."""
    case = Case("gemma3", {"target_modules": "all-linear"})
    wanted = made(models, case, tmp_path / "peft")
    result = peft.import_adapter(tmp_path / "peft", tmp_path / "ours", str(models["gemma3"]), False)
    assert any("outside of the language model are left out (model.vision_tower" in note for note in result.notes)
    np.testing.assert_allclose(ours(models["gemma3"], tmp_path / "ours"), wanted, atol=1e-4)


def test_added_tokens_come_with_their_tokenizer_or_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """Embedding and head saved by themselves after resizing; the hint followed; LoRA on both as well."""
    from transformers import AutoTokenizer

    for number, targets in enumerate((["q_proj"], ["q_proj", *BOTH])):
        folder, out = tmp_path / f"peft{number}", tmp_path / f"ours{number}"
        wanted = made(models, Case("llama", {"target_modules": targets}, rows=330), folder)
        with pytest.raises(UserError, match="the model needs") as refused:
            peft.import_adapter(folder, out, str(models["llama"]), False)
        assert "10 tokens were added" in str(refused.value.hint) and "tokenizer.json" in str(refused.value.hint)
        tokenizer = AutoTokenizer.from_pretrained(models["llama"])
        tokenizer.add_tokens(["<|call|>"], special_tokens=True)
        tokenizer.save_pretrained(folder)
        peft.import_adapter(folder, out, str(models["llama"]), False)
        np.testing.assert_allclose(ours(models["llama"], out), wanted, atol=1e-5 + 1e-6 * np.abs(wanted).max())
    tokenizer.add_tokens(["plain word"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="no special ones: plain word"):
        peft.import_adapter(folder, tmp_path / "none", str(models["llama"]), False)
    made(models, Case("llama", rows=300, embeddings=True), tmp_path / "cut")
    with pytest.raises(UserError, match="the model needs") as refused:
        peft.import_adapter(tmp_path / "cut", tmp_path / "none", str(models["llama"]), False)
    assert "resize_token_embeddings(300)" in str(refused.value.hint)


def test_without_a_model_the_folder_it_names_says_what_its_layers_are_called(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """GPT-2's layers have other names in MLX; where the base is not at hand, that is said in use."""
    wanted = made(models, Case("gpt2", {"target_modules": ["c_attn"]}), tmp_path / "peft")
    result = peft.import_adapter(tmp_path / "peft", tmp_path / "ours", None, False)
    assert str(models["gpt2"]) in result.notes[0]
    np.testing.assert_allclose(ours(models["gpt2"], tmp_path / "ours"), wanted, atol=1e-4)
    elsewhere = changed(tmp_path / "peft", tmp_path / "hub", base_model_name_or_path="openai-community/gpt2")
    peft.import_adapter(elsewhere, tmp_path / "alone", None, False)
    with pytest.raises(UserError, match="does not fit this model") as refused:
        ours(models["gpt2"], tmp_path / "alone")
    assert "convert it again with --base MODEL" in str(refused.value.hint)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    broken = changed(tmp_path / "peft", tmp_path / "odd", base_model_name_or_path=str(tmp_path / "broken"))
    assert "is not checked" in peft.import_adapter(broken, tmp_path / "unchecked", None, False).notes[0]
