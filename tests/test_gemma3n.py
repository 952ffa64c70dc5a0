"""Gemma 3n: keys and values that later blocks share, without a cache too; padding; a wrapper made of its text model."""

from __future__ import annotations

import json
from pathlib import Path

import conformance
import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlxtune_convert.hf import families
from safetensors.numpy import load_file, save_file

from mlxtune.adapter.plan import linear_paths
from mlxtune.compute import prefix
from mlxtune.data.dataset.forest import behind_one_trunk
from mlxtune.model import convert
from mlxtune.model.load import load, open_model
from mlxtune.ship.artefacts import HuggingFace
from mlxtune.ship.export import ship
from mlxtune.ship.request import Request


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("gemma3n") / "text", "gemma3n_text")


def test_a_token_whose_embedding_is_zero_gives_numbers_as_in_transformers(text: Path) -> None:
    """As a padding token's may be: mlx-lm divides by its size."""
    ids = np.array([[17, 0, 31, 0, 0]])
    import torch

    with torch.no_grad():
        wanted = conformance.reference(text)(torch.from_numpy(ids)).logits.numpy()
    ours = np.array(load(str(text), "float32").model(mx.array(ids)))
    assert not load_file(text / "model.safetensors")["model.embed_tokens.weight"][0].any()
    assert conformance.apart(ours, wanted) < 5e-5


def test_a_shared_prefix_is_shared_by_the_blocks_that_have_no_keys_of_their_own(text: Path) -> None:
    model = load(str(text), "float32").model
    ids = mx.array(np.concatenate([np.tile(conformance.IDS[:1, :10], (2, 1)), conformance.IDS[:, 10:]], 1))
    whole = np.array(model(ids))[:, 10:]
    passes = behind_one_trunk(2, ids.shape[1], 10)
    suffixes = prefix.through(model, model, passes, [ids[:1, :10], ids[:, 10:]])
    assert conformance.apart(np.array(suffixes).reshape(whole.shape), whole) < 1e-4


def test_no_adapter_is_on_what_a_sharing_block_does_not_use(text: Path) -> None:
    model, _ = open_model(text)
    own, sharing = ({path.split(".")[-1] for path in linear_paths(model.layers[index])} for index in (0, 3))
    assert own - sharing == {"k_proj", "v_proj"}
    assert not {"prediction_coefs", "correction_coefs"} & own  # mlx-lm reads their matrices


def test_a_wrapper_leaves_with_the_towers_of_its_original(text: Path, tmp_path: Path) -> None:
    """Its vision tower is in another library (timm), so the original is the text model under a wrapper's names."""
    whole = tmp_path / "whole"
    whole.mkdir()
    tensors = {
        name.replace("model.", "model.language_model.", 1): array
        for name, array in load_file(text / "model.safetensors").items()
    }
    tensors["model.embed_vision.embedding.weight"] = np.ones((8, 64), np.float32)
    tensors["model.vision_tower.timm_model.conv_stem.conv.weight"] = np.ones((4, 4), np.float32)
    save_file(tensors, whole / "model.safetensors", {"format": "pt"})
    config = json.loads((text / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({"model_type": "gemma3n", "text_config": config}))
    tiny.make_tokenizer(whole)
    convert.convert(str(whole), tmp_path / "mlx", convert.Quantization.of(16, None, None))
    ours = np.array(load(str(tmp_path / "mlx"), "float32").model(mx.array(conformance.IDS)))
    assert conformance.apart(ours, conformance.logits(conformance.reference(text))) < 5e-5
    ship(Request(tmp_path / "mlx", None, tmp_path / "out", base=whole), HuggingFace())
    back = load_file(tmp_path / "out" / "model.safetensors")
    unused = {name for name in back if "layers.2." in name or "layers.3." in name} - tensors.keys()
    assert {name.split(".")[-2] for name in unused} == {"k_proj", "v_proj", "k_norm"}  # transformers passes over them
    assert back.keys() - unused == tensors.keys()
    assert all(back[name].tobytes() == tensors[name].tobytes() for name in tensors)
    assert families.by_model_type({"model_type": "gemma3n"}).tower == "embed_vision."
