"""MLX model folders without MLX: every quantization is the matrix that MLX makes of it, and leaves for transformers."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlxtune_convert import checks, fence
from mlxtune_convert.errors import UserError
from mlxtune_convert.mlx_folder import CHUNK_ROWS, MlxFolder
from safetensors.numpy import load_file, save_file
from test_variants import adapted

from mlxtune.model.arrays import to_numpy
from mlxtune.model.convert import Quantization, convert
from mlxtune.ship.artefacts import HuggingFace
from mlxtune.ship.export import ship
from mlxtune.ship.request import Request

PARTS = ("weight", "scales", "biases")
FORMS = [
    *(("affine", bits, group) for bits in (1, 2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    *(("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)),
]


def folder_of(root: Path, tensors: dict[str, np.ndarray], quantization: dict[str, Any]) -> MlxFolder:
    """An MLX folder of these tensors."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps({"model_type": "llama", "quantization": quantization}))
    save_file(tensors, root / "model.safetensors", {"format": "mlx"})
    return MlxFolder.open(root)


@pytest.mark.parametrize("shape", [(6, 256), (3, 4, 256)], ids=str)
def test_every_mode_and_width_is_the_matrix_that_mlx_makes_of_the_codes(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Linear layers and stacked experts, scales in bfloat16: float32 bit for bit, and its rounding to 16 bits. Each
    form is an entry of its own in config.json, as mixed recipes write them: where it names no mode, it is affine."""
    weight = mx.random.normal(shape, key=mx.random.key(3)).astype(mx.bfloat16)
    tensors, table, wanted = {}, {}, {}
    for mode, bits, group in FORMS:
        path = f"{mode}.{bits}.{group}"
        parts = mx.quantize(weight, group, bits, mode)
        table[path] = {"group_size": group, "bits": bits, **({} if mode == "affine" else {"mode": mode})}
        tensors |= {
            f"{path}.{part}": to_numpy(a) for part, a in zip(("weight", "scales", "biases"), parts, strict=False)
        }
        scales = [part.astype(mx.float32) if mode == "affine" else part for part in parts[1:]]
        whole = mx.dequantize(parts[0], *scales, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
        wanted[path] = np.array(whole)
    folder = folder_of(tmp_path / "model", tensors, {"group_size": 16, "bits": 4, "mode": "nvfp4", **table})
    assert folder.dtype == ml_dtypes.bfloat16 and folder.parameters == len(FORMS) * weight.size
    for path, array in wanted.items():
        assert folder.shapes[path] == shape
        assert folder.matrix(path, np.dtype(np.float32)).tobytes() == array.tobytes(), path
    half = dict(folder.dense(np.dtype(np.float16)))
    assert {name.removesuffix(".weight") for name in half} == wanted.keys()
    assert all(half[f"{path}.weight"].tobytes() == array.astype(np.float16).tobytes() for path, array in wanted.items())


def test_a_scale_of_a_whole_tensor_and_many_rows_are_what_mlx_makes_of_them(tmp_path: Path) -> None:
    """nvfp4's global scale, which multiplies; and more rows than are made dense at a time."""
    weight = mx.random.normal((CHUNK_ROWS + 5, 32), key=mx.random.key(4)) * 50
    scale = mx.abs(weight).max()
    parts = mx.quantize(weight, 16, 4, "nvfp4", global_scale=scale)
    whole = mx.dequantize(*parts, group_size=16, bits=4, mode="nvfp4", dtype=mx.float32, global_scale=scale)
    names = ("weight", "scales", "global_scale")
    tensors = {f"layer.{name}": to_numpy(part) for name, part in zip(names, (*parts, scale.reshape(1)), strict=True)}
    folder = folder_of(tmp_path / "model", tensors, {"group_size": 16, "bits": 4, "mode": "nvfp4"})
    assert folder.matrix("layer", np.dtype(np.float32)).tobytes() == np.array(whole).tobytes()


@pytest.mark.parametrize("lost", ["weight", "scales"])
def test_a_layer_that_lost_a_part_is_refused_and_not_left_out(lost: str, tmp_path: Path) -> None:
    parts = dict(zip(PARTS, mx.quantize(mx.ones((4, 64)), 32, 4), strict=True))
    del parts[lost]
    tensors = {f"proj.{part}": to_numpy(array) for part, array in parts.items()}
    with pytest.raises(UserError, match=f"proj has a .* tensor and no {lost}"):
        folder_of(tmp_path / "model", tensors, {"group_size": 32, "bits": 4})


def test_an_entry_that_cannot_be_the_tensors_is_refused_by_the_layers_name(tmp_path: Path) -> None:
    """Another width or mode than the codes have: mlx-lm guesses from the model's widths, which are not known here."""
    parts = mx.quantize(mx.ones((4, 64)), 32, 4)
    tensors = {f"layer.{name}": to_numpy(a) for name, a in zip(PARTS, parts, strict=True)}
    for number, entry in enumerate(({"bits": 8}, {"group_size": 64}, {"mode": "mxfp4"}, {"mode": "new"})):
        folder = folder_of(tmp_path / str(number), tensors, {"group_size": 32, "bits": 4, **entry})
        with pytest.raises(UserError, match="layer is not quantized as config"):
            folder.matrix("layer", np.dtype(np.float32))


EXPORTS: dict[str, tuple[str, Quantization, str | None]] = {
    "experts, 4 bits": ("qwen3_moe", Quantization.of(4, 32, None), None),
    "norms and prefixes, 6 bits": ("qwen3_5_text", Quantization.of(6, None, None), "bfloat16"),
    "turned, mxfp8": ("gpt2", Quantization.of(8, None, "mxfp8"), None),
}


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_quantized_folder_becomes_what_mlxtune_exports(kind: str, tmp_path: Path) -> None:
    """Every tensor bit for bit, the same config.json; and `check` says so, of the merged export too."""
    family, target, dtype = EXPORTS[kind]
    model = tmp_path / "model"
    convert(str(tiny.make_model(tmp_path / "hf", family)), model, target, dtype)
    ship(Request(model, None, tmp_path / "theirs"), HuggingFace())
    said = fence.to_hf(model, tmp_path / "ours").said
    assert said.startswith(f"a Hugging Face model in {dtype or 'float32'}, ")
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert (array.dtype, array.tobytes()) == (right[name].dtype, right[name].tobytes()), name
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    assert configs[0] == configs[1] and "quantization" not in configs[0]
    assert (tmp_path / "ours" / "tokenizer.json").is_file()
    assert fence.check(tmp_path / "theirs", model).said == f"{len(left)} tensors equal bit for bit"
    adapted(model, tmp_path / "run", targets="all-linear")
    ship(Request(model, tmp_path / "run", tmp_path / "merged"), HuggingFace())
    said = fence.check(tmp_path / "merged", model, adapter=tmp_path / "run").said
    assert said.startswith(("0 ", f"{len(left)} ")) or "within rounding" in said
    with pytest.raises(UserError, match=rf"\d+ of {len(left)} tensors are not those"):
        fence.check(tmp_path / "merged", model)
    adapted(model, tmp_path / "other", targets="all-linear", alpha=7)
    with pytest.raises(UserError, match=rf"\d+ of {len(left)} tensors are not those"):
        fence.check(tmp_path / "merged", model, adapter=tmp_path / "other")


@pytest.mark.parametrize(
    "section", [{"variant": "dora"}, {"targets": ["q_proj"], "train_also": ["embeddings", "norms"]}]
)
def test_a_merged_export_is_checked_within_the_rounding_of_its_type(
    section: dict[str, Any], mlx_model: Path, tmp_path: Path
) -> None:
    """DoRA's lengths, and layers that were trained in full, in 16 bits."""
    adapted(mlx_model, tmp_path / "run", **section)
    ship(Request(mlx_model, tmp_path / "run", tmp_path / "merged"), HuggingFace("bfloat16"))
    fence.check(tmp_path / "merged", mlx_model, adapter=tmp_path / "run")
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = (tensors[name].astype(np.float32) * 1.02).astype(ml_dtypes.bfloat16)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"1 of \d+ tensors .*{name}"):
        fence.check(tmp_path / "merged", mlx_model, adapter=tmp_path / "run")


