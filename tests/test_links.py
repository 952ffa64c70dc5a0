"""Links in folders of models and adapters: nothing outside is read as a part of them, copied or shipped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
from mlxtune_convert.adapters import AdapterConfig
from mlxtune_convert.files import refuse_links_out
from mlxtune_convert.hf import companions
from mlxtune_convert.peft import adapter_folder
from mlxtune_convert.tensors import weights_of

from mlxtune.errors import UserError

OUT = "is a link that leads out of the folder"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    place = tmp_path / "elsewhere" / "secret.txt"
    place.parent.mkdir()
    place.write_text("the secret")
    return place


@pytest.mark.parametrize("name", ["merges.txt", "README.md", "chat_template.jinja", "model-2.safetensors", "notes"])
def test_a_link_out_of_a_model_is_refused_and_nothing_is_copied(
    name: str, hf_model: Path, secret: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(hf_model, model)
    (model / name).symlink_to(secret)
    tiny.refused(tmp_path / "out", "convert", model, tmp_path / "out", expected=(f"{name} {OUT}",))


def test_a_relative_link_and_one_to_a_folder_lead_out_as_well(hf_model: Path, secret: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(hf_model, model)
    (model / "merges.txt").symlink_to(Path("..") / "elsewhere" / "secret.txt")
    with pytest.raises(UserError, match=OUT):
        refuse_links_out(model)
    (model / "merges.txt").unlink()
    (model / "additional_chat_templates").symlink_to(secret.parent)
    with pytest.raises(UserError, match=OUT):
        refuse_links_out(model)


@pytest.mark.parametrize("command", ["data", "generate", "train"])
def test_no_command_reads_a_model_through_such_a_link(
    command: str, mlx_model: Path, secret: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(mlx_model, model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / "chat_template.jinja").symlink_to(secret)
    rows = tiny.write_jsonl(tmp_path / "d.jsonl", [{"text": "a"}] * 4)
    words: dict[str, tuple[str | Path, ...]] = {
        "data": ("data", "show", "--model", model, "--data", rows),
        "generate": ("generate", "--model", model, "--prompt", "a"),
        "train": ("train", "--model", model, "--data", rows, "--out", tmp_path / "run"),
    }
    assert "the secret" not in tiny.one_clear_line(tiny.mlxtune(*words[command]), OUT)


def test_an_adapter_with_a_link_out_is_refused(run: Path, secret: Path, tmp_path: Path) -> None:
    for reader in (AdapterConfig.read, adapter_folder.read_adapter):
        adapter = tmp_path / reader.__module__
        shutil.copytree(run, adapter)
        (adapter / "mlxtune_tokenizer.json").unlink(missing_ok=True)
        (adapter / "mlxtune_tokenizer.json").symlink_to(secret)
        with pytest.raises(UserError, match=OUT):
            reader(adapter)


def test_links_inside_the_folder_and_into_the_hubs_cache_are_followed(hf_model: Path, tmp_path: Path) -> None:
    """The cache of huggingface_hub: snapshots/REVISION/NAME -> ../../blobs/HASH; another model's blobs are outside."""
    cache = tmp_path / "models--acme--tiny"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(hf_model.iterdir()):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    (snapshot / "copy.json").symlink_to("config.json")
    tiny.done("convert", snapshot, tmp_path / "out", "--bits", "16")
    (tmp_path / "link").symlink_to(snapshot)
    tiny.done("convert", tmp_path / "link", tmp_path / "again", "--bits", "16")
    other = tmp_path / "models--acme--other" / "blobs"
    other.mkdir(parents=True)
    (other / "1").write_text("the secret")
    (snapshot / "merges.txt").symlink_to(other / "1")
    with pytest.raises(UserError, match=OUT):
        refuse_links_out(snapshot)


def test_no_base_is_merged_into_through_such_a_link(hf_model: Path, secret: Path, tmp_path: Path) -> None:
    """What is named as --base is read by the same two functions in both packages."""
    base = tmp_path / "base"
    shutil.copytree(hf_model, base)
    (base / "generation_config.json").unlink()
    (base / "generation_config.json").symlink_to(secret)
    with pytest.raises(UserError, match=OUT):
        weights_of(base)
    with pytest.raises(UserError, match=OUT):
        companions.copy(base, tmp_path)
