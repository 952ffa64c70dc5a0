"""--force replaces what our commands can have written, and nothing else; nothing is written through a link."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
from mlxtune_convert import fence, files

from mlxtune.errors import UserError
from mlxtune.ship import verify

MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "README.md", "verification.json")
GGUF = ("tuned.gguf", "tuned.Modelfile")


def folder(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("mine")
    return path


def files_of(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("names", [MODEL, ADAPTER, GGUF, (*MODEL, "additional_chat_templates/tool_use.jinja")])
def test_a_model_an_adapter_or_an_export_is_replaced(names: tuple[str, ...], tmp_path: Path) -> None:
    place = folder(tmp_path / "out", *names, ".DS_Store")
    with files.new_folder(place, force=True) as work:
        (work / "config.json").write_text("new")
    assert files_of(place) == {"config.json": "new"}


@pytest.mark.parametrize(
    "names",
    [
        ("thesis.tex",),
        (*MODEL, "notes.txt"),
        (*MODEL, ".git/HEAD"),
        (*MODEL, "src/main.py"),
        (*MODEL, "additional_chat_templates.zip"),
        ("README.md", "LICENSE"),
        ("package.json", "config.json"),
        ("Documents/letter.odt", ".bashrc"),
    ],
    ids=lambda names: names[-1],
)
def test_a_folder_with_other_things_is_never_replaced(names: tuple[str, ...], tmp_path: Path) -> None:
    place = folder(tmp_path / "out", *names)
    before = files_of(place)
    for force in (True, False):
        with pytest.raises(UserError) as refused, files.new_folder(place, force=force):
            raise AssertionError("nothing may begin")
        assert "which mlxtune did not write" in str(refused.value) or "already exists" in str(refused.value)
        assert "--force" not in (refused.value.hint or "")
    assert files_of(place) == before and os.listdir(tmp_path) == ["out"]


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    folder(tmp_path, "thesis.doc")
    with pytest.raises(UserError, match="is a file"), files.new_folder(tmp_path / "thesis.doc", force=True):
        pass
    assert files_of(tmp_path) == {"thesis.doc": "mine"}


def test_the_command_leaves_a_home_alone(hf_model: Path, tmp_path: Path) -> None:
    home = folder(tmp_path / "home", ".ssh/id_ed25519", "Documents/letter.odt")
    result = tiny.mlxtune("convert", hf_model, home, "--force")
    tiny.one_clear_line(result, f"{home} holds .ssh, which mlxtune did not write", "Choose another folder.")
    assert files_of(home) == {".ssh/id_ed25519": "mine", "Documents/letter.odt": "mine"}


def test_no_link_waits_under_a_temporary_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever knows the process and the name cannot know the rest; and if so, the file is not opened through it."""
    folder(tmp_path, "target")
    for what in ("partial", "old", "parts"):
        (tmp_path / f".out.{what}-{os.getpid()}").symlink_to(tmp_path / "target")
    with files.new_file(tmp_path / "out") as file:
        file.write("rows")
    assert not (tmp_path / "out").is_symlink() and (tmp_path / "out").read_text() == "rows"
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0badcafe")
    (tmp_path / f".next.partial-{os.getpid()}-0badcafe").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError), files.new_file(tmp_path / "next") as file:
        file.write("rows")
    assert (tmp_path / "target").read_text() == "mine" and not (tmp_path / "next").exists()


def test_json_that_python_cannot_read_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text in ("[" * 200_000, '{"a": ' * 100_000, f'{{"a": {"9" * 10_000}}}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"config\.json: (its lists|a number)|not valid JSON"):
            files.read_json(path, "a model")


def test_what_a_proof_leaves_beside_an_export_is_replaced_with_it(tmp_path: Path) -> None:
    """In a folder of its own, and beside a GGUF file."""
    for number in (1, 2):
        with files.new_folder(tmp_path / "out", force=number == 2) as work:
            (work / "config.json").write_text(f"{number}")
            verify.write_report(work, {"verdict": "passed", "number": number})
        with files.new_artefact(tmp_path / "gguf" / "tuned.gguf", "model.gguf", force=number == 2) as work:
            (work / "model.gguf").write_text(f"{number}")
            verify.write_report(work, {"verdict": "passed", "number": number})
    assert (tmp_path / "out" / "config.json").read_text() == "2" == (tmp_path / "gguf" / "tuned.gguf").read_text()
    assert files.not_ours(tmp_path / "out") == files.not_ours(tmp_path / "gguf") == ""
    assert len(files_of(tmp_path / "out")) > 1 and len(files_of(tmp_path / "gguf")) > 1


def test_what_lies_beside_a_gguf_file_is_replaced_by_force_alone(tmp_path: Path) -> None:
    folder(tmp_path, "tuned.Modelfile", "tuned.notes.txt")
    with (
        pytest.raises(UserError, match=r"tuned\.Modelfile already exists"),
        files.new_artefact(tmp_path / "tuned.gguf", "model.gguf") as work,
    ):
        for name in ("model.gguf", "Modelfile"):
            (work / name).write_text("new")
    assert files_of(tmp_path) == {"tuned.Modelfile": "mine", "tuned.notes.txt": "mine"}


def test_an_adapter_never_replaces_the_model_that_it_is_for(mlx_model: Path, run: Path, tmp_path: Path) -> None:
    """Named on the command line, or by the adapter itself."""
    model = tmp_path / "model"
    shutil.copytree(mlx_model, model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    tiny.done("export", "--model", model, "--adapter", run, "--to", "peft", "--out", tmp_path / "peft", "--no-verify")
    options = ("convert", tmp_path / "peft", model, "--force")
    tiny.one_clear_line(tiny.mlxtune(*options, "--base", model), f"{model} is the source itself")
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    named = {**settings, "base_model_name_or_path": str(model)}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(named))
    tiny.one_clear_line(tiny.mlxtune(*options), f"{model} is the source itself")
    for base in (model, None):
        with pytest.raises(UserError, match="is the source itself"):
            fence.to_mlx(tmp_path / "peft", model, base, force=True)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