def test_a_lost_number_is_no_rounding(tmp_path: Path) -> None:
    """What became infinite, or no number, differs without bound."""
    wanted = np.full((2, 2), 3.0, np.float16)
    for wrong in (np.inf, np.nan):
        found = wanted.copy()
        found[1, 1] = wrong
        result = checks.compare({"a": lambda found=found: found}, [("a", wanted)], summed=True)
        assert (result.equal, result.near, result.wrong, result.largest) == (0, 0, ["a"], np.inf)


def test_the_towers_of_a_wrapper_come_from_its_original(tmp_path: Path) -> None:
    """The text part out of MLX's codes, the rest as the original has it; without it one line says what is missing."""
    hf, model, out = (tmp_path / name for name in ("hf", "model", "out"))
    tiny.make_model(hf, "gemma3")
    convert(str(hf), model, Quantization.of(4, 32, None))
    with pytest.raises(UserError, match="lacks tensors that transformers needs"):
        fence.to_hf(model, out)
    tiny.nothing_written(out)
    fence.to_hf(model, out, hf)
    original, ours = load_file(hf / "model.safetensors"), load_file(out / "model.safetensors")
    assert ours.keys() == original.keys()
    towers = [name for name in original if "vision_tower" in name or "multi_modal_projector" in name]
    assert towers and all(ours[name].tobytes() == original[name].tobytes() for name in towers)
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert 0 < np.abs(ours[name] - original[name]).max() < 0.02
    assert fence.check(out, model).said.endswith(f"{len(towers)} that MLX does not have were not compared")


