"""Which GGUF type each tensor of a model gets, and its bytes.

Vectors and routers stay float32, as in llama.cpp's own files. `keep` carries MLX's codes over; the mixtures (q4_k_m and
its like) follow llama-quantize's recipe: more bits where errors cost most.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize, quantize

from mlxtune_convert.errors import UserError
from mlxtune_convert.gguf import ggml, quant_blocks
from mlxtune_convert.gguf.container import FLOATS, File
from mlxtune_convert.gguf.quant_blocks import Codes

KEEP = "keep"
HALF_LARGEST = 65504.0  # of float16
FLOAT_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
BLOCK_TYPES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4")
# llama-quantize's mixtures: the type of most matrices, and what others of a block get, in all layers or in some.
MIXTURES: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "q6_k": ("Q6_K", {}),
    "q5_k_m": ("Q5_K", {"attn_v": ("Q6_K", "more"), "ffn_down": ("Q6_K", "more"), "attn_qkv": ("Q6_K", "all")}),
    "q5_k_s": ("Q5_K", {}),
    "q4_k_m": ("Q4_K", {"attn_v": ("Q6_K", "more"), "ffn_down": ("Q6_K", "more"), "attn_qkv": ("Q5_K", "all")}),
    "q4_k_s": ("Q4_K", {"attn_v": ("Q5_K", "four"), "ffn_down": ("Q5_K", "eighth")}),
}
TYPES = (KEEP, *FLOAT_TYPES, *BLOCK_TYPES, *MIXTURES)
FLOAT32 = ("ffn_gate_inp", "ssm_conv1d", "conv", "per_layer_model_proj")  # matrices that llama.cpp wants so
# What llama-quantize takes for rows that are no multiple of 256.
_NARROW = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass
class Choice:
    """The types of one export. type: of TYPES; layers, tied, experts: of the model; original: the file the model came
    from. `inexact` collects what could not be carried over exactly: name -> (type, relative error).
    """

    type: str
    layers: int
    tied: bool
    experts: int = 0
    original: File | None = None
    kinds: dict[str, int] = field(default_factory=dict)
    inexact: dict[str, tuple[str, float]] = field(default_factory=dict)

    @staticmethod
    def of(type_: str, config: dict[str, Any], tied: bool, original: File | None = None) -> Choice:
        if type_ in MIXTURES:
            ggml.library()  # a missing package is said before any work
        experts = config.get("num_experts") or config.get("num_local_experts") or 0
        return Choice(type_, config["num_hidden_layers"], tied, experts, original)

    @property
    def file_type(self) -> int:
        """general.file_type: llama.cpp's number for the mixture; for `keep`, that of the commonest type."""
        name = max(self.kinds, key=lambda kind: self.kinds[kind]) if self.type == KEEP else self.type.upper()
        names = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}
        return int(LlamaFileType[names.get(name, f"MOSTLY_{name}")])

    def store(
        self, name: str, value: Codes | np.ndarray, order: np.ndarray | None, shape: tuple[int, ...]
    ) -> tuple[str, np.ndarray]:
        """(GGUF type, rows) of one tensor. value: codes of a quantized matrix, else float32; order: see
        `Family.row_order`.
        """
        stem = name.split(".")[-2]
        if not name.endswith(".weight") or len(shape) < 2 or stem.startswith(FLOAT32):
            kind, rows = "F32", _dense(value).astype(np.float32)
        else:
            kind, rows = self._kept(name, value) if self.type == KEEP else self._typed(name, stem, value, shape)
        self.kinds[kind] = self.kinds.get(kind, 0) + int(np.prod(shape))
        return kind, rows if order is None else rows.reshape(shape[0], -1)[order]

    def _kept(self, name: str, value: Codes | np.ndarray) -> tuple[str, np.ndarray]:
        """Codes as they are; floats as the file had them, else in the smallest type that holds them."""
        stored = quant_blocks.carry(value) if isinstance(value, Codes) else None
        if stored is None:
            weight = _dense(value)
            before = self.original.tensors[name].kind if self.original and name in self.original.tensors else ""
            if before in FLOATS and np.array_equal(weight.astype(FLOATS[before]).astype(np.float32), weight):
                return before, weight.astype(FLOATS[before])
            stored = quant_blocks.half_floats(weight)
            if stored[2] and not isinstance(value, Codes):
                return "F32", weight
        kind, rows, error = stored
        if error:
            self.inexact[name] = (kind, error)
        return kind, rows

    def _typed(self, name: str, stem: str, value: Codes | np.ndarray, shape: tuple[int, ...]) -> tuple[str, np.ndarray]:
        """One matrix in the type that was asked for; its codes as they are where they are of that type."""
        if self.type in BLOCK_TYPES and isinstance(value, Codes):
            carried = quant_blocks.carry(value)
            if carried and carried[0] == self.type.upper() and carried[2] == 0.0:
                return carried[:2]
        kind = FLOAT_TYPES.get(self.type) or self._kind(name, stem)
        if shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]:
            kind = _NARROW.get(kind, "F16") if shape[-1] % 32 == 0 else "F16"
        weight = _dense(value)
        if kind in FLOATS:
            with np.errstate(over="ignore"):
                rows = weight.astype(FLOATS[kind])
            if kind == "F16" and not np.isfinite(rows).all() and np.isfinite(weight).all():
                raise UserError(
                    f"{name} holds numbers above {HALF_LARGEST:.0f}, float16's largest", "Choose --type bf16 or f32."
                )
            return kind, rows
        return kind, _in_blocks(name, weight.reshape(-1, shape[-1]), kind)

    def _kind(self, name: str, stem: str) -> str:
        """The type for one matrix of a quantized export."""
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            return "Q6_K" if self.type in MIXTURES else "Q8_0"  # the head's errors are every token's errors
        base, others = MIXTURES.get(self.type, (self.type.upper(), {}))
        if self.type not in MIXTURES or not name.startswith("blk."):
            return base
        layer, role = int(name.split(".")[1]), stem.removesuffix("_exps")
        if self.experts == 8 and role in ("attn_v", "attn_k"):
            return "Q8_0"
        if self.experts == 8 and role == "attn_output" and base == "Q4_K":
            return "Q5_K"
        eighth = self.layers // 8
        where = {
            "all": True,
            "four": layer < 4,
            "eighth": layer < eighth,
            "more": layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2,
        }
        kind, layers = others.get(role, (base, "all"))
        return kind if where[layers] else base


def _in_blocks(name: str, weight: np.ndarray, kind: str) -> np.ndarray:
    """[rows, columns] float32 as blocks. Raises UserError where their float16 scales cannot hold the numbers."""
    with np.errstate(over="ignore", invalid="ignore"):
        rows = ggml.quantize(weight, kind) if kind.endswith("_K") else quantize(weight, GGMLQuantizationType[kind])
        if np.abs(weight).max() > HALF_LARGEST and not np.isfinite(dequantize(rows, GGMLQuantizationType[kind])).all():
            raise UserError(f"{name} holds numbers too large for {kind}'s scales", "Choose --type bf16 or f32.")
    return rows


def _dense(value: Codes | np.ndarray) -> np.ndarray:
    return quant_blocks.dequantize(value) if isinstance(value, Codes) else value


def gguf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape in GGUF: MLX's own, but the shared expert's gate is a vector, a convolution [C, K] there, and
    one number a vector."""
    if ".ffn_gate_inp_shexp." in name:
        return shape[-1:]
    if "conv" in name.split(".")[-2]:
        return shape[:2] if len(shape) == 3 else shape
    return shape or (1,)


def columns_moved(value: Codes | np.ndarray, order: np.ndarray | None) -> Codes | np.ndarray:
    """A matrix with its columns in another order. Codes stay codes where their groups stay whole."""
    if order is None:
        return value
    if isinstance(value, Codes):
        groups = order.reshape(-1, value.group) if len(order) % value.group == 0 else None
        if groups is not None and (groups == groups[:, :1] + np.arange(value.group)).all():
            first = groups[:, 0] // value.group
            rows = len(value.weight)
            weight = value.weight.reshape(rows, len(first), -1)[:, first].reshape(rows, -1)
            biases = None if value.biases is None else value.biases[:, first]
            return replace(value, weight=weight, scales=value.scales[:, first], biases=biases)
        value = quant_blocks.dequantize(value)
    return value[..., order]
