"""Which GGUF type each tensor of a model gets, and its bytes.

Vectors and routers stay float32, as in llama.cpp's own files. `keep` carries MLX's codes over; the mixtures (q4_k_m and
its like) follow llama-quantize's recipe: more bits where errors cost most.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize

from mlxtune_convert import ggml, quant
from mlxtune_convert.errors import UserError
from mlxtune_convert.gguf_families import interleave
from mlxtune_convert.gguf_file import FLOATS, File
from mlxtune_convert.quant import Codes

KEEP = "keep"
FLOAT_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
BLOCK_TYPES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4")
K_TYPES = {
    "q6_k": "Q6_K",
    "q5_k_m": "Q5_K",
    "q5_k_s": "Q5_K",
    "q4_k_m": "Q4_K",
    "q4_k_s": "Q4_K",
    "q3_k_m": "Q3_K",
    "iq4_xs": "IQ4_XS",
    "iq4_nl": "IQ4_NL",
}
TYPES = (KEEP, *FLOAT_TYPES, *BLOCK_TYPES, *K_TYPES)
# What llama-quantize takes for rows that are no multiple of 256.
_NARROW = {"Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}


@dataclass
class Choice:
    """The types of one export. type: of TYPES; layers, tied, experts, groups: of the model (groups: query heads per
    key head); original: the file the model came from. `inexact` collects what could not be carried over exactly:
    name -> (type, relative error).
    """

    type: str
    layers: int
    tied: bool
    experts: int = 0
    groups: int = 1
    original: File | None = None
    kinds: dict[str, int] = field(default_factory=dict)
    inexact: dict[str, tuple[str, float]] = field(default_factory=dict)

    @staticmethod
    def of(type_: str, config: dict[str, Any], tied: bool, original: File | None = None) -> Choice:
        if type_ in K_TYPES:
            ggml.library()  # a missing package is said before any work
        experts = config.get("num_experts") or config.get("num_local_experts") or 0
        heads = config["num_attention_heads"]
        groups = heads // (config.get("num_key_value_heads") or heads)
        return Choice(type_, config["num_hidden_layers"], tied, experts, groups, original)

    @property
    def file_type(self) -> int:
        """general.file_type: llama.cpp's number for the mixture; for `keep`, that of the commonest type."""
        name = self.type.upper()
        if self.type == KEEP:
            name = max(self.kinds, key=lambda kind: self.kinds[kind])
        names = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}
        return int(LlamaFileType[names.get(name, f"MOSTLY_{name}")])

    def store(self, name: str, value: Codes | np.ndarray, heads: int, shape: tuple[int, ...]) -> tuple[str, np.ndarray]:
        """(GGUF type, rows) of one tensor. value: codes of a quantized matrix, else float32; heads: see
        `Family.heads`.
        """
        kind, rows = self._stored(name, value, shape)
        self.kinds[kind] = self.kinds.get(kind, 0) + int(np.prod(shape))
        return kind, interleave(rows.reshape(shape[0], -1), heads) if heads else rows

    def _stored(self, name: str, value: Codes | np.ndarray, shape: tuple[int, ...]) -> tuple[str, np.ndarray]:
        stem = name.split(".")[-2]
        if not name.endswith(".weight") or len(shape) < 2 or stem.startswith("ffn_gate_inp"):
            return "F32", _dense(value).astype(np.float32)
        if self.type in FLOAT_TYPES:
            return _float(name, _dense(value), FLOAT_TYPES[self.type])
        if isinstance(value, Codes) and (self.type == KEEP or self.type in BLOCK_TYPES):
            carried = quant.carry(value)
            if carried and (self.type == KEEP or (carried[0] == self.type.upper() and carried[2] == 0.0)):
                self._note(name, carried[0], carried[2])
                return carried[:2]
        if self.type == KEEP:
            weight = _dense(value)
            before = self.original.tensors[name].kind if self.original and name in self.original.tensors else ""
            if before in FLOATS and np.array_equal(weight.astype(FLOATS[before]).astype(np.float32), weight):
                return before, weight.astype(FLOATS[before])
            kind, rows, error = quant.half_floats(weight)
            if error and not isinstance(value, Codes):
                return "F32", weight
            self._note(name, kind, error)
            return kind, rows
        kind = self._kind(name, stem)
        if shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]:
            kind = _NARROW.get(kind, "F16")
        if shape[-1] % 32 or kind == "F16":
            return _float(name, _dense(value), "F16")
        weight = _dense(value).reshape(-1, shape[-1])
        if kind in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4"):
            return kind, quantize(weight, GGMLQuantizationType[kind])
        return kind, ggml.quantize(weight, kind)

    def _note(self, name: str, kind: str, error: float) -> None:
        if error:
            self.inexact[name] = (kind, error)

    def _kind(self, name: str, stem: str) -> str:
        """The type for one matrix of a quantized export."""
        mixture = self.type in K_TYPES
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            return "Q6_K" if mixture else "Q8_0"  # the head's errors are every token's errors
        base = K_TYPES.get(self.type, self.type.upper())
        if not mixture or not name.startswith("blk."):
            return base
        layer, role = int(name.split(".")[1]), stem.removesuffix("_exps")
        if self.experts == 8 and role in ("attn_v", "attn_k"):
            return "Q8_0"
        if self.experts == 8 and role == "attn_output" and self.type not in ("q5_k_m", "q5_k_s", "q6_k"):
            return "Q5_K"
        eighth = self.layers // 8
        more = layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2
        recipes: dict[str, dict[str, str]] = {
            "q4_k_m": {"attn_v": "Q6_K" if more else base, "ffn_down": "Q6_K" if more else base, "attn_qkv": "Q5_K"},
            "q5_k_m": {"attn_v": "Q6_K" if more else base, "ffn_down": "Q6_K" if more else base, "attn_qkv": "Q6_K"},
            "q4_k_s": {"attn_v": "Q5_K" if layer < 4 else base, "ffn_down": "Q5_K" if layer < eighth else base},
            "q3_k_m": {
                "attn_v": "Q5_K" if layer < 2 else "Q4_K",
                "ffn_down": "Q5_K" if layer < self.layers // 16 else "Q4_K",
                "attn_output": "Q4_K",
                "attn_qkv": "Q4_K",
            },
        }
        for four in ("iq4_xs", "iq4_nl"):
            recipes[four] = {
                "attn_v": "Q5_K" if self.groups >= 4 else base,
                "ffn_down": "Q5_K" if layer < eighth else base,
            }
        return recipes.get(self.type, {}).get(role, base)


def _float(name: str, weight: np.ndarray, kind: str) -> tuple[str, np.ndarray]:
    with np.errstate(over="ignore"):
        rows = weight.astype(FLOATS[kind])
    if kind == "F16" and not np.isfinite(rows).all() and np.isfinite(weight).all():
        raise UserError(f"{name} holds numbers above 65504, float16's largest", "Choose --type bf16 or f32.")
    return kind, rows


def _dense(value: Codes | np.ndarray) -> np.ndarray:
    return quant.dequantize(value) if isinstance(value, Codes) else value


def gguf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape in GGUF: MLX's own, except the shared expert's gate, which is a vector there."""
    return shape[-1:] if ".ffn_gate_inp_shexp." in name else shape
