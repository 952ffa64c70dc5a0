"""A GGUF model file -> an MLX model folder: code for code where MLX can hold the codes, else as 16-bit floats."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from mlxtune_convert.errors import CONVERT_ORIGINAL, UserError
from mlxtune_convert.files import write_json
from mlxtune_convert.gguf import container, metadata, tokenizer_read
from mlxtune_convert.gguf.architectures import of_file
from mlxtune_convert.gguf.container import FLOATS, File
from mlxtune_convert.gguf.family import GgufFamily, uninterleave
from mlxtune_convert.gguf.metadata import is_rope_tensor
from mlxtune_convert.gguf.quant_blocks import MAPPED, Codes, from_blocks
from mlxtune_convert.gguf.tensor_name import SHARED_GATE, TensorName
from mlxtune_convert.hf.configs import SOURCE_FILE
from mlxtune_convert.tensors import ShardWriter

HEADER_FILE = "mlxtune_source.gguf"  # the file's header, kept so that an export can equal it
INTEGERS = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")  # no weights, or not defined as stored ones


@dataclass(frozen=True)
class Gguf:
    """An opened GGUF model, of which all can be converted."""

    file: File  # its header; tensors are read when they are asked for
    family: GgufFamily  # what llama.cpp knows of its architecture
    config: dict[str, Any]  # config.json as transformers would have it

    @property
    def quantized(self) -> bool:
        return any(tensor.kind not in FLOATS for tensor in self.file.tensors.values())

    @property
    def converted_bytes(self) -> int:
        """What the MLX folder's weights take, on the high side."""
        return sum(
            tensor.nbytes if tensor.kind in (*FLOATS, *MAPPED) else 2 * math.prod(tensor.shape)
            for tensor in self.file.tensors.values()
        )

    def notes(self) -> list[str]:
        """What a person must know: which tensors become floats."""
        kinds = [tensor.kind for tensor in self.file.tensors.values() if tensor.kind not in (*FLOATS, *MAPPED)]
        if not kinds:
            return []
        names = ", ".join(sorted(set(kinds)))
        return [f"MLX has no form for {names}: {len(kinds)} tensors are kept as float16; --bits 4 or 8 quantizes them"]


def open_gguf(path: Path) -> Gguf:
    """Open a GGUF model and check that all of it can be converted.

    Raises UserError when it is no GGUF model, is damaged, or holds an architecture, vocabulary or tensor that is not
    known.
    """
    file = container.read(path)
    parts = file.get("split.count", 1)
    if parts != 1:
        raise UserError(f"{path} is one of {str(parts)[:20]} parts of a model", "Merge them with llama-gguf-split.")
    if file.get("general.type", "model") != "model":
        raise UserError(f"{path} holds no model but {str(file.get('general.type'))[:40]!r}")
    family = of_file(file)
    tokenizer_read.check_supported(file)
    for name in file.tensors:
        if not is_rope_tensor(name):
            family.mlx_name(name)
    for tensor in file.tensors.values():
        if tensor.kind in INTEGERS:
            raise UserError(
                f"{path}: {tensor.name} has the type {tensor.kind}, which holds no weights", CONVERT_ORIGINAL
            )
    _require_all_tensors(file, family)
    tokens = len(file.get("tokenizer.ggml.tokens"))
    config = metadata.config(family, file, tokens)
    if tokens > config["vocab_size"]:
        raise UserError(f"{path}: more tokens than the embedding has rows ({config['vocab_size']})", CONVERT_ORIGINAL)
    return Gguf(file, family, config)


def _require_all_tensors(file: File, family: GgufFamily) -> None:
    layers = file.get(f"{family.gguf}.block_count")
    if not isinstance(layers, int) or not 0 < layers <= len(file.tensors):
        raise UserError(
            f"{file.path}: {family.gguf}.block_count is {str(layers)[:40]}, the file has {len(file.tensors)} tensors",
            "The file is damaged: copy or download it again.",
        )
    outer = [stem for stem in family.outer if stem != "output"]  # without it, the embedding is the head
    names = [f"{stem}.weight" for stem in outer]
    names += [f"blk.{layer}.{stem}.weight" for layer in range(layers) for stem in family.names]
    missing = [name for name in names if name not in file.tensors]
    if missing:
        parts = file.get("split.count", 1)
        raise UserError(
            f"{file.path}: {len(missing)} tensors are missing, first {missing[0]}",
            f"It is one of {parts} parts: merge them with llama-gguf-split." if parts != 1 else CONVERT_ORIGINAL,
        )


