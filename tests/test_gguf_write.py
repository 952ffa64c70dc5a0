"""What a GGUF file keeps of the model that it is made of, and how often that model is opened for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
from mlxtune_convert.gguf import container, ggml
from safetensors.numpy import load_file, save_file

from mlxtune.data.chat.masking import Example
from mlxtune.model import convert
from mlxtune.ship import merge
from mlxtune.ship.artefacts import Artefact, HuggingFace, Peft
from mlxtune.ship.export import ship
from mlxtune.ship.gguf import Gguf, GgufAdapter
from mlxtune.ship.request import Request


@pytest.mark.parametrize(("type_", "number"), [("keep", 15), ("q8_0", 15), ("f16", 1)])
def test_a_file_that_goes_back_as_it_came_keeps_its_own_number(type_: str, number: int, tmp_path: Path) -> None:
    """general.file_type 15 (a mixture's) on tensors that are Q8_0 and float32: it stays as long as these do."""
    model = tiny.make_model(tmp_path / "hf", dtype="float16")
    ship(Request(model, None, tmp_path / "first.gguf"), Gguf("q8_0"))
    file = container.read(tmp_path / "first.gguf")
    fields = {**file.fields, "general.file_type": container.Field.of(15)}
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    with container.Writer(tmp_path / "came.gguf", fields, shapes) as writer:
        for name, tensor in file.tensors.items():
            writer.add(name, tensor.kind, file.rows(name))
    convert.convert(str(tmp_path / "came.gguf"), tmp_path / "mlx", convert.Quantization.of(None, None, None))
    ship(Request(tmp_path / "mlx", None, tmp_path / "back.gguf"), Gguf(type_))
    assert container.read(tmp_path / "back.gguf").get("general.file_type") == number


def test_a_zero_keeps_its_sign(tmp_path: Path) -> None:
    """-0.0 in a norm and in a matrix: the file holds the very bits of the folder."""
    model = tiny.make_model(tmp_path / "hf")
    tensors = load_file(model / "model.safetensors")
    names = {"model.norm.weight": "output_norm.weight", "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight"}
    for name in names:
        tensors[name].reshape(-1)[3] = -0.0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    ship(Request(model, None, tmp_path / "m.gguf"), Gguf("f32"))
    file = container.read(tmp_path / "m.gguf")
    for name, theirs in names.items():
        assert file.rows(theirs).tobytes() == tensors[name].tobytes()


@pytest.mark.parametrize(
    ("form", "on_base", "proven", "expected"),
    [
        (Gguf(), True, False, 2),  # the base, and the model whose shapes it must have
        (Gguf(), True, True, 3),  # and, without llama.cpp, the base again to read back
        (Gguf("q8_0"), False, True, 2),
        (GgufAdapter(), False, True, 1),  # its factors are read, and not released
        (HuggingFace(), True, False, 2),
        (Peft(), False, False, 1),
    ],
)
def test_a_model_is_opened_once_for_each_reading(
    form: Artefact,
    on_base: bool,
    proven: bool,
    expected: int,
    hf_model: Path,
    mlx_model: Path,
    run: Path,
    held_out: Sequence[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Path] = []
    real = merge.open_model
    monkeypatch.setattr(merge, "open_model", lambda path: [opened.append(path), real(path)][1])
    monkeypatch.setattr(ggml, "library_file", lambda: None)
    base = hf_model if on_base else None
    ship(Request(mlx_model, run, tmp_path / "out", base, examples=held_out if proven else None), form)
    assert len(opened) == expected, opened
