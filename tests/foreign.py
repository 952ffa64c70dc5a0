"""Other makers' quantized files, packed by plain formulas: one Python integer per row of codes, no clever numpy.

Each packer takes a float32 matrix [out, in] and gives the tensors that stand for it, by what follows the module's name,
and the weights that they mean: what is read must be exactly these.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Packed = tuple[Tensors, np.ndarray]
Packer = Callable[[np.ndarray], Packed]

FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
# QLoRA's 4-bit NormalFloat (Dettmers 2023, arXiv:2305.14314, appendix E).
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def stream(codes: np.ndarray, bits: int) -> torch.Tensor:
    """[rows, n] codes -> int32 words, the first code in the lowest bits."""
    size = -(-codes.shape[1] * bits // 32) * 4
    rows = [sum(int(code) << (bits * i) for i, code in enumerate(row)).to_bytes(size, "little") for row in codes]
    return torch.tensor(np.frombuffer(b"".join(rows), np.int32).reshape(len(codes), -1).copy())


def _float8(weight: np.ndarray, scales: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Values and what they mean. scales: for each weight."""
    values = torch.tensor(weight / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values, values.float().numpy() * scales


def fp8_blocks(rows: int, columns: int, name: str = "weight_scale_inv", kind: torch.dtype = torch.float32) -> Packer:
    """DeepSeek's: one scale per block; the last ones may be cut off."""

    def pack(weight: np.ndarray) -> Packed:
        grid = np.zeros((-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)), np.float32)
        scales = np.zeros_like(weight)
        for r, c in np.ndindex(*grid.shape):
            place = slice(r * rows, (r + 1) * rows), slice(c * columns, (c + 1) * columns)
            top = torch.tensor(np.abs(weight[place]).max() / 448).to(kind)
            grid[r, c] = scales[place] = float(top)
        values, means = _float8(weight, scales)
        return {"weight": values, name: torch.tensor(grid).to(kind)}, means

    return pack


def fp8_one(name: str, activation: str = "", shape: tuple[int, ...] = ()) -> Packer:
    """One scale for all, and one for activations."""

    def pack(weight: np.ndarray) -> Packed:
        scale = torch.tensor(np.abs(weight).max() / 448).to(torch.bfloat16).reshape(shape)
        values, means = _float8(weight, np.full_like(weight, scale.float().item()))
        beside = {activation: torch.tensor(1.0, dtype=torch.bfloat16)} if activation else {}
        return {"weight": values, name: scale, **beside}, means

    return pack


def fp8_rows(weight: np.ndarray) -> Packed:
    scales = (np.abs(weight).max(1, keepdims=True) / 448).astype(np.float32)
    values, means = _float8(weight, np.broadcast_to(scales, weight.shape))
    return {"weight": values, "weight_scale": torch.tensor(scales)}, means


def int8_rows(weight: np.ndarray) -> Packed:
    """compressed-tensors' int8 with zero points."""
    low, high = weight.min(1, keepdims=True), weight.max(1, keepdims=True)
    scales = ((high - low) / 255).astype(np.float32)
    zeros = np.clip(np.round(-128 - low / scales), -128, 127)
    codes = np.clip(np.round(weight / scales) + zeros, -128, 127)
    tensors = {"weight": codes, "weight_zero_point": zeros}
    out = {name: torch.tensor(array.astype(np.int8)) for name, array in tensors.items()}
    return {**out, "weight_scale": torch.tensor(scales)}, ((codes - zeros) * scales).astype(np.float32)


