"""Makes foreign_by_others.safetensors beside this file: one small matrix, packed and read by each format's own authors.

    python tests/foreign_by_others.py GPTQMODEL AUTOAWQ

in an environment with PyPI's compressed-tensors and bitsandbytes; the two arguments are the unpacked source archives of
PyPI's gptqmodel and autoawq, whose packing is run without their CUDA parts. The committed file is of compressed-tensors
0.20.1, bitsandbytes 0.50.2, gptqmodel 7.7.0 and autoawq 0.2.9. Tests read it with `cases`.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

FILE = Path(__file__).with_suffix(".safetensors")
ROWS, COLUMNS = 32, 64
MODULE = "model.layers.0.up_proj"


@dataclass(frozen=True)
class Case:
    """tensors: by their names in a folder; means: the weights as the author's own code reads them; settings: the
    quantization_config."""

    tensors: dict[str, torch.Tensor]
    means: np.ndarray
    settings: dict[str, Any]


def cases() -> dict[str, Case]:
    """The committed ones by name."""
    found: dict[str, Case] = {}
    with safe_open(FILE, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for case, one in settings.items():
        own = {name.split("/")[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{case}/")}
        means = own.pop("means").float().numpy()
        found[case] = Case({f"{MODULE}.{name}": tensor for name, tensor in own.items()}, means, one)
    return found


def _weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.05


def _compressed() -> dict[str, Any]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    plain = {"num_bits": 4, "symmetric": True}
    wanted = {
        "int4 groups": ("pack-quantized", {**plain, "strategy": "group", "group_size": 32}),
        "int4 asymmetric": ("pack-quantized", {**plain, "symmetric": False, "strategy": "group", "group_size": 64}),
        "int3 rows": ("pack-quantized", {**plain, "num_bits": 3, "strategy": "channel"}),
        "int8 packed": ("pack-quantized", {**plain, "num_bits": 8, "strategy": "channel"}),
        "int8 naive": ("int-quantized", {"num_bits": 8, "symmetric": False, "strategy": "channel"}),
        "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        "fp8 rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        "fp8 blocks": (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [24, 40]},
        ),
        "nvfp4": ("nvfp4-pack-quantized", {**plain, "type": "float", "strategy": "tensor_group", "group_size": 16}),
        "mxfp4": (
            "mxfp4-pack-quantized",
            {**plain, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        ),
    }
    out = {}
    for name, (form, given) in wanted.items():
        arguments = QuantizationArgs(**given)
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
        weight = _weight()
        low, high = _extremes(weight, given)
        overall = generate_gparam(weight.min(), weight.max()) if form.startswith("nvfp4") else None
        scale, zero = calculate_qparams(low, high, arguments, global_scale=overall)
        if form.startswith("mxfp4"):
            scale = 2.0 ** torch.floor(torch.log2(scale.float()))
        state = {"weight": weight, "weight_scale": scale.float(), "weight_zero_point": zero.to(torch.int8)}
        if overall is not None:
            state["weight_global_scale"] = overall
        compressor = BaseCompressor.get_value_from_registry(form)
        packed = compressor.compress(state, scheme)
        means = compressor.decompress(dict(packed), scheme)["weight"]
        group = {"targets": ["Linear"], "weights": json.loads(arguments.model_dump_json())}
        settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
        out[f"compressed {name}"] = (packed, means, settings)
    return out


def _extremes(weight: torch.Tensor, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest weight of whatever shares a scale."""
    rows, columns = weight.shape
    if given["strategy"] == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if given["strategy"] == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if given["strategy"] == "block":
        high, wide = given["block_structure"]
        blocks = [[weight[r : r + high, c : c + wide] for c in range(0, columns, wide)] for r in range(0, rows, high)]
        return tuple(torch.tensor([[f(b) for b in row] for row in blocks]) for f in (torch.min, torch.max))  # type: ignore[return-value]
    grouped = weight.reshape(rows, -1, given["group_size"])
    return grouped.amin(-1), grouped.amax(-1)


