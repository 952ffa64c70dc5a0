"""Values in strangers' files that are of the right place and of no use: each is refused in one line, or left out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
import peaks
import pytest
import tiny
import ways
from mlxtune_convert.adapters import AdapterConfig, read_adapter, save_adapter
from mlxtune_convert.files import json_text, read_json, refuse_links_out, write_json
from mlxtune_convert.gguf import tokenizer_write
from mlxtune_convert.peft.adapter_folder import Adapter, Update
from mlxtune_convert.shown import LONGEST, brief, shown, shown_json, shown_name
from safetensors.numpy import load_file, save_file

from mlxtune.adapter import adapter_files, attach
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.errors import UserError
from mlxtune.ship import runners


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    """Whoever opens a named pipe waits until somebody writes into it."""
    for name in ("config.json", "chat_template.jinja"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"config\.json is neither a file nor a folder"):
        read_json(tmp_path / "config.json", "a model folder")
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        refuse_links_out(tmp_path)
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        read_json(tmp_path / "zero.json", "a model folder")


def adapter_folder(folder: Path, **changes: np.ndarray) -> Path:
    """An adapter of two layers of a two-layer model. changes: other tensors, by the factor's name."""
    folder.mkdir()
    draw = np.random.default_rng(0).normal(size=(2, 64, 2)).astype(np.float32)
    updates = {f"model.layers.{layer}.self_attn.q_proj": Update(draw[0], draw[1].T, 2.0) for layer in range(2)}
    save_adapter(folder, Adapter(updates), 2)
    tensors = load_file(folder / "adapters.safetensors")
    save_file({**tensors, **changes}, folder / "adapters.safetensors")
    return folder


def bare_model() -> nn.Module:
    """A llama of two layers without an adapter."""
    return peaks.build({"model_type": "llama", **ways.COMMON})


NAME = "model.layers.1.self_attn.q_proj.lora_a"


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.ones((64, 2), np.int32), "holds int32, not fractions"),
        (np.full((64, 2), np.nan, np.float32), "holds NaN or infinity"),
        (np.full((64, 2), np.inf, np.float16), "holds NaN or infinity"),
    ],
)
def test_an_adapter_that_cannot_have_been_trained_is_refused_by_all_who_read_it(
    array: np.ndarray, expected: str, tmp_path: Path
) -> None:
    folder = adapter_folder(tmp_path / "adapter", **{NAME: array})
    with pytest.raises(UserError, match=rf"{NAME} {expected}"):
        read_adapter(folder)
    model = bare_model()
    attach.attach(model, AdapterPlan.read(folder, model))
    with pytest.raises(UserError, match=rf"{NAME} {expected}"):
        adapter_files.load_tensors(model, folder / "adapters.safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [("rank", -2147483649), ("rank", 1 << 20), ("rank", 1e400), ("scale", float("nan")), ("scale", float("inf"))],
)
def test_an_absurd_rank_or_scale_is_refused_before_anything_is_made_of_it(
    key: str, value: float, tmp_path: Path
) -> None:
    folder = adapter_folder(tmp_path / "adapter")
    config = read_json(folder / "adapter_config.json", "an adapter")
    parameters = {**config["lora_parameters"], key: value}
    modules = {"model.layers.0.self_attn.q_proj": {"rank": 2, "scale": 2.0, key: value}}
    for changed in ({**config, "lora_parameters": parameters}, {**config, "modules": modules}):
        (folder / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="not an MLX adapter's configuration"):
            AdapterConfig.read(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"fine_tune_type": "mlxtune", "trained": ["norm", {"deep": 1}]},
        {"fine_tune_type": "mlxtune", "trained": "norm"},
        {"lora_parameters": {"rank": 4, "scale": 1.0, "keys": [["self_attn.q_proj"]]}},
    ],
)
def test_layers_of_an_adapter_are_named_by_texts(change: dict[str, Any], tmp_path: Path) -> None:
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 4, "scale": 1.0}, **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="not an MLX adapter's configuration"):
        AdapterConfig.read(tmp_path)