def mlx_tensors(gguf: Gguf) -> Iterator[tuple[str, np.ndarray | Codes]]:
    """(MLX name, float array in MLX's shape) for plain tensors; (MLX module, codes) for quantized ones.

    The codes are of [rows, columns], experts one after the other.
    """
    file, family = gguf.file, gguf.family
    has_bfloat16 = any(tensor.kind == "BF16" for tensor in file.tensors.values())
    half = np.dtype(ml_dtypes.bfloat16 if has_bfloat16 else np.float16)
    for name, tensor in file.tensors.items():
        if is_rope_tensor(name):
            continue
        mlx_name, heads, rows = family.mlx_name(name), family.heads(name, gguf.config), file.rows(name)
        if heads and rows.shape[0] % (2 * heads):
            raise UserError(f"{file.path}: {name} has {rows.shape[0]} rows for {heads} heads", "It is damaged.")
        rows = uninterleave(rows, heads)
        if tensor.kind in FLOATS:
            array = _narrowed(np.asarray(rows), half, np.float32(family.offset(name)))
            yield mlx_name, array.reshape(1, -1) if TensorName.of(name).stem == SHARED_GATE else array
            continue
        blocks = rows.reshape(-1, rows.shape[-1])  # [rows, bytes], experts one after the other
        codes = _codes(blocks, tensor.kind)
        if codes is not None:
            yield mlx_name.removesuffix(".weight"), codes
        else:
            yield mlx_name, _floats(blocks, tensor.kind, half).reshape(tensor.shape)


def _codes(blocks: np.ndarray, kind: str) -> Codes | None:
    """The codes of [rows, bytes] uint8 blocks, or None where MLX has no form for the type, or for one of the scales."""
    if kind not in MAPPED:
        return None
    try:
        return from_blocks(blocks, kind)
    except ValueError:
        return None


def _floats(blocks: np.ndarray, kind: str, half: np.dtype) -> np.ndarray:
    """[rows, bytes] uint8 blocks -> [rows, columns] floats: 16 bits, or 32 where a number is too large for that."""
    with np.errstate(over="ignore", invalid="ignore"):
        floats: np.ndarray = dequantize(blocks, GGMLQuantizationType[kind])
        narrow = floats.astype(half)
    return narrow if np.isfinite(narrow).all() else floats


def _narrowed(array: np.ndarray, half: np.dtype, offset: np.float32) -> np.ndarray:
    """Norms come as float32; MLX wants one activation type: 16 bits where these give the same float32 back.

    array: of any shape, returned in the same; offset: what is taken away from it first.
    """
    if array.dtype != np.float32:
        return array
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is what the comparison finds
        narrow = (array - offset).astype(half)
        return narrow if np.array_equal(narrow.astype(np.float32) + offset, array) else array - offset


def convert(gguf: Gguf, folder: Path) -> dict[str, Any]:
    """Write an MLX model folder that `mlx_lm.load` loads. Returns its config.json.

    Every tensor of a type in MAPPED keeps its codes and scales: dequantized in float32 it equals the GGUF's own values
    bit for bit.
    """
    config = dict(gguf.config)
    writer = ShardWriter(folder, {"format": "mlx"})
    table: dict[str, dict[str, Any]] = {}
    for name, value in mlx_tensors(gguf):
        if isinstance(value, np.ndarray):
            writer.add(name, value)
            continue
        table[name] = {"group_size": value.group, "bits": value.bits, "mode": value.mode}
        shape = gguf.file.tensors[gguf.family.gguf_name(f"{name}.weight")].shape
        for suffix, array in (("weight", value.weight), ("scales", value.scales), ("biases", value.biases)):
            if array is not None:
                writer.add(f"{name}.{suffix}", array.reshape(*shape[:-1], -1))
    writer.close()
    if table:
        entries = list(table.values())
        common = max(entries, key=entries.count)
        exceptions = {name: entry for name, entry in table.items() if entry != common}
        config["quantization"] = config["quantization_config"] = {**common, **exceptions}
    ends = tokenizer_read.write_tokenizer(gguf.file, folder, config["max_position_embeddings"])
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        index = gguf.file.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            config[f"{name}_token_id"] = gguf.config[f"{name}_token_id"] = index
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": ends[0] if len(ends) == 1 else ends})
    write_json(folder / SOURCE_FILE, {"kind": "gguf", "name": "", "config": gguf.config})
    with gguf.file.path.open("rb") as source:
        (folder / HEADER_FILE).write_bytes(source.read(gguf.file.header_bytes))
    return config
