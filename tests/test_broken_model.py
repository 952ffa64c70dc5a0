"""Model folders, GGUF files and names that cannot be used.

Everything goes through the installed command: one clear line, exit status 2, nothing half-written.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlxtune_convert.gguf import container
from mlxtune_convert.gguf.container import Writer
from safetensors.numpy import load_file, save_file
from test_gguf_fuzz import model_bytes
from tiny import Change, lose_a_tensor, refused, remove


def edit_config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def lose_a_shard(folder: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (folder / "model.safetensors").rename(folder / names[0])
    index = {"weight_map": {"lm_head.weight": names[0], "model.norm.weight": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tear_the_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


MODELS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no config.json": (remove("config.json"), ("has no config.json", "Expected a model folder: config.json,")),
    "no tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        ("has no tokenizer", "Expected tokenizer.json beside the model's weights."),
    ),
    "a config.json that is no JSON": (
        lambda folder: (folder / "config.json").write_text("{\n  model_type: llama\n}"),
        ("config.json line 2: not valid JSON",),
    ),
    "a config.json with an impossible number": (
        edit_config(num_attention_heads=0),
        ("config.json: num_attention_heads is 0, allowed is a whole number from 1",),
    ),
    "an unknown model_type": (edit_config(model_type="gpt9"), ("mlx-lm has no model of type 'gpt9'",)),
    "no weights": (remove("model.safetensors"), ("has no model*.safetensors", "A model folder holds config.json and")),
    "a missing shard": (
        lose_a_shard,
        ("1 of 2 weight files are missing, first model-00002-of-00002.safetensors", "Copy or download"),
    ),
    "half a shard": (
        tear_the_weights,
        ("model.safetensors:", "torn, or not a safetensors file", "The file is incomplete"),
    ),
    "a missing tensor": (lose_a_tensor, ("the weights do not fit config.json (Missing 1", "model.norm.weight")),
    "pickled weights alone": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        ("only pytorch_model.bin: pickled weights are never loaded",),
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_folder_that_is_not_whole_is_refused(kind: str, hf_model: Path, tmp_path: Path) -> None:
    change, expected = MODELS[kind]
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(hf_model, folder)
    change(folder)
    said = refused(out, "convert", folder, out, expected=expected)
    assert str(folder) in said


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused(
    hf_model: Path, data: Path, tmp_path: Path
) -> None:
    """MLX reads whatever lies behind the embedding, so such a run would train on noise and look fine."""
    folder, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(hf_model, folder)
    edit_config(vocab_size=100)(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].copy()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    expected = ("the tokenizer makes the token 2", "the model knows 100 tokens", "take the model's own")
    refused(out, "train", "--model", folder, "--data", data, "--out", out, expected=expected)


def without_tensors(path: Path) -> None:
    model_bytes(path)
    with Writer(path, container.read(path).fields, {}):
        pass


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.write_bytes(b"not a model" * 99), ("m.gguf: not a GGUF file", "Copy or download it again.")),
        (
            lambda path: path.write_bytes(model_bytes(path)[:5000]),
            ("m.gguf: not a GGUF file, or a damaged one", "Copy or download it again."),
        ),
        (without_tensors, ("m.gguf: llama.block_count is 1",)),
    ],
    ids=["no GGUF at all", "torn", "without its tensors"],
)
def test_a_gguf_file_that_is_not_whole_is_refused(make: Change, expected: tuple[str, ...], tmp_path: Path) -> None:
    make(tmp_path / "m.gguf")
    refused(tmp_path / "out", "convert", tmp_path / "m.gguf", tmp_path / "out", expected=expected)


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(
        out, "convert", tmp_path / "no" / "model", out, expected=(f"no file or folder {tmp_path}/no/model", "hub id")
    )


def test_a_hub_id_without_a_network_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    refused(out, "convert", "owner/name", out, expected=("cannot reach the hub for owner/name",), **offline)
