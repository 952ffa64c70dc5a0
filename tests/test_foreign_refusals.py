"""What cannot be read is refused by its name, with what to take instead; what only `convert` reads is refused by every
other command with that as the next step; torn tensors are named.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import HfApi, ModelInfo, constants
from mlxtune_convert.errors import UserError
from mlxtune_convert.foreign.folder import write
from mlxtune_convert.foreign.method import of_folder
from mlxtune_convert.foreign.original import original
from safetensors.torch import load_file, save_file
from test_foreign_formats import AWQ, BNB, FORMS, FP8, GPTQ, INT4, MODELOPT, WEIGHT, opened

from mlxtune.model import hub
from mlxtune.model.convert import Quantization, convert
from mlxtune.model.load import load, open_model
from mlxtune.ship.merge import open_merged

NAMED = {
    "hqq": "HQQ",
    "torchao": "torchao",
    "quanto": "Quanto",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "eetq": "EETQ",
    "bitnet": "BitNet",
    "fbgemm_fp8": "FBGEMM fp8",
    "spqr": "SpQR",
    "higgs": "HIGGS",
    "auto-round": "AutoRound",
    "quark": "Quark",
    "some_new_one": "some_new_one",
}
VARIANTS = {
    "GPTQ in the packing 'marlin'": {**GPTQ, "checkpoint_format": "marlin"},
    "GPTQ in the packing 'gptq_p'": {**GPTQ, "checkpoint_format": "gptq_p"},
    "AWQ in the packing 'gemv'": {**AWQ, "version": "GEMV"},
    "AWQ in the packing 'gemv_fast'": {**AWQ, "version": "gemv_fast"},
    "AWQ in the packing 'exllama'": {**AWQ, "version": "exllama"},
    "AWQ in the packing 'gemm' with 3 bits": {**AWQ, "bits": 3},
    "compressed-tensors' format 'marlin-24'": {**INT4, "format": "marlin-24"},
    "compressed-tensors with sparsity 'sparse-24-bitmask'": {
        **INT4,
        "sparsity_config": {"format": "sparse-24-bitmask"},
    },
    "compressed-tensors with rotated weights": {**INT4, "transform_config": {"config_groups": {"R1": {}}}},
    "ModelOpt's W4A8_AWQ": {**MODELOPT, "quant_algo": "W4A8_AWQ"},
}


def folder_of(form: str, folder: Path, **config: Any) -> Path:
    """One module in one of the forms."""
    packer, settings, _ = FORMS[form]
    tensors, _ = packer(WEIGHT)
    named = {f"model.layers.0.up_proj.{part}": tensor for part, tensor in tensors.items()}
    return foreign.written(folder, named, settings, **config)


def declare(folder: Path, settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


@pytest.mark.parametrize("method", NAMED)
def test_a_method_that_cannot_be_read_is_named(method: str, tmp_path: Path) -> None:
    folder = folder_of("fp8 rows", tmp_path / "m")
    declare(folder, {"quant_method": method})
    for action in (lambda: opened(folder), lambda: open_model(folder)):
        with pytest.raises(UserError, match=f"is quantized with {NAMED[method]}, which cannot be read") as caught:
            action()
        assert caught.value.hint == "Take the unquantized original, with 16-bit weights."


@pytest.mark.parametrize("said", VARIANTS)
def test_a_packing_that_cannot_be_read_is_named(said: str, tmp_path: Path) -> None:
    folder = folder_of("gptq", tmp_path / "m")
    declare(folder, VARIANTS[said])
    with pytest.raises(UserError, match=said) as caught:
        opened(folder)
    assert "cannot be read" in caught.value.message
    assert "unquantized original" in caught.value.hint


@pytest.mark.parametrize(
    ("card", "config", "name"),
    [
        ("---\nbase_model: Qwen/Qwen3-8B\ntags: [x]\n---\n# Text\n", {}, "Qwen/Qwen3-8B"),
        ("---\nlicense: mit\nbase_model:\n- acme/one-AWQ\n- acme/one\n---\n", {}, "acme/one"),
        ('---\nbase_model: ["acme/one"]\n---\n', {}, "acme/one"),
        ("---\nbase_model: acme/one-GPTQ\n---\n", {"_name_or_path": "acme/one"}, "acme/one"),
        ("---\nbase_model: acme/one-bnb-4bit\n---\n", {"_name_or_path": "/data/models/one"}, ""),
        ("# base_model: acme/one\n", {}, ""),
        ("", {"_name_or_path": "acme/one-fp8"}, ""),
    ],
)
def test_the_original_is_named_where_the_files_tell_it(
    card: str, config: dict[str, Any], name: str, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert original(tmp_path) == name


def test_the_command_names_method_and_original_in_one_line(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "src")
    declare(folder, {"quant_method": "hqq", "quant_config": {}})
    (folder / "README.md").write_text("---\nbase_model: acme/whole\n---\n")
    expected = ("is quantized with HQQ, which cannot be read", "Take the unquantized original: acme/whole.")
    tiny.refused(tmp_path / "mlx", "convert", folder, tmp_path / "mlx", expected=expected)


@pytest.mark.parametrize(
    ("card", "hint"),
    [
        ({"base_model": "acme/whole"}, "Take the unquantized original: acme/whole."),
        ({"base_model": ["acme/one-fp8", "acme/one"]}, "Take the unquantized original: acme/one."),
        (None, "Take the unquantized original, with 16-bit weights."),
    ],
)
def test_on_the_hub_it_is_refused_before_the_weights_are_fetched(
    card: Any, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "hqq"}}
    info = ModelInfo(id="acme/tiny-hqq", config=config, cardData=card, siblings=[], tags=[])
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    with pytest.raises(UserError, match="acme/tiny-hqq is quantized with HQQ, which cannot be read") as caught:
        hub.resolve("acme/tiny-hqq")
    assert caught.value.hint == hint
    info.config = {"quantization_config": {"quant_method": "awq"}}
    with pytest.raises(UserError, match=r"has no model\*.safetensors"):  # read: the next thing that is wrong
        hub.resolve("acme/tiny-hqq")


@pytest.fixture(scope="module")
def of_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.make_model(tmp_path_factory.mktemp("fp8") / "src")
    foreign.quantized(folder, foreign.fp8_rows, FP8)
    return folder


def test_other_commands_than_convert_say_the_next_step(of_fp8: Path, data: Path, tmp_path: Path) -> None:
    expected = ("is quantized with fp8: that is read by `mlxtune convert` alone", f"mlxtune convert {of_fp8} OUT")
    out = tmp_path / "out"
    tiny.refused(out, "train", "--model", of_fp8, "--data", data, "--out", out, expected=expected)


@pytest.mark.parametrize("opens", [lambda path: load(str(path)), open_model, lambda path: open_merged(path, None)])
def test_whatever_opens_a_model_refuses_it(opens: Callable[[Path], Any], of_fp8: Path) -> None:
    """generate, eval and chat; export's and train's plans; fuse and the bases of exports."""
    with pytest.raises(UserError, match="is quantized with fp8: that is read by `mlxtune convert` alone"):
        opens(of_fp8)


@pytest.mark.parametrize(
    ("form", "declared", "method"),
    [
        ("fp8 rows", None, "fp8"),
        ("fp8 rows", {"compression_config": INT4}, "compressed-tensors"),
        ("fp8 rows", {"text_config": {"quantization_config": FP8}}, "fp8"),
        ("bnb nf4", None, "bitsandbytes"),
        ("bnb nf4", {"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ("bnb int8", None, "bitsandbytes"),
        ("gptq", {"quantize_config.json": {"bits": 4, "group_size": 32}}, "gptq"),
        ("awq", {"quant_config.json": {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}}, "awq"),
        ("modelopt nvfp4", {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}}, "modelopt"),
        ("gptq", None, ""),
        ("fp8 rows", {"quantization": {"group_size": 64, "bits": 4}}, None),
    ],
)
def test_the_method_is_found_wherever_it_is_declared_or_shown(
    form: str, declared: dict[str, Any] | None, method: str | None, tmp_path: Path
) -> None:
    packer, _, _ = FORMS[form]
    tensors, means = packer(WEIGHT)
    files = {name: value for name, value in (declared or {}).items() if name.endswith(".json")}
    config = {name: value for name, value in (declared or {}).items() if name not in files}
    folder = foreign.written(tmp_path / "m", {f"a.{part}": tensor for part, tensor in tensors.items()}, None, **config)
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    found = of_folder(folder, json.loads((folder / "config.json").read_text()))
    assert (found and found.method) == method
    if method:
        (part,) = opened(folder).found.parts
        np.testing.assert_allclose(part.dense(np.dtype(np.float32)), means, rtol=3e-7, atol=1e-12)
    if method == "":
        with pytest.raises(UserError, match="a method that no file names"):
            opened(folder)


def test_a_declaration_that_is_no_object_is_one_clear_line(tmp_path: Path) -> None:
    folder = folder_of("fp8 rows", tmp_path / "m")
    declare(folder, "fp8")
    with pytest.raises(UserError, match=r"config.json: quantization_config is 'fp8', allowed is an object"):
        open_model(folder)


def lose(*endings: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(endings)]:
            del tensors[name]

    return change


def put(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        (name,) = [name for name in tensors if name.endswith(ending)]
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def spoiled(scale: torch.Tensor) -> torch.Tensor:
    flat = scale.clone().float().reshape(-1)
    flat[-1] = float("nan")
    return flat.reshape(scale.shape).to(scale.dtype)


@pytest.mark.parametrize(
    ("form", "change", "named"),
    [
        ("fp8 rows", lose("weight_scale"), "up_proj.weight is F8_E4M3, and its scale is missing"),
        ("fp8 rows", lose(".weight"), "up_proj.weight_scale belongs to a quantized weight that is not there"),
        ("fp8 rows", put("weight_scale", spoiled), "up_proj.weight_scale holds a scale that is no finite number"),
        ("fp8 rows", put("weight_scale", lambda t: t[:-1]), "up_proj.weight_scale is F32 [95, 1]"),
        ("fp8 rows", put(".weight", lambda t: t.view(torch.uint8).fill_(127).view(t.dtype)), "not finite"),
        ("fp8 blocks", put("scale_inv", lambda t: t[:, :-1]), "weight_scale_inv is F32 [2, 1]"),
        ("compressed int4", lose("weight_shape"), "has no model.layers.0.up_proj.weight_shape"),
        ("compressed int4", put("weight_packed", lambda t: t[:, :-1]), "no width in the config packs 128 columns so"),
        ("compressed int4", put("weight_scale", lambda t: t[:, :-1]), "the weight is 96 x 128"),
        ("compressed int4 with zero points", put("zero_point", lambda t: t[:-1]), "for 96 rows and 4 groups"),
        ("compressed int4, act-order", put("g_idx", lambda t: t + 9), "names a group that is not there"),
        ("compressed int8", put("zero_point", lambda t: t[:-1]), "weight_zero_point is I8 [95, 1]"),
        ("compressed nvfp4", lose("global_scale"), "weight_packed has no"),
        ("compressed mxfp4", put("weight_scale", lambda t: t.fill_(255)), "no finite number"),
        ("modelopt nvfp4", put("weight_scale", lambda t: t[:, :-1]), "weight_scale is F8_E4M3 [96, 7]"),
        ("bnb nf4 nested", lose("nested_absmax"), "nested_quant_map belongs to a quantized weight"),
        ("bnb nf4", put("absmax", lambda t: t[:-1]), "12288 weights in blocks of 64"),
        ("bnb nf4", put("weight", lambda t: t[:-1]), "says [96, 128]"),
        ("bnb nf4", put("bitsandbytes__nf4", lambda t: t[:-4]), "does not describe a weight"),
        ("bnb nf4", lose("quant_map"), "has no model.layers.0.up_proj.weight.quant_map"),
        ("bnb int8", put("weight_format", lambda t: t + 2), "tiled for a GPU"),
        ("gptq", lose("qzeros"), "up_proj has no model.layers.0.up_proj.qzeros"),
        ("gptq", put("scales", lambda t: t[:, :-1]), "up_proj.scales is F16 [4, 95]"),
        ("gptq", put("scales", spoiled), "up_proj.scales holds a scale that is no finite number"),
        ("gptq", put("g_idx", lambda t: t[:-1]), "g_idx is I32 [127]"),
        ("gptq", put("g_idx", lambda t: t - 1), "names a group that is not there: model.layers.0.up_proj has 4"),
        ("gptq", put("qweight", lambda t: t.float()), "qweight must be int32 with 2 axes: it is F32 [16, 96]"),
        ("awq", put("qzeros", lambda t: t[:, :-1]), "up_proj.qzeros is I32 [4, 11]"),
    ],
)
def test_a_torn_tensor_is_named(
    form: str, change: Callable[[dict[str, torch.Tensor]], None], named: str, tmp_path: Path
) -> None:
    folder = folder_of(form, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as caught:
        (tmp_path / "out").mkdir()
        write(opened(folder), tmp_path / "out")
    assert named in caught.value.message
    assert str(folder) in caught.value.message
    assert "\n" not in caught.value.message and caught.value.hint


def test_numbers_too_large_for_the_type_are_an_error_and_another_type_is_named(tmp_path: Path) -> None:
    tensors, _ = foreign.fp8_rows(WEIGHT)
    named = {"a.weight": tensors["weight"], "a.weight_scale": tensors["weight_scale"] * 1e8}
    folder = foreign.written(tmp_path / "m", named, FP8)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="too large for float16") as caught:
        write(opened(folder, dtype="float16"), tmp_path / "out")
    assert "--dtype bfloat16" in caught.value.hint


def test_a_type_that_mlx_lm_does_not_know_is_refused_before_hours_of_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxtune.model.convert.write", lambda *_: pytest.fail("dequantized first"))
    folder = tiny.make_model(tmp_path / "src")
    foreign.quantized(folder, foreign.fp8_rows, FP8)
    for change, said in (
        ({"model_type": "gpt9"}, "no model of type 'gpt9'"),
        ({"model_type": None}, "names no type of model"),
    ):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=said):
            convert(str(folder), tmp_path / "mlx", Quantization.of(None, None, None))
        tiny.nothing_written(tmp_path / "mlx")


MUTATIONS: list[Callable[[torch.Tensor, random.Random], torch.Tensor]] = [
    lambda t, _: t.reshape(-1)[: max(t.numel() - 1, 0)],
    lambda t, _: t.reshape(-1)[:0],
    lambda t, _: t.to(torch.float64),
    lambda t, _: t.to(torch.int64),
    lambda t, _: t.unsqueeze(0),
    lambda t, _: torch.cat([t, t]) if t.ndim else torch.stack([t, t]),
    lambda t, draw: torch.full_like(t, 0) if draw.random() < 0.5 else t.view(torch.uint8) if t.ndim else t,
]
SETTINGS = ("bits", "group_size", "weight_block_size", "checkpoint_format", "version", "config_groups", "format")
WRONG = (None, -1, 0, 3, 1e9, "x", [], [0, 0], {}, {"a": 1}, True)


def test_mutated_files_are_read_or_refused_in_one_line_each(tmp_path: Path) -> None:
    """No traceback, whatever a tensor or a setting became. What is still read has the right shape."""
    draw, refused, read = random.Random(0), 0, 0
    for number in range(300):
        form = draw.choice(list(FORMS))
        packer, settings, _ = FORMS[form]
        tensors, _ = packer(WEIGHT[:32])
        name = draw.choice(sorted(tensors))
        if draw.random() < 0.7:
            tensors[name] = draw.choice(MUTATIONS)(tensors[name], draw)
        else:
            settings = {**settings, draw.choice(SETTINGS): draw.choice(WRONG)}
        named = {f"a.{part}": tensor for part, tensor in tensors.items()}
        folder = foreign.written(tmp_path / str(number), named, settings)
        (folder / "out").mkdir()
        try:
            write(opened(folder), folder / "out")
        except UserError as error:
            assert "\n" not in error.message and str(folder) in error.message, error
            refused += 1
        else:
            read += 1
    assert refused > 100 and read > 50, (refused, read)


def test_unread_forms_do_not_appear_among_the_read_ones() -> None:
    from mlxtune_convert.foreign.method import READERS

    assert not set(NAMED) & set(READERS)
    assert BNB["quant_method"] in READERS