def _bitsandbytes() -> dict[str, Any]:
    import bitsandbytes.functional as bnb

    out = {}
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for name, kind, nested in (("nf4", "nf4", False), ("nf4 nested", "nf4", True), ("fp4 nested", "fp4", True)):
        packed, state = bnb.quantize_4bit(_weight(), quant_type=kind, blocksize=64, compress_statistics=nested)
        parts = {f"weight.{part}": array for part, array in state.as_dict(packed=True).items()}
        out[f"bitsandbytes {name}"] = ({"weight": packed, **parts}, bnb.dequantize_4bit(packed, state), settings)
    codes, scales, _ = bnb.int8_vectorwise_quant(_weight().half())
    tensors = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    means = bnb.int8_vectorwise_dequant(codes, scales)
    out["bitsandbytes int8"] = (tensors, means, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    return out


def _functions(file: Path, names: tuple[str, ...], known: dict[str, Any]) -> dict[str, Any]:
    """Some functions and methods of a source file, without importing it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in names and node.name not in known:
            node.decorator_list, node.returns = [], None
            exec(compile(ast.Module([node], []), str(file), "exec"), known)
    return known


def _gptq(source: Path) -> dict[str, Any]:
    layers = source / "gptqmodel" / "nn_modules" / "qlinear" / "__init__.py"
    names = ("pack_original", "dequantize_weight", "_init_wf_unsqueeze_buffers", "_wf_device", "_dequantize_from_codes")
    limits = SimpleNamespace(threadpool_limits=lambda _: contextlib.nullcontext())
    import transformers

    known = {"t": torch, "torch": torch, "np": np, "math": math, "nn": torch.nn, "THREADPOOLCTL": limits}
    known |= {"_ConvNd": torch.nn.modules.conv._ConvNd, "transformers": transformers}
    known |= {"_torch_right_shift": torch.bitwise_right_shift, "_torch_left_shift": torch.bitwise_left_shift}
    _functions(layers, names, known)
    out = {}
    for name, bits, group, shuffled, later in (
        ("4 bits", 4, 32, False, False),
        ("4 bits, act-order", 4, 32, True, False),
        ("v2", 4, 16, True, True),
        ("2 bits", 2, 32, False, False),
        ("3 bits", 3, 32, True, False),
        ("8 bits", 8, 64, False, False),
    ):
        linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
        linear.weight.data = _weight()
        groups = torch.arange(COLUMNS) // group
        if shuffled:
            groups = groups[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))]
        low, high = (
            torch.stack([f(linear.weight.data[:, groups == g], 1) for g in range(COLUMNS // group)], 1)
            for f in (torch.amin, torch.amax)
        )
        scales = ((high - low) / (2**bits - 1)).half().float()
        zeros = torch.clamp(torch.round(-low / scales), 1, 2**bits - 1)

        class Layer(torch.nn.Module):
            enable_wf_unsqueeze = True
            planar, pack_dtype_bits, pack_np_math_dtype, pack_np_dtype = False, 32, np.uint32, np.int32
            pack_dtype, dequant_dtype = torch.int32, torch.int16 if bits == 8 else torch.int8
            pack_original, dequantize_weight = known["pack_original"], known["dequantize_weight"]
            _init_wf_unsqueeze_buffers, _wf_device = known["_init_wf_unsqueeze_buffers"], known["_wf_device"]
            _dequantize_from_codes = known["_dequantize_from_codes"]

        layer = Layer()
        layer.bits, layer.pack_factor, layer.maxq = bits, 32 // bits, 2**bits - 1
        layer.in_features, layer.out_features, layer.group_size = COLUMNS, ROWS, group
        layer.pack_original(linear, scales, zeros, groups.to(torch.int32))
        layer.scales = layer.scales.float()  # what it means, not rounded to float16
        means = layer.dequantize_weight().T
        if not later:  # its convert_gptq_v2_to_v1_format_module for words without borrowing
            layer.pack_original(linear, scales, zeros - 1, groups.to(torch.int32))
            qzeros = layer.qzeros
            layer.pack_original(linear, scales, zeros, groups.to(torch.int32))
            layer.qzeros = qzeros
        tensors = {
            "qweight": layer.qweight,
            "qzeros": layer.qzeros,
            "scales": layer.scales.half(),
            "g_idx": layer.g_idx,
        }
        settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": shuffled}
        form = "gptq_v2" if later else "gptq"
        out[f"gptq {name}"] = (tensors, means, {**settings, "checkpoint_format": form})
    return out


def _awq(source: Path) -> dict[str, Any]:
    packing: dict[str, Any] = {"torch": torch, "AWQ_REVERSE_ORDER": [0, 4, 1, 5, 2, 6, 3, 7]}
    _functions(source / "awq/utils/packing_utils.py", ("unpack_awq", "reverse_awq_order", "dequantize_gemm"), packing)
    known: dict[str, Any] = {"torch": torch, "get_best_device": lambda: "cpu"}
    _functions(source / "awq/modules/linear/gemm.py", ("from_linear",), known)

    def layer(bits: int, group: int, inputs: int, outputs: int, bias: bool, device: Any) -> SimpleNamespace:
        return SimpleNamespace(w_bit=bits, group_size=group, in_features=inputs, out_features=outputs)

    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    grouped = _weight().reshape(ROWS, -1, 32)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = ((high - low) / 15).half().float()
    zeros = torch.clamp(torch.round(-low / scales), 0, 15)
    codes = torch.clamp(
        torch.round(grouped / scales[..., None]) + zeros[..., None], 0, 15
    )  # as its quantizer leaves it
    linear.weight.data = ((codes - zeros[..., None]) * scales[..., None]).reshape(ROWS, COLUMNS)
    packed = known["from_linear"](layer, linear, 4, 32, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    means = packing["dequantize_gemm"](packed.qweight, packed.qzeros, packed.scales.float(), 4, 32).T
    tensors = {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    return {"awq": (tensors, means, settings)}


def main(gptqmodel: str, autoawq: str) -> None:
    from safetensors.torch import save_file

    made = {**_compressed(), **_bitsandbytes(), **_gptq(Path(gptqmodel)), **_awq(Path(autoawq))}
    tensors, settings = {}, {}
    for case, (parts, means, one) in made.items():
        settings[case] = one
        for name, tensor in {**parts, "means": means}.items():
            tensors[f"{case}/{name}"] = tensor.detach().clone().contiguous()
    save_file(tensors, FILE, {"settings": json.dumps(settings)})
    print(f"{len(made)} cases, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
