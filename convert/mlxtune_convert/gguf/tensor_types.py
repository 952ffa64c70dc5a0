"""Which GGUF type each tensor of a model gets, and its bytes.

Vectors and routers stay float32, as in llama.cpp's own files. `keep` carries MLX's codes over; the mixtures (q4_k_m and
its like) follow llama-quantize's recipe: more bits where errors cost most. Read MIXTURES so:

    "q4_k_m": ("Q4_K", {"attn_v": ("Q6_K", "more"), "attn_qkv": ("Q5_K", "all")})

"matrices are Q4_K; but those of attn_v are Q6_K in the layers called "more", and those of
attn_qkv are Q5_K in all layers." Of a model of 32 layers "four" are layers 0 to 3, "eighth" are 0 to 3 (the first
eighth), and "more" are the first eighth, the last eighth and every third between: 0-3, 6, 9, ..., 27, 28-31.
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
from mlxtune_convert.gguf.quant_blocks import GROUP, Codes
from mlxtune_convert.gguf.tensor_name import CONVOLUTIONS, SHARED_GATE, TensorName

KEEP = "keep"
HALF_LARGEST = 65504.0  # of float16
FLOAT_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
BLOCK_TYPES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4")
# llama-quantize's mixtures (llama-quant.cpp): type of most matrices, {stem: (type, in which layers)} of the others.
MIXTURES: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "q6_k": ("Q6_K", {}),
    "q5_k_m": ("Q5_K", {"attn_v": ("Q6_K", "more"), "ffn_down": ("Q6_K", "more"), "attn_qkv": ("Q6_K", "all")}),
    "q5_k_s": ("Q5_K", {}),
    "q4_k_m": ("Q4_K", {"attn_v": ("Q6_K", "more"), "ffn_down": ("Q6_K", "more"), "attn_qkv": ("Q5_K", "all")}),
    "q4_k_s": ("Q4_K", {"attn_v": ("Q5_K", "four"), "ffn_down": ("Q5_K", "eighth")}),
}
TYPES = (KEEP, *FLOAT_TYPES, *BLOCK_TYPES, *MIXTURES)
FLOAT32 = ("ffn_gate_inp", *CONVOLUTIONS, "per_layer_model_proj")  # beginnings of stems that llama.cpp wants so
# What llama-quantize takes for rows that are no multiple of 256.
_NARROW = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass
class Choice:
    """The types of one export. It notes what it chose while the tensors pass."""

    type: str  # of TYPES: what was asked for
    layers: int  # blocks of the model
    tied: bool  # the embedding is the head as well
    experts: int = 0  # of each layer; 0 without
    original: File | None = None  # the GGUF file the model came from, whose float types are kept
    kinds: dict[str, int] = field(default_factory=dict)  # GGUF type -> weights stored in it so far
    # What could not be carried over exactly: GGUF name -> (type, relative error of its weights).
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
        """(GGUF type, rows) of one tensor by its GGUF name.

        value: codes of a quantized matrix, else float32 of `shape` (outermost first, in weights); order: [shape[0]]
        int, see `GgufFamily.row_order`. rows: floats, or uint8 blocks, each row of weights whole in one row of bytes.
        """
        parts = TensorName.of(name)
        if parts.suffix != "weight" or len(shape) < 2 or parts.stem.startswith(FLOAT32):
            kind, rows = "F32", _dense(value).astype(np.float32)
        elif self.type == KEEP:
            kind, rows = self._kept(name, value)
        else:
            kind, rows = self._typed(name, value, shape)
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

    def _typed(self, name: str, value: Codes | np.ndarray, shape: tuple[int, ...]) -> tuple[str, np.ndarray]:
        """One matrix in the type that was asked for; its codes as they are where they are of that type."""
        if self.type in BLOCK_TYPES and isinstance(value, Codes):
            carried = quant_blocks.carry(value)
            if carried and carried[0] == self.type.upper() and carried[2] == 0.0:
                return carried[:2]
        kind = FLOAT_TYPES.get(self.type) or self._kind(TensorName.of(name))
        if shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]:
            kind = _NARROW.get(kind, "F16") if shape[-1] % GROUP == 0 else "F16"
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

    def _kind(self, name: TensorName) -> str:
        """The type for one matrix of a quantized export."""
        head = "token_embd" if self.tied else "output"
        if name.block is None and name.stem in (head, "output"):
            return "Q6_K" if self.type in MIXTURES else "Q8_0"  # the head's errors are every token's errors
        if self.type not in MIXTURES:
            return self.type.upper()
        base, others = MIXTURES[self.type]
        if name.block is None:
            return base
        role = name.stem.removesuffix("_exps")
        if self.experts == 8:  # llama-quantize's exception for Mixtral 8x7B, whose attention is small beside experts
            if role in ("attn_v", "attn_k"):
                return "Q8_0"
            if role == "attn_output" and base == "Q4_K":
                return "Q5_K"
        if role not in others:
            return base
        kind, layers = others[role]
        return kind if self._is_among(name.block, layers) else base

    def _is_among(self, layer: int, layers: str) -> bool:
        """Whether a layer is one of "all", "four", "eighth" or "more" (see the module)."""
        eighth = self.layers // 8
        if layers == "all":
            return True
        if layers == "four":
            return layer < 4
        if layers == "eighth":
            return layer < eighth
        assert layers == "more", layers
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2


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
    """A tensor's shape in GGUF, by its GGUF name. shape: in MLX, which is the same but for these."""
    stem = TensorName.of(name).stem
    if stem == SHARED_GATE:
        return shape[-1:]  # [1, H] -> [H]
    if stem in CONVOLUTIONS and len(shape) == 3:
        return shape[:2]  # [C, K, 1] -> [C, K]
    return shape or (1,)  # one number is a vector


def columns_moved(value: Codes | np.ndarray, order: np.ndarray | None) -> Codes | np.ndarray:
    """A matrix with its columns in another order. Codes stay codes where their groups stay whole.

    value: [..., columns], or the codes of [rows, columns]; order: [columns] int, MLX's column of each; None: as it is.
    """
    if order is None:
        return value
    if not isinstance(value, Codes):
        return value[..., order]
    moved = _groups_moved(value, order)
    return quant_blocks.dequantize(value)[..., order] if moved is None else moved


def _groups_moved(codes: Codes, order: np.ndarray) -> Codes | None:
    """The codes with whole groups in another order; None where `order` takes a group apart. order: [columns] int."""
    if len(order) % codes.group:
        return None
    groups = order.reshape(-1, codes.group)  # [groups, group]
    if not (groups == groups[:, :1] + np.arange(codes.group)).all():
        return None
    taken = groups[:, 0] // codes.group  # [groups]: which of MLX's groups each is
    rows = len(codes.weight)
    by_group = codes.weight.reshape(rows, len(taken), -1)  # [rows, groups, words of a group]
    return replace(
        codes,
        weight=by_group[:, taken].reshape(rows, -1),
        scales=codes.scales[:, taken],
        biases=None if codes.biases is None else codes.biases[:, taken],
    )
