"""GPTQ and AWQ: integer codes packed into int32 words, with a scale and a zero point for every group of inputs.

weight[out, in] = scale[group, out] * (code[in, out] - zero[group, out]). Both keep the matrix with inputs as rows. GPTQ
packs the codes down the columns and the zero points along the rows, least significant bits first (AutoGPTQ's
qlinear_cuda_old.py); `g_idx` gives each input its group, which after "act-order" is not input // group_size. AWQ packs
both along the rows, eight codes a word in the order 0 2 4 6 1 3 5 7 (AutoAWQ's gemm.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mlxtune_convert.foreign.parts import Found, Part, counted
from mlxtune_convert.foreign.weights import Weights, unpacked
from mlxtune_convert.gguf.quant_blocks import Codes, pack

GPTQ_BITS = (2, 3, 4, 8)
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where column i of eight is in AWQ's word
GROUPS = (32, 64, 128)  # MLX's, affine
KEPT_BITS = (2, 3, 4)  # codes that are kept where nothing is asked: conversion makes 4 bits by default


def gptq(weights: Weights, settings: dict[str, Any]) -> Found:
    """Every GPTQ matrix. Raises UserError for a variant that packs otherwise, or a tensor that does not fit."""
    form = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    if form not in ("gptq", "gptq_v2"):
        raise weights.unread(f"GPTQ in the packing {form[:40]!r} (only gptq, gptq_v2)")
    parts, kinds = [], []
    for module in weights.ending(".qweight"):
        part, kind = _gptq_part(weights, module, settings, later=form == "gptq_v2")
        parts.append(part)
        kinds.append(kind)
    return Found(f"GPTQ ({counted(kinds)})", parts)


def _gptq_part(weights: Weights, module: str, settings: dict[str, Any], later: bool) -> tuple[Part, str]:
    """later: zero points are stored as they are; before, one less."""
    weight, zero, scale, order = (f"{module}.{name}" for name in ("qweight", "qzeros", "scales", "g_idx"))
    words, zeros = weights.words(weight, module), weights.words(zero, module)
    outputs, groups = words.shape[1], len(zeros)
    bits = _bits(weights, zero, outputs, settings)
    inputs = words.shape[0] * 32 // bits
    _fits(weights, scale, module, (groups, outputs))
    indices, group = _groups(weights, module, order, inputs, groups, settings)

    def codes() -> np.ndarray:
        return unpacked(np.ascontiguousarray(words.T), bits, inputs)

    def zero_points() -> np.ndarray:
        # Undone as it was done, to whole words: a zero point of 0 borrowed from its neighbour.
        stored = zeros if later or bits == 3 else zeros + np.uint32(sum(1 << at for at in range(0, 32, bits)))
        found = unpacked(stored, bits, outputs).T
        return found if later or bits != 3 else (found + 1) & 7

    def scales() -> np.ndarray:
        return weights.scales(scale, module).T

    uses = (weight, zero, scale, *([order] if order in weights else []))
    return grouped(module, uses, bits, (outputs, inputs), codes, zero_points, scales, indices, group)


def awq(weights: Weights, settings: dict[str, Any]) -> Found:
    """Every AWQ matrix. Raises UserError for a variant that packs otherwise, or a tensor that does not fit."""
    form = str(settings.get("version") or settings.get("checkpoint_format") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", 4))
    if form != "gemm" or str(settings.get("backend") or "autoawq").lower() == "llm-awq" or bits != 4:
        raise weights.unread(f"AWQ in the packing {form[:40]!r} with {str(bits)[:10]} bits (only gemm with 4)")
    parts, kinds = [], []
    for module in weights.ending(".qweight"):
        part, kind = _awq_part(weights, module, settings)
        parts.append(part)
        kinds.append(kind)
    return Found(f"AWQ ({counted(kinds)})", parts)


def _awq_part(weights: Weights, module: str, settings: dict[str, Any]) -> tuple[Part, str]:
    weight, zero, scale = (f"{module}.{name}" for name in ("qweight", "qzeros", "scales"))
    words, zeros = weights.words(weight, module), weights.words(zero, module)
    inputs, outputs, groups = len(words), words.shape[1] * 8, len(zeros)
    _fits(weights, zero, module, (groups, words.shape[1]))
    _fits(weights, scale, module, (groups, outputs))
    indices, group = _groups(weights, module, "", inputs, groups, settings)

    def columns(packed: np.ndarray) -> np.ndarray:
        in_order = unpacked(packed, 4, outputs).reshape(len(packed), -1, 8)[..., AWQ_PLACES]
        return in_order.reshape(len(packed), outputs).T

    def codes() -> np.ndarray:
        return columns(words)

    def zero_points() -> np.ndarray:
        return columns(zeros)

    def scales() -> np.ndarray:
        return weights.scales(scale, module).T

    uses = (weight, zero, scale)
    return grouped(module, uses, 4, (outputs, inputs), codes, zero_points, scales, indices, group)


def grouped(
    module: str,
    uses: tuple[str, ...],
    bits: int,
    shape: tuple[int, int],
    codes: Callable[[], np.ndarray],
    zero_points: Callable[[], np.ndarray],
    scales: Callable[[], np.ndarray],
    indices: np.ndarray | None,
    group: int,
) -> tuple[Part, str]:
    """A matrix of integer codes, and its form for people.

    codes: [out, in], below 2**bits; zero_points, scales: [out, groups]; indices: the group of each input where they do
    not follow each other; group: inputs that share a scale.
    """
    of_input = np.arange(shape[1]) // group if indices is None else indices

    def matrix(_: int) -> np.ndarray:
        zeros, factors = zero_points().astype(np.float32), scales()
        return (codes().astype(np.float32) - zeros[:, of_input]) * factors[:, of_input]

    def affine(kind: np.dtype) -> Codes:
        # The bias from the rounded scale: a weight whose code is the zero point stays 0.
        factors = np.ascontiguousarray(scales().astype(kind))
        biases = (-zero_points().astype(np.float32) * factors.astype(np.float32)).astype(kind)
        return Codes(pack(np.ascontiguousarray(codes()), bits), factors, biases, bits, group)

    kept = indices is None and bits in KEPT_BITS and group in GROUPS and shape[1] % group == 0
    form = f"{bits} bits, groups of {group}{'' if indices is None else ', act-order'}"
    return Part(f"{module}.weight", shape, uses, matrix, affine if kept else None), form


def _bits(weights: Weights, zero: str, outputs: int, settings: dict[str, Any]) -> int:
    """Bits per code: the config's, or, where it gives some modules others, those that the shapes have."""
    words = weights.shape(zero)[1]
    fitting = [bits for bits in GPTQ_BITS if math.ceil(outputs * bits / 32) == words]
    asked = settings.get("bits")
    if asked in fitting:
        return int(asked)
    if len(fitting) != 1:
        raise weights.wrong(
            zero, f"is {weights.described(zero)}: for {outputs} outputs of {str(asked)[:10]} bits it cannot"
        )
    return fitting[0]


def _groups(
    weights: Weights, module: str, order: str, inputs: int, groups: int, settings: dict[str, Any]
) -> tuple[np.ndarray | None, int]:
    """The group of each input, [inputs] int, None where they follow each other; and the groups' size.

    order: the tensor that says it; inputs, groups: of the matrix.
    """
    size = _group_size(settings, inputs, groups)
    if not size:
        raise weights.wrong(f"{module}.scales", f"has {groups} groups for {inputs} inputs")
    if order not in weights:
        return None, size
    indices = weights.array(order)
    if indices.shape != (inputs,) or indices.dtype.kind not in "iu":
        raise weights.wrong(order, f"is {weights.described(order)}: {module} has {inputs} inputs")
    if inputs and (indices.min() < 0 or indices.max() >= groups):
        raise weights.wrong(order, f"names a group that is not there: {module} has {groups}")
    if np.array_equal(indices, np.arange(inputs) // size):
        return None, size
    return indices.astype(np.int64), size


def _group_size(settings: dict[str, Any], inputs: int, groups: int) -> int:
    """Inputs that share a scale: as the configuration says, else as the shapes do; 0 where no size fits."""
    given = settings.get("group_size", settings.get("q_group_size"))
    said: int = given if type(given) is int and given >= 1 else 0
    if groups == 1 and (not said or said >= inputs):
        return inputs  # all of them share one: -1 says so
    if said and math.ceil(inputs / said) == groups:
        return said
    if groups < 1:
        return 0
    size = math.ceil(inputs / groups)  # a module with settings of its own
    return size if size and math.ceil(inputs / size) == groups else 0


def _fits(weights: Weights, name: str, module: str, shape: tuple[int, int]) -> None:
    weights.needed(name, module)
    if weights.shape(name) != shape:
        raise weights.wrong(name, f"is {weights.described(name)}: for its codes {list(shape)} is right")