def test_an_adapter_for_what_is_no_linear_layer_is_refused() -> None:
    spec = AdapterPlan({"model.norm": (2, 1.0)})
    with pytest.raises(UserError, match=r"whose model\.norm is no linear layer"):
        attach.attach(bare_model(), spec)


@pytest.mark.parametrize(
    ("listed", "ids"),
    [(2, [2]), ([2, 7], [2, 7]), (None, []), ("evil", []), ([True, -1, 1 << 40, 2.0, [3], 4], [4]), ({"a": 1}, [])],
)
def test_what_is_no_token_id_ends_no_answer(listed: Any, ids: list[int]) -> None:
    assert tokenizer_write.token_ids(listed) == ids


@pytest.mark.parametrize(
    "change",
    [
        {"vocab": {"a": "b"}},
        {"vocab": {"a": [[1]]}},
        {"vocab": None},
        {"merges": 1},
        {"merges": [1]},
    ],
)
def test_a_vocabulary_of_other_types_cannot_be_written_to_gguf(change: dict[str, Any], tokenizer_folder: Path) -> None:
    whole = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    tokenizer_write.fields(tokenizer_folder, 320, whole)
    whole["model"] |= change
    with pytest.raises(UserError, match="its tokenizer cannot be written to GGUF"):
        tokenizer_write.fields(tokenizer_folder, 320, whole)


def test_half_of_a_character_is_written_and_said_without_an_error(tmp_path: Path) -> None:
    """JSON can spell it; UTF-8, which files and terminals have, cannot."""
    value = {"a": "\ud800é"}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == value
    assert json_text({"a": "é"}) == '{"a": "é"}'
    assert shown("a\ud800") == shown_name("a\ud800") == "a\\ud800"
    assert json.loads(shown_json(value)) == value
    shown_json(value).encode()


def test_a_name_of_a_megabyte_does_not_bury_what_is_said_of_it(tmp_path: Path) -> None:
    assert brief("short") == "short"
    long = brief(f"begin {'x' * 1_000_000} end")
    assert len(long) == LONGEST and long.startswith("begin xx") and long.endswith("xx end")
    folder = adapter_folder(tmp_path / "adapter", **{"x" * 100_000: np.ones(1, np.float32)})
    said = tiny.one_clear_line(tiny.mlxtune("data", "show", "--model", folder, "--data", "x" * 100_000))
    assert len(said) < 1_500


@pytest.mark.parametrize("name", [None, [], ["pipeline"], ["evil"], [7], ["PreTrainedModel", "x"]])
def test_a_checkpoint_names_no_class_but_a_models(name: Any) -> None:
    import transformers

    config = transformers.LlamaConfig(architectures=name)
    expected = transformers.PreTrainedModel if name and name[0] == "PreTrainedModel" else None
    assert runners.model_class(config) is (expected or transformers.AutoModelForCausalLM)


def test_a_folder_that_transformers_cannot_load_is_said_with_its_reason(hf_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hf_model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "64"}))
    with pytest.raises(UserError, match=rf"^transformers [\d.]+ does not load {folder} \("):
        runners.transformers_model(folder)


def test_a_checkpoint_whose_moments_are_another_runs_is_refused(run: Path, tmp_path: Path) -> None:
    """With the digest of the changed file in state.json: that guards against tearing, not against people."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    newest = sorted((copy / "checkpoints").glob("step-*"))[-1]
    file, state = newest / "optimizer.safetensors", newest / "state.json"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith(".m"))
    tensors[f"{name}x"] = tensors.pop(name)
    save_file(tensors, file)
    whole = json.loads(state.read_text())
    whole["sha256"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    state.write_text(json.dumps(whole))
    said = tiny.mlxtune("train", "--resume-anyway", "--out", copy, "--set", "train.steps=13")
    tiny.one_clear_line(said, "optimizer.safetensors is not the optimizer's state of this run")