def _integers(
    weight: np.ndarray, bits: int, groups: np.ndarray, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Unsigned codes [out, in], zero points and float16 scales [out, groups], and what they mean. groups: of inputs."""
    top, count = 2**bits - 1, groups.max() + 1
    scales, zeros = np.zeros((len(weight), count), np.float16), np.full((len(weight), count), 1 << (bits - 1))
    for group in range(count):
        part = weight[:, groups == group]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scales[:, group] = np.maximum(-low, high) * 2 / top
        else:
            scales[:, group] = (high - low) / top
            zeros[:, group] = np.clip(np.round(-low / scales[:, group]), 1, top)
    factor, zero = scales.astype(np.float32)[:, groups], zeros[:, groups]
    codes = np.clip(np.round(weight / factor) + zero, 0, top).astype(int)
    return codes, zeros, scales, ((codes - zero) * factor).astype(np.float32)


def _order(columns: int, group: int, shuffled: bool) -> np.ndarray:
    groups = np.arange(columns) // group
    return np.random.default_rng(3).permutation(groups) if shuffled else groups


def gptq(bits: int, group: int, shuffled: bool = False, later: bool = False, index: bool = True) -> Packer:
    """shuffled: after act-order; later: the second version of the format; index: g_idx is there."""

    def pack(weight: np.ndarray) -> Packed:
        groups = _order(weight.shape[1], group, shuffled)
        codes, zeros, scales, means = _integers(weight, bits, groups, symmetric=False)
        out = {
            "qweight": stream(codes, bits).T.contiguous(),
            "qzeros": stream(zeros.T - (0 if later else 1), bits),
            "scales": torch.tensor(scales.T.copy()),
        }
        return {**out, **({"g_idx": torch.tensor(groups.astype(np.int32))} if index else {})}, means

    return pack


def awq(group: int) -> Packer:
    """AutoAWQ's: eight columns of a word in its own order."""

    def words(codes: np.ndarray) -> torch.Tensor:
        rows, columns = codes.shape
        return stream(codes.reshape(rows, columns // 8, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(rows, columns), 4)

    def pack(weight: np.ndarray) -> Packed:
        groups = _order(weight.shape[1], group, shuffled=False)
        codes, zeros, scales, means = _integers(weight, 4, groups, symmetric=False)
        return {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": torch.tensor(scales.T.copy())}, means

    return pack


def compressed(bits: int, group: int, symmetric: bool = True, shuffled: bool = False) -> Packer:
    """compressed-tensors' pack-quantized. group: 0 for one scale per row."""

    def pack(weight: np.ndarray) -> Packed:
        groups = _order(weight.shape[1], group or weight.shape[1], shuffled)
        codes, zeros, scales, means = _integers(weight, bits, groups, symmetric)
        out = {
            "weight_packed": stream(codes, bits),
            "weight_scale": torch.tensor(scales),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            out["weight_zero_point"] = stream(zeros.T, bits).T.contiguous()
        if shuffled:
            out["weight_g_idx"] = torch.tensor(groups.astype(np.int32))
        return out, means

    return pack


def _float4(weight: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Two codes to a byte, the lower half first."""
    codes = np.abs(weight[..., None] - np.array(FP4)).argmin(-1)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
    return torch.tensor(packed), np.array(FP4, np.float32)[codes]


def mxfp4(weight: np.ndarray) -> Packed:
    """compressed-tensors' MXFP4: a power of two for 32 weights."""
    tops = np.abs(weight.reshape(len(weight), -1, 32)).max(-1)
    exponents = np.floor(np.log2(tops)).astype(int) - 2
    scales = np.repeat(2.0**exponents, 32, axis=1).astype(np.float32)
    packed, values = _float4(weight / scales)
    return {"weight_packed": packed, "weight_scale": torch.tensor((exponents + 127).astype(np.uint8))}, values * scales


def nvfp4(packed_name: str, overall_name: str, divides: bool) -> Packer:
    """An 8-bit float for 16 weights, and one scale for all. divides: as compressed-tensors stores that one."""

    def pack(weight: np.ndarray) -> Packed:
        overall = np.float32(448 * 6 / np.abs(weight).max() if divides else np.abs(weight).max() / (448 * 6))
        inner = np.abs(weight.reshape(len(weight), -1, 16)).max(-1) / 6 * (overall if divides else 1 / overall)
        scales = torch.tensor(inner).to(torch.float8_e4m3fn)
        factors = scales.float().numpy() / overall if divides else scales.float().numpy() * overall
        each = np.repeat(factors, 16, axis=1)
        packed, values = _float4(weight / np.where(each == 0, 1, each))
        tensors = {packed_name: packed, "weight_scale": scales, overall_name: torch.tensor(overall)}
        return tensors, values * each

    return pack


def bnb4(table: list[float], block: int = 64, nested: bool = True, kind: str = "nf4") -> Packer:
    """bitsandbytes' 4 bits, with double quantization or without."""

    def pack(weight: np.ndarray) -> Packed:
        flat = weight.reshape(-1, block)
        absmax = np.abs(flat).max(1).astype(np.float32)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": weight.shape}
        tensors: dict[str, np.ndarray] = {"absmax": absmax}
        if nested:
            offset, size, levels = absmax.mean(), 256, np.linspace(-1, 1, 256).astype(np.float32)
            tops = np.array([np.abs(absmax[i : i + size] - offset).max() for i in range(0, len(absmax), size)])
            each = np.repeat(tops, size)[: len(absmax)].astype(np.float32)
            codes = np.abs(((absmax - offset) / each)[:, None] - levels).argmin(1)
            absmax = (levels[codes] * each + np.float32(offset)).astype(np.float32)
            tensors = {"absmax": codes.astype(np.uint8), "nested_quant_map": levels}
            tensors["nested_absmax"] = tops.astype(np.float32)
            state |= {"nested_blocksize": size, "nested_dtype": "float32", "nested_offset": float(offset)}
        values = np.array(table, np.float32)
        codes = np.abs((flat / absmax[:, None])[..., None] - values).argmin(-1)
        means = (values[codes] * absmax[:, None]).reshape(weight.shape)
        pairs = codes.reshape(-1, 2)
        out = {f"weight.{name}": torch.tensor(array) for name, array in tensors.items()}
        letters = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
        out[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(letters)
        out["weight"] = torch.tensor((pairs[:, :1] << 4 | pairs[:, 1:]).astype(np.uint8))
        return {**out, "weight.quant_map": torch.tensor(values)}, means

    return pack


def bnb8(weight: np.ndarray) -> Packed:
    """LLM.int8's rows."""
    tops = np.abs(weight).max(1).astype(np.float32)
    codes = np.round(weight * 127 / tops[:, None]).astype(np.int8)
    means = codes.astype(np.float32) * (tops / np.float32(127))[:, None]
    tensors = {"weight": torch.tensor(codes), "SCB": torch.tensor(tops), "weight_format": torch.tensor(0).byte()}
    return tensors, means


def config_of_compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def quantized(folder: Path, packer: Packer, settings: dict[str, Any] | None, where: str = "_proj.weight") -> Path:
    """Quantize the matrices of a model folder in place. Returns a folder beside it with what they mean, in float32."""
    tensors = load_file(folder / "model.safetensors")
    out, means = {}, {}
    for name, tensor in tensors.items():
        if name.endswith(where) and tensor.ndim == 2:
            parts, dense = packer(tensor.float().numpy())
            out |= {f"{name.removesuffix('weight')}{part}": array for part, array in parts.items()}
            means[name] = torch.tensor(np.ascontiguousarray(dense))
        else:
            out[name], means[name] = tensor, tensor.float()
    plain = folder.with_name(f"{folder.name}-means")
    shutil.copytree(folder, plain)
    save_file(means, plain / "model.safetensors", {"format": "pt"})
    save_file(out, folder / "model.safetensors", {"format": "pt"})
    if settings is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return plain


def written(folder: Path, tensors: Tensors, settings: dict[str, Any] | None, **config: Any) -> Path:
    """A folder of one module's tensors, without a tokenizer: enough to be read."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"model_type": "llama", **config, **({} if settings is None else {"quantization_config": settings})}
    (folder / "config.json").write_text(json.dumps(whole))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder
