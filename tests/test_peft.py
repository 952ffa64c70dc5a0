"""PEFT both ways: what PEFT computes from our adapters and we from PEFT's, and that nothing changes there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlxtune_convert.adapters import AdapterConfig
from mlxtune_convert.peft import adapter_folder as files
from safetensors.numpy import load_file, save_file
from test_variants import KINDS, adapted

from mlxtune.adapter import adapter_files, peft
from mlxtune.errors import UserError
from mlxtune.model.load import load, open_model, source_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),  # they do match
    pytest.mark.filterwarnings("ignore:.*target_parameters.*:UserWarning"),
]
IDS = np.random.default_rng(5).integers(3, 250, (2, 32))


def hf(folder: Path, adapter: Path | None = None) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


def exported(folder: Path, run: Path, out: Path) -> Path:
    model, _ = open_model(folder)
    spec = adapter_files.load_adapter(model, run)
    out.mkdir()
    files.write_adapter(out, peft.from_model(model, spec, source_of(folder)["config"], "acme/tiny"))
    return out


def same_files(one: Path, other: Path, name: str) -> None:
    left, right = load_file(one / name), load_file(other / name)
    assert sorted(left) == sorted(right)
    for key, array in left.items():
        assert array.tobytes() == right[key].tobytes(), key


MODELS = {
    "llama": {"targets": "all-linear"},
    "tied": {"targets": ["q_proj"], "train_also": ["embeddings", "norms"]},
    **{name: {"targets": "all-linear"} for name in ("mixtral", "qwen2_moe", "phimoe", "granitemoe", "gpt2")},
    "qwen3_5_text": {"targets": ["q_proj", "in_proj_qkv", "up_proj"], "ranks": {"up_proj": 4}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("peft")
    made = {name: tiny.make_model(root / name, name) for name in MODELS if name != "tied"}
    return {**made, "tied": tiny.make_model(root / "tied", "llama", tie_word_embeddings=True)}


@pytest.mark.parametrize("case", [*(("llama", kind) for kind in KINDS), *((name, "") for name in MODELS)], ids=str)
def test_peft_computes_what_we_trained_and_gives_it_back_unchanged(
    case: tuple[str, str], models: dict[str, Path], tmp_path: Path
) -> None:
    """Every kind of adapter on llama, and other families with their experts, routers, tied heads and prefixes."""
    name, kind = case
    model = adapted(models[name], tmp_path / "run", **(KINDS[kind] if kind else MODELS[name]))
    ours = np.array(model(mx.array(IDS)))
    out = exported(models[name], tmp_path / "run", tmp_path / "peft")
    np.testing.assert_allclose(logits(hf(models[name], out)), ours, atol=2e-5)
    assert np.abs(logits(hf(models[name])) - ours).max() > 0.01
    peft.import_adapter(out, tmp_path / "back", str(models[name]), False)
    same_files(tmp_path / "run", tmp_path / "back", AdapterConfig.read(tmp_path / "run").file)
    again = load(str(models[name]), "float32").model
    adapter_files.load_adapter(again, tmp_path / "back")
    np.testing.assert_array_equal(np.array(again(mx.array(IDS))), ours)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "acme/tiny"


PEFTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "lm_head"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "down_proj", "v_proj"],
        "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {"v_proj": 11},
        "use_rslora": True,
    },
    "dora": {"r": 3, "use_dora": True, "target_modules": "all-linear", "lora_dropout": 0.1},
    "saved": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]},
    "last": {"r": 2, "target_modules": ["up_proj"], "layers_to_transform": [1]},
    "first": {"r": 2, "target_modules": ["up_proj"], "layers_to_transform": [0]},
}


@pytest.mark.parametrize("kind", PEFTS)
def test_an_adapter_that_peft_made_is_the_same_function_here(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Imported by the command, compared with PEFT's own logits, and exported again bit for bit."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    theirs = get_peft_model(hf(models["llama"]), LoraConfig(task_type="CAUSAL_LM", **PEFTS[kind])).eval()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                tensor.add_(0.05 * torch.randn_like(tensor))
    theirs.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    tiny.done("convert", tmp_path / "peft", tmp_path / "ours")
    ours = load(str(models["llama"]), "float32").model
    adapter_files.load_adapter(ours, tmp_path / "ours")
    np.testing.assert_allclose(np.array(ours(mx.array(IDS))), logits(theirs), atol=2e-5)
    assert np.abs(logits(hf(models["llama"])) - logits(theirs)).max() > 0.02
    out = exported(models["llama"], tmp_path / "ours", tmp_path / "again")
    same_files(tmp_path / "peft", out, "adapter_model.safetensors")
    np.testing.assert_array_equal(logits(hf(models["llama"], out)), logits(theirs))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"bias": "lora_only"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"r": 5}, "rank"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_name(
    change: dict, key: str, models: dict[str, Path], tmp_path: Path
) -> None:
    adapted(models["llama"], tmp_path / "run", targets=["q_proj"])
    out = exported(models["llama"], tmp_path / "run", tmp_path / "peft")
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, **change}))
    said = tiny.refused(tmp_path / "ours", "convert", out, tmp_path / "ours", expected=(key,))
    assert "adapter_" in said


@pytest.mark.parametrize(
    "name", ["base_model.model.model.layers.0.mlp.up_proj.lora_C", "base_model.model.model.norm.weight"]
)
def test_a_tensor_that_is_not_understood_is_refused_by_its_name(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    adapted(models["llama"], tmp_path / "run", targets=["q_proj"])
    out = exported(models["llama"], tmp_path / "run", tmp_path / "peft")
    tensors = load_file(out / "adapter_model.safetensors")
    save_file({**tensors, name: np.zeros(3, np.float32)}, out / "adapter_model.safetensors")
    tiny.refused(
        tmp_path / "ours", "convert", out, tmp_path / "ours", expected=(name.removeprefix("base_model.model."),)
    )


def test_an_embedding_trained_beside_the_old_tied_head_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """PEFT gave it its own copy; here one matrix serves both, which would be another function."""
    adapted(models["tied"], tmp_path / "run", targets=["q_proj"], train_also=["embeddings"])
    out = exported(models["tied"], tmp_path / "run", tmp_path / "peft")
    tensors = load_file(out / "adapter_model.safetensors")
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, out / "adapter_model.safetensors")
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "ensure_weight_tying": False}))
    peft.import_adapter(out, tmp_path / "ours", None, False)
    with pytest.raises(UserError, match="beside the old head"):
        adapter_files.load_adapter(load(str(models["tied"])).model, tmp_path / "ours")


def test_experts_without_a_model_ask_for_one(models: dict[str, Path], tmp_path: Path) -> None:
    adapted(models["mixtral"], tmp_path / "run")
    out = exported(models["mixtral"], tmp_path / "run", tmp_path / "peft")
    tiny.refused(tmp_path / "ours", "convert", out, tmp_path / "ours", expected=("--base DIR",))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_training_goes_on_in_pytorch_along_the_same_curve(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    """From one adapter, 20 steps of AdamW here and in PyTorch + PEFT: the same loss at every step."""
    import mlx.nn as nn
    import mlx.optimizers as optim
    import torch
    from peft import PeftModel

    ours = adapted(models["llama"], tmp_path / "run", variant=kind)
    out = exported(models["llama"], tmp_path / "run", tmp_path / "peft")
    theirs = PeftModel.from_pretrained(hf(models["llama"]), str(out), is_trainable=True)
    theirs.eval()  # no dropout on either side
    ids, settings = torch.from_numpy(IDS), {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    torch_optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], 2e-3, **settings)
    optimizer = optim.AdamW(2e-3, bias_correction=True, **{**settings, "betas": [0.9, 0.999]})
    step = nn.value_and_grad(ours, lambda x: nn.losses.cross_entropy(ours(x[:, :-1]), x[:, 1:], reduction="mean"))
    curves: tuple[list[float], list[float]] = ([], [])
    for _ in range(20):
        value, gradients = step(mx.array(IDS))
        optimizer.update(ours, gradients)
        mx.eval(ours.parameters(), optimizer.state)
        loss = theirs(ids, labels=ids).loss
        torch_optimizer.zero_grad()
        loss.backward()
        torch_optimizer.step()
        curves[0].append(value.item())
        curves[1].append(loss.item())
    assert curves[0][0] == pytest.approx(curves[1][0], abs=1e-5)
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)
    assert curves[0][-1] < curves[0][0] - 0.05


def test_whoever_has_only_the_export_gets_the_same_answers(models: dict[str, Path], tmp_path: Path) -> None:
    """Ten prompts, greedy, float32: the command here, transformers' own generate on the exported folder there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mlxtune.evaluate.engines.sampling import Sampling
    from mlxtune.evaluate.generate import answer
    from mlxtune.model.load import Loaded
    from mlxtune.ship.artefacts import HuggingFace
    from mlxtune.ship.export import ship
    from mlxtune.ship.request import Request

    model = adapted(models["llama"], tmp_path / "run")
    loaded = load(str(models["llama"]), "float32")
    tuned = Loaded(model, loaded.tokenizer, loaded.config, loaded.path, loaded.dtype, loaded.own)
    ship(Request(models["llama"], tmp_path / "run", tmp_path / "hf"), HuggingFace())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for number in range(10):
        messages = [{"role": "user", "content": f"Question {number * 37}?"}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        made = theirs.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert answer(tuned, messages, Sampling(max_tokens=24), {}) == tokenizer.decode(made, skip_special_tokens=False)
