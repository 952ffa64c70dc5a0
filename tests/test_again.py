"""What convert and fuse write is opened again before it gets its name; what does not run, or not alike, is not kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlxtune_convert.gguf import container
from mlxtune_convert.gguf.container import Writer
from safetensors.numpy import load_file, save_file
from test_companions import DENSE, adapter_of
from test_gguf_fuzz import model_bytes

from mlxtune.adapter import attach
from mlxtune.adapter.adapter_files import ADAPTER_FILE
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.config.schema import LoraSection
from mlxtune.errors import UserError
from mlxtune.model import convert, reopened
from mlxtune.model.arrays import named
from mlxtune.model.load import load, open_model
from mlxtune.ship.artefacts import FusedMlx
from mlxtune.ship.export import ship
from mlxtune.ship.request import Request


def poisoned(folder: Path, value: float) -> Path:
    """One number of the weights becomes `value`."""
    tensors = {name: np.array(array) for name, array in load_file(folder / "model.safetensors").items()}
    tensors["model.norm.weight"][3] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("target", [DENSE, convert.Quantization.of(4, 32, None)], ids=["16 bits", "4 bits"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_give_no_numbers_are_not_converted(
    value: float, target: convert.Quantization, hf_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(hf_model, tmp_path / "m")
    with pytest.raises(UserError, match=f"{tmp_path / 'out'}: the logits of 4 tokens are not finite"):
        convert.convert(str(poisoned(tmp_path / "m", value)), tmp_path / "out", target)
    tiny.nothing_written(tmp_path / "out")


def test_a_gguf_whose_weights_give_no_numbers_is_not_converted(tmp_path: Path) -> None:
    model_bytes(tmp_path / "whole.gguf")
    file = container.read(tmp_path / "whole.gguf")
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    for name, spoil in (("ok", False), ("bad", True)):
        with Writer(tmp_path / f"{name}.gguf", file.fields, shapes) as writer:
            for tensor in file.tensors.values():
                rows = np.array(file.rows(tensor.name))
                if spoil and tensor.name == "output_norm.weight":
                    rows[...] = np.nan
                writer.add(tensor.name, tensor.kind, rows)
    convert.convert(str(tmp_path / "ok.gguf"), tmp_path / "ok", convert.Quantization.of(None, None, None))
    with pytest.raises(UserError, match="logits of 4 tokens are not finite"):
        convert.convert(str(tmp_path / "bad.gguf"), tmp_path / "bad", convert.Quantization.of(None, None, None))
    tiny.nothing_written(tmp_path / "bad")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_theta": 77.0, "rope_parameters": None}, "computes other logits than"),
        ({"rms_norm_eps": 0.9}, "computes other logits than"),
        ({"num_attention_heads": 3}, "num_key_value_heads is 2, allowed is what divides"),
        ({"model_type": "gpt9"}, "mlx-lm has no model of type 'gpt9'"),
    ],
    ids=["rotary base", "epsilon", "heads", "type"],
)
def test_a_config_that_is_another_model_the_second_time_is_not_kept(
    changes: dict[str, Any], expected: str, hf_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Gemma 4 was once: converted without a word, and no later command could open it."""
    own = convert.write_config
    monkeypatch.setattr(
        convert, "write_config", lambda folder, config, *more: own(folder, {**config, **changes}, *more)
    )
    with pytest.raises(UserError, match=expected):
        convert.convert(str(hf_model), tmp_path / "out", DENSE)
    tiny.nothing_written(tmp_path / "out")


def test_a_fused_model_is_opened_again_without_a_proof_too(mlx_model: Path, tmp_path: Path) -> None:
    adapter = adapter_of(mlx_model, tmp_path / "run")
    ship(Request(mlx_model, adapter, tmp_path / "whole"), FusedMlx())
    factors = dict(mx.load(str(adapter / ADAPTER_FILE)))
    broken = {name: array + 1e30 for name, array in factors.items()}  # whose products are infinite
    mx.save_safetensors(str(adapter / ADAPTER_FILE), broken)
    with pytest.raises(UserError, match="logits of 4 tokens are not finite"):
        ship(Request(mlx_model, adapter, tmp_path / "fused"), FusedMlx())
    tiny.nothing_written(tmp_path / "fused")


def test_opening_again_takes_less_memory_than_the_model(tmp_path: Path) -> None:
    """Each weight is read when it is needed and forgotten: of 16 blocks some two are in memory at a time."""
    folder = tiny.make_model(tmp_path / "m", num_hidden_layers=16)
    total = sum(array.nbytes for array in named(open_model(folder)[0].parameters()).values())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    reopened.check(folder)
    assert mx.get_peak_memory() - before < 0.4 * total
    mx.reset_peak_memory()
    load(str(folder))
    assert mx.get_peak_memory() - before >= total  # as it is where all of them are read


def test_a_module_that_leaves_out_mlxs_own_start_can_be_trained(tmp_path: Path) -> None:
    """recurrent_gemma's Model does; freezing it raised an AttributeError."""
    shape = {"num_key_value_heads": 1, "lru_width": 64, "attention_window_size": 16}
    folder = tiny.make_model(tmp_path / "m", "recurrent_gemma", block_types=["recurrent", "attention"], **shape)
    model, _ = open_model(folder)
    attach.attach(model, AdapterPlan.of(model, LoraSection(rank=2)))
    trainable = named(model.trainable_parameters())
    assert trainable and all(name.rpartition(".")[2] in ("lora_a", "lora_b") for name in trainable)


def test_a_module_that_ends_the_program_is_one_line(hf_model: Path, tmp_path: Path) -> None:
    """mlx-lm's olmo prints, and calls sys.exit, where a package is missing."""
    shutil.copytree(hf_model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "model_type": "olmo"}))
    out = tmp_path / "out"
    expected = ("mlx-lm's module for models of type olmo does not work here (To run olmo install ai2-olmo",)
    tiny.refused(out, "convert", tmp_path / "m", out, expected=expected)
