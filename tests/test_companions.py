"""The files that belong to a model beside its weights go along wherever it goes; its own code only where asked."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers
from mlxtune_convert.hf import companions

from mlxtune.data.template.tokenizer import load_tokenizer
from mlxtune.errors import UserError
from mlxtune.model import convert
from mlxtune.model.load import load
from mlxtune.ship.artefacts import FusedMlx, HuggingFace
from mlxtune.ship.export import ship
from mlxtune.ship.request import Request

PROCESSORS = {
    "preprocessor_config.json": {"image_processor_type": "Gemma3ImageProcessor"},
    "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor"},
}
DENSE = convert.Quantization.of(16, None, None)
MARKER = "it was run"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_every_vocabulary_file_of_transformers_tokenizers_is_carried(tmp_path: Path) -> None:
    """Their names, from transformers' own source."""
    root = Path(transformers.__file__).parent
    table = re.compile(r"VOCAB_FILES_NAMES = \{(.*?)\}", re.DOTALL)
    names = {
        name
        for file in root.glob("models/*/tokenization_*.py")
        for body in table.findall(file.read_text(encoding="utf-8"))
        for name in re.findall(r': "([\w.-]+)"', body)
    }
    names -= {"config.json"}
    assert {"spiece.model", "vocab.txt", "bpe.codes", "tokenizer.json", "source.spm"} <= names
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    for name in names | {"qwen.tiktoken"}:
        (tmp_path / "from" / name).write_text("{}")
    companions.copy(tmp_path / "from", tmp_path / "to")
    assert {path.name for path in (tmp_path / "to").iterdir()} == names | {"qwen.tiktoken"}


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 with its vision tower, processors, and the chat template where old processors kept it."""
    folder = tiny.make_model(tmp_path_factory.mktemp("vision") / "gemma3", "gemma3")
    settings = read(folder / "tokenizer_config.json")
    template = settings.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    for name, content in PROCESSORS.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def test_processors_go_along_in_convert_and_every_export(vision: Path, tmp_path: Path) -> None:
    convert.convert(str(vision), tmp_path / "mlx", DENSE)
    adapter = adapter_of(tmp_path / "mlx", tmp_path / "run")
    # Where --base is given, they are its own.
    shutil.copytree(vision, tmp_path / "base")
    edit(tmp_path / "base" / "processor_config.json", image_seq_length=9)
    ship(Request(tmp_path / "mlx", adapter, tmp_path / "hf", base=tmp_path / "base"), HuggingFace())
    ship(Request(tmp_path / "mlx", adapter, tmp_path / "fused"), FusedMlx())
    for folder, length in (("mlx", 4), ("fused", 4), ("hf", 9)):
        for name, content in PROCESSORS.items():
            own = {"image_seq_length": length} if name == "processor_config.json" else {}
            assert read(tmp_path / folder / name) == {**content, **own}
        assert load_tokenizer(tmp_path / folder).chat_template == tiny.CHATML


def adapter_of(model: Path, out: Path) -> Path:
    """An adapter as a run leaves it, which changes nothing."""
    from mlxtune.adapter import adapter_files, attach
    from mlxtune.adapter.adapter_files import ADAPTER_FILE
    from mlxtune.adapter.plan import AdapterPlan
    from mlxtune.config.schema import LoraSection
    from mlxtune.model.arrays import save_arrays

    loaded = load(str(model))
    spec = AdapterPlan.of(loaded.model, LoraSection(rank=2))
    attach.attach(loaded.model, spec)
    out.mkdir()
    save_arrays(out / ADAPTER_FILE, attach.trained_tensors(loaded.model))
    adapter_files.save_config(out, spec)
    return out


@pytest.fixture
def with_code(hf_model: Path, tmp_path: Path) -> Path:
    """The tiny llama with code of its own, which would leave a file behind if anything ran it."""
    folder = tmp_path / "model"
    shutil.copytree(hf_model, folder)
    maps = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit(folder / "config.json", auto_map=maps, custom_pipelines={"text-generation": {"impl": "own.Pipeline"}})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
    (folder / "processor_config.json").write_text('{"auto_map": {"AutoProcessor": "own.P"}, "kept": 1}')
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (folder / name).write_text(f"import pathlib\npathlib.Path({str(tmp_path / MARKER)!r}).touch()\n")
    return folder


SETTINGS = ("config.json", "tokenizer_config.json", "processor_config.json")


def test_code_is_left_out_with_the_keys_that_name_it_in_one_note(with_code: Path, tmp_path: Path) -> None:
    done = convert.convert(str(with_code), tmp_path / "mlx", DENSE)
    assert [note for note in done.notes if "code of its own" in note and "--trust-remote-code copies it" in note]
    adapter = adapter_of(tmp_path / "mlx", tmp_path / "run")
    shipped = ship(Request(tmp_path / "mlx", adapter, tmp_path / "hf", base=with_code), HuggingFace())
    assert shipped.notes == [convert.CODE_LEFT_OUT]
    for folder in (tmp_path / "mlx", tmp_path / "hf"):
        assert not list(folder.glob("*.py"))
        assert not companions.code_of(folder)
        assert read(folder / "processor_config.json") == {"kept": 1}
    assert "auto_map" not in (tmp_path / "mlx" / "mlxtune_source.json").read_text()
    assert not (tmp_path / MARKER).exists()


def test_code_is_copied_where_that_was_asked_for_and_never_run(with_code: Path, tmp_path: Path) -> None:
    result = tiny.done("convert", with_code, tmp_path / "mlx", "--bits", "16", "--trust-remote-code")
    assert "code" not in result.stderr
    adapter = adapter_of(tmp_path / "mlx", tmp_path / "run")
    tiny.done(
        "export", "--model", tmp_path / "mlx", "--adapter", adapter, "--to", "hf", "--out", tmp_path / "hf", *DATA
    )
    ship(Request(tmp_path / "mlx", adapter, tmp_path / "fused"), FusedMlx())
    for folder in (tmp_path / "mlx", tmp_path / "hf", tmp_path / "fused"):
        assert companions.code_of(folder) == list(SETTINGS)
        assert {path.name for path in folder.glob("*.py")} == {path.name for path in with_code.glob("*.py")}
    assert not (tmp_path / MARKER).exists()


DATA = ("--no-verify",)


def test_asking_for_code_that_a_model_does_not_name_is_an_error(hf_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tiny.refused(out, "convert", hf_model, out, "--trust-remote-code", expected=("has no effect", "names no code"))


def test_a_tokenizer_that_is_code_alone_is_refused_without_a_question(
    hf_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks on the terminal whether to run it, where it is not told."""
    shutil.copytree(hf_model, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "m" / "tokenization_own.py").write_text(f"open({str(tmp_path / MARKER)!r}, 'w')\n")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "n")
    with pytest.raises(UserError, match="the tokenizer needs code of its own"):
        load_tokenizer(tmp_path / "m")
    assert not asked
    assert not (tmp_path / MARKER).exists()