def test_shards_are_read_as_one_model_and_a_folder_of_another_kind_is_refused(mlx_model: Path, tmp_path: Path) -> None:
    """Codes in one file, their scales in another; and without mlxtune's own file, as mlx-lm leaves a folder."""
    sharded = tmp_path / "sharded"
    shutil.copytree(mlx_model, sharded)
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    (sharded / "mlxtune_source.json").unlink()
    parts = [{n: a for n, a in tensors.items() if n.endswith(".scales") is kind} for kind in (False, True)]
    table = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(part, sharded / file, {"format": "mlx"})
        table |= dict.fromkeys(part, file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    fence.to_hf(sharded, tmp_path / "ours")
    assert (
        not {"quantization", "quantization_config"} & json.loads((tmp_path / "ours" / "config.json").read_text()).keys()
    )
    fence.to_hf(mlx_model, tmp_path / "whole")
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "whole"))
    assert {name: a.tobytes() for name, a in left.items()} == {name: a.tobytes() for name, a in right.items()}
    assert len(left) == 21
    with pytest.raises(UserError, match="no MLX model folder"):
        fence.to_hf(tmp_path / "ours", tmp_path / "again")


ABSURD = (None, True, 3, -1, 1e300, "x", "", [], [1], {}, {"a": 1}, [[]], 10**30, 0, "4", [None])


def mutated(draw: random.Random, value: Any, outer: bool = True) -> Any:
    """A JSON value with one part of it lost or absurd."""
    if not isinstance(value, dict) or not value or not (outer or draw.random() < 0.6):
        return draw.choice(ABSURD)
    key = draw.choice(list(value))
    if draw.random() < 0.2:
        return {name: part for name, part in value.items() if name != key}
    return {**value, key: mutated(draw, value[key], False)}


def test_absurd_configurations_are_refused_or_carried_and_leave_nothing_half(tmp_path: Path) -> None:
    """One key of one file lost or of another type, 40 times: never an exception of another kind."""
    hf, whole = tmp_path / "hf", tmp_path / "whole"
    convert(str(tiny.make_model(hf, "qwen3_moe")), whole / "model", Quantization.of(4, 32, None))
    adapted(whole / "model", whole / "run", targets="all-linear")
    fence.to_peft(whole / "run", whole / "peft", whole / "model")
    fence.to_hf(whole / "model", whole / "hf")
    files = ("model/config.json", "model/mlxtune_source.json", "run/adapter_config.json", "peft/adapter_config.json")
    ends = {"done": 0, "refused": 0}
    for seed in range(40):
        draw = random.Random(seed)
        at, out = tmp_path / "at", tmp_path / "out"
        shutil.copytree(whole, at)
        file = at / draw.choice((*files, "hf/config.json"))
        file.write_text(json.dumps(mutated(draw, json.loads(file.read_text()))))
        base = draw.choice([at / "model", at / "model" / "config.json"])
        for step in (
            lambda at=at, out=out, base=base: fence.to_peft(at / "run", out, base),
            lambda at=at, out=out, base=base: fence.to_mlx(at / "peft", out, base),
            lambda at=at, out=out: fence.to_hf(at / "model", out),
            lambda at=at, base=base: fence.check(at / "peft", at / "run", base),
            lambda at=at: fence.check(at / "hf", at / "model"),
        ):
            try:
                step()
                ends["done"] += 1
                shutil.rmtree(out, ignore_errors=True)
            except UserError:
                ends["refused"] += 1
                tiny.nothing_written(out)
        shutil.rmtree(at)
    assert ends["done"] > 50 and ends["refused"] > 15, ends
