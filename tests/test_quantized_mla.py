"""Attention with one matrix for each head (DeepSeek's latent attention): its packed layers are read as what they are.

mlx-lm quantizes each of the two halves of kv_b_proj where its width is a multiple of the group: in the tiny model
unembed_out (32 wide) is packed in groups of 32, embed_q (16 wide) stays dense.
"""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import mlx_lm.models
import numpy as np
import pytest
import tiny
from mlxtune_convert import fence
from mlxtune_convert.mlx_folder import MlxFolder

from mlxtune.adapter import attach
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.config.schema import LoraSection
from mlxtune.model import convert, reopened
from mlxtune.model.load import load
from mlxtune.ship import merge
from mlxtune.ship.artefacts import HuggingFace
from mlxtune.ship.export import ship
from mlxtune.ship.request import Request

IDS = mx.array([[5, 9, 77, 120, 33, 8, 250, 91]])
HALVES = ("embed_q", "unembed_out")
# How each of mlx-lm's layers that keep codes is read. The last two also turn what they multiply; nothing adapts them.
READ = {
    "QuantizedSwitchLinear": "itself",
    "QuantizedMultiLinear": "itself",
    "FusedQuantizedLinear": "as nn.QuantizedLinear, which it extends",
    "HadamardQuantizedLinear": "never",
    "HadamardQuantizedEmbedding": "never",
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mla")
    source = tiny.make_model(folder / "source", "deepseek_v3")
    convert.convert(str(source), folder / "model", convert.Quantization.of(8, 32, None))
    packed = [half for half in HALVES if f"model.layers.0.self_attn.{half}" in _packed(folder / "model")]
    assert packed == ["unembed_out"]
    return folder / "model"


def _packed(folder: Path) -> set[str]:
    names = MlxFolder.open(folder).tensors
    return {name.removesuffix(".scales") for name in names if name.endswith(".scales")}


def test_mlx_lm_has_no_other_layers_of_codes_than_those_that_are_known() -> None:
    found: set[str] = set()
    for file in Path(next(iter(mlx_lm.models.__path__))).glob("*.py"):
        found.update(re.findall(r"^class (\w*Quantized\w*(?:Linear|Embedding))\b", file.read_text(), re.MULTILINE))
    assert found == set(READ)


def test_a_half_that_is_packed_is_joined_with_a_half_that_is_not(quantized: Path, tmp_path: Path) -> None:
    """Every tensor of the export is the one that the convert package makes of the files without MLX."""
    ship(Request(quantized, None, tmp_path / "hf"), HuggingFace())
    assert fence.check(tmp_path / "hf", quantized).said == "41 tensors equal bit for bit"


@pytest.mark.parametrize("bits", [16, 4])
def test_a_quantized_model_is_fused_to_other_bits(bits: int, quantized: Path, tmp_path: Path) -> None:
    work = tmp_path / "fused"
    work.mkdir()
    merge.fuse(merge.open_merged(quantized, None), quantized, work, bits, None, None)
    reopened.check(work, quantized if bits == 16 else None)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_quantized_model_is_quantized_again(bits: int, quantized: Path, tmp_path: Path) -> None:
    out = convert.convert(
        str(quantized), tmp_path / "out", convert.Quantization.of(bits, 32 if bits < 16 else None, None)
    )
    before, after = (reopened.logits(load(str(path), read=False)) for path in (quantized, tmp_path / "out"))
    assert np.abs(after - before).max() <= (1e-4 if bits == 16 else 1.0) * np.abs(before).max()
    assert out.bits_per_weight == pytest.approx(_stored_bits(tmp_path / "out"))


def test_a_packed_half_is_trained_in_full_as_the_matrix_that_it_stands_for(quantized: Path) -> None:
    model = load(str(quantized), "float32").model
    before = np.array(model(IDS))
    attach.attach(
        model, AdapterPlan.of(model, LoraSection(targets=["q_a_proj"], train_also=["layers.0.self_attn.unembed_out"]))
    )
    assert attach.trained_tensors(model)["model.layers.0.self_attn.unembed_out.weight"].shape == (4, 16, 32)
    np.testing.assert_allclose(np.array(model(IDS)), before, atol=1e-5)


def _stored_bits(folder: Path) -> float:
    """Bits of all tensors in the files for each number of the dense matrices."""
    files = MlxFolder.open(folder)
    stored = sum(array.nbytes for file in folder.glob("*.safetensors") for array in mx.load(str(file)).values())
    return stored * 8 / files.parameters
