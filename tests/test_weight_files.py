"""Which files of a folder are the model's weights: as transformers chooses them, and nothing beside them mixed in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from mlxtune_convert.tensors import INDEX, weights_of
from safetensors.numpy import load_file, save_file

from mlxtune.errors import UserError
from mlxtune.model import convert
from mlxtune.model.load import open_model

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
# What people leave in a folder: copies of Finder and iCloud, other splits, other types, backups.
STRAYS = (
    *("model 2.safetensors", "model-4bit.safetensors", "model.bf16.safetensors", "model-00003-of-00003.safetensors"),
    *("model-old.safetensors", "model_backup.safetensors", "model-00001-of-00003.safetensors"),
)


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file({name: np.array(array, order="C") for name, array in tensors.items()}, path, {"format": "pt"})


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The tensors of another model of the same shape."""
    return load_file(tiny.make_model(tmp_path_factory.mktemp("other") / "m", seed=7) / "model.safetensors")


@pytest.fixture
def sharded(hf_model: Path, tmp_path: Path) -> Path:
    """The tiny llama in two shards with an index, in a folder whose name a glob pattern would misread."""
    folder = tmp_path / "model [4bit] *"
    shutil.copytree(hf_model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    table = {name: SHARDS[place % 2] for place, name in enumerate(tensors)}
    for shard in SHARDS:
        save(folder / shard, {name: array for name, array in tensors.items() if table[name] == shard})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


def edit_index(folder: Path, change: dict[str, str | None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    table = {**index["weight_map"], **change}
    index["weight_map"] = {name: file for name, file in table.items() if file is not None}
    (folder / INDEX).write_text(json.dumps(index))


def as_transformers(folder: Path) -> None:
    """Assert that our model has the very tensors that transformers gives its own."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    ours = dict(tree_flatten(open_model(folder)[0].parameters()))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(np.array(array), theirs[name].numpy(), err_msg=name)


@pytest.mark.parametrize("stray", STRAYS)
def test_a_stray_file_beside_the_index_is_never_mixed_in(stray: str, sharded: Path, other: dict) -> None:
    save(sharded / stray, other)
    as_transformers(sharded)
    (note,) = weights_of(sharded).notes
    assert note.startswith(f"{stray} in {sharded} is not read: {INDEX} names")


def test_a_single_file_comes_before_the_index(sharded: Path, other: dict) -> None:
    save(sharded / "model.safetensors", other)
    as_transformers(sharded)
    (note,) = weights_of(sharded).notes
    assert f"{SHARDS[0]} and 1 more" in note and "model.safetensors is the model" in note


@pytest.mark.parametrize("name", ["consolidated.safetensors", "other.safetensors.index.json"])
def test_the_file_that_config_json_names_comes_before_both(name: str, sharded: Path, other: dict) -> None:
    file = "part.safetensors" if name.endswith(".json") else name
    save(sharded / file, other)
    if file != name:
        (sharded / name).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(other, file)}))
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    as_transformers(sharded)
    # The converted folder has the usual names, so the key must not follow.
    convert.convert(str(sharded), sharded.parent / "mlx", convert.Quantization.of(16, None, None))
    assert "transformers_weights" not in (sharded.parent / "mlx" / "config.json").read_text()


def test_a_torn_stray_does_not_matter(sharded: Path) -> None:
    (sharded / "model 2.safetensors").write_bytes(b"torn")
    as_transformers(sharded)


def test_convert_says_what_it_does_not_read(sharded: Path, other: dict, tmp_path: Path) -> None:
    save(sharded / STRAYS[0], other)
    done = convert.convert(str(sharded), tmp_path / "mlx", convert.Quantization.of(16, None, None))
    assert [note for note in done.notes if f"{STRAYS[0]} in {sharded} is not read" in note]
    ours, theirs = load_file(tmp_path / "mlx" / "model.safetensors"), weights_of(sharded).files
    for name, array in (pair for file in theirs for pair in load_file(file).items()):
        np.testing.assert_array_equal(ours[name], array)


def test_a_tensor_that_the_index_does_not_name_is_read_and_noted(sharded: Path) -> None:
    edit_index(sharded, {"lm_head.weight": None})
    as_transformers(sharded)
    (note,) = weights_of(sharded).notes
    assert "does not name 1 tensors of its files, first lm_head.weight" in note


def test_a_tensor_in_both_shards_is_taken_where_they_agree_and_refused_where_not(sharded: Path) -> None:
    first, second = (load_file(sharded / shard) for shard in SHARDS)
    name = next(iter(first))
    save(sharded / SHARDS[1], {**second, name: first[name]})
    as_transformers(sharded)
    save(sharded / SHARDS[1], {**second, name: first[name] + 1})
    with pytest.raises(UserError, match=f"both hold {name}, with other numbers"):
        open_model(sharded)


def test_a_tensor_that_only_the_index_knows_is_refused(sharded: Path) -> None:
    edit_index(sharded, {"model.layers.9.x.weight": SHARDS[0]})
    with pytest.raises(
        UserError, match=r"names 1 tensors that its files do not hold, first model.layers.9.x.weight of"
    ):
        open_model(sharded)


def test_shards_without_an_index_are_read_when_they_are_all_there(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert [file.name for file in weights_of(sharded).files] == list(SHARDS)
    assert mx.isfinite(open_model(sharded)[0](mx.array([[1, 2]]))).all()
    (sharded / SHARDS[0]).unlink()
    with pytest.raises(UserError, match="has 1 of 2 weight files, first model-00002"):
        open_model(sharded)


def test_one_file_of_another_name_is_read_and_noted_and_several_are_refused(hf_model: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "model.fp16.safetensors")
    weights = weights_of(tmp_path / "m")
    assert [file.name for file in weights.files] == ["model.fp16.safetensors"]
    assert "model.fp16.safetensors is read" in weights.notes[0]
    shutil.copyfile(weights.files[0], tmp_path / "m" / "model 2.safetensors")
    with pytest.raises(UserError, match=r"which of 2 files are the model is not said: model 2\.safetensors, mod"):
        open_model(tmp_path / "m")
