"""A GGUF model file -> an MLX model folder, code for code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor

from mlxtune_convert import vocab
from mlxtune_convert.configs import SOURCE_FILE
from mlxtune_convert.errors import UserError
from mlxtune_convert.families import Family, by_gguf, uninterleave
from mlxtune_convert.files import write_json
from mlxtune_convert.quant import BLOCKS, GROUP, from_blocks
from mlxtune_convert.tensors import ShardWriter

PLAIN = {"F32": np.float32, "F16": np.float16}


@dataclass(frozen=True)
class Gguf:
    """An opened GGUF model: its key-value pairs, its tensors (memory-mapped), its family."""

    path: Path
    metadata: dict[str, Any]
    tensors: list[ReaderTensor]
    family: Family

    @property
    def quantized(self) -> bool:
        return any(tensor.tensor_type.name in BLOCKS for tensor in self.tensors)

    def value(self, key: str, default: Any = None) -> Any:
        """The architecture's own value, such as `block_count`. Raises UserError when it is required and missing."""
        name = f"{self.family.gguf}.{key}"
        if name not in self.metadata and default is None:
            raise UserError(f"{self.path}: the GGUF has no {name}", "The file is damaged or was made by another tool.")
        return self.metadata.get(name, default)


def open_gguf(path: Path) -> Gguf:
    """Read a GGUF file's header and map its tensors.

    Raises UserError when it is no GGUF file, is torn, or holds an architecture, vocabulary or tensor type that cannot
    be mapped losslessly.
    """
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = list(reader.tensors)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a GGUF file, or a torn one ({error})", "Copy or download it again.") from error
    family = by_gguf(str(metadata.get("general.architecture")))
    vocab.check_supported(metadata)
    if metadata.get(f"{family.gguf}.rope.scaling.type", "none") != "none":
        raise UserError(
            f"{path}: rope scaling cannot be converted from GGUF yet",
            "Convert from the original Hugging Face model instead.",
        )
    unmapped = sorted({tensor.tensor_type.name for tensor in tensors} - set(BLOCKS) - set(PLAIN))
    if unmapped:
        raise UserError(
            f"{path}: tensors of type {', '.join(unmapped)} have no lossless MLX form "
            f"(covered: {', '.join([*BLOCKS, *PLAIN])})",
            "Convert a Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or F16 file, or the original Hugging Face model.",
        )
    for tensor in tensors:
        family.hf_name(tensor.name)
    gguf = Gguf(path, metadata, tensors, family)
    _require_all_tensors(gguf)
    return gguf


def _require_all_tensors(gguf: Gguf) -> None:
    have = {tensor.name for tensor in gguf.tensors}
    needed = [stem for stem in gguf.family.names if stem != "output"]  # without it, the embedding is the head
    layers = range(gguf.value("block_count"))
    names = dict.fromkeys(f"{stem.format(layer)}.weight" for layer in layers for stem in needed)
    missing = [name for name in names if name not in have]
    if missing:
        parts = gguf.metadata.get("split.count", 1)
        raise UserError(
            f"{gguf.path}: {len(missing)} tensors are missing, first {missing[0]}",
            f"It is one of {parts} parts: merge them with llama-gguf-split." if parts > 1 else "Download it again.",
        )


def model_config(gguf: Gguf) -> dict[str, Any]:
    """config.json as transformers writes it for this family."""
    names = {tensor.name for tensor in gguf.tensors}
    width, heads = gguf.value("embedding_length"), gguf.value("attention.head_count")
    tokens = gguf.metadata["tokenizer.ggml.tokens"]
    config = {
        "architectures": [gguf.family.architecture],
        "model_type": gguf.family.model_type,
        "hidden_size": width,
        "intermediate_size": gguf.value("feed_forward_length"),
        "num_hidden_layers": gguf.value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.value("attention.head_count_kv", heads),
        "head_dim": gguf.value("attention.key_length", width // heads),
        "max_position_embeddings": gguf.value("context_length"),
        "rms_norm_eps": _decimal(gguf.value("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(gguf.value("rope.freq_base", 10000.0)),
        "vocab_size": len(tokens),
        "tie_word_embeddings": "output.weight" not in names,
        "torch_dtype": "float16",
        **gguf.family.extra_config,
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        index = gguf.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            config[f"{name}_token_id"] = index
    return config


def _decimal(value: float) -> float:
    """GGUF stores float32; the decimal that was meant is the shortest one with the same float32."""
    return float(str(np.float32(value)))


def mlx_tensors(gguf: Gguf) -> Iterator[tuple[str, np.ndarray | tuple[np.ndarray, np.ndarray, np.ndarray, int]]]:
    """(HF name, float array) for plain tensors; (HF stem, (weight, scales, biases, bits)) for quantized ones."""
    heads = {
        "attn_q": gguf.value("attention.head_count"),
        "attn_k": gguf.value("attention.head_count_kv", gguf.value("attention.head_count")),
    }
    for tensor in gguf.tensors:
        name, interleaved = gguf.family.hf_name(tensor.name)
        kind = tensor.tensor_type.name
        count = heads[tensor.name.split(".")[2]] if interleaved else 0
        if kind in PLAIN:
            # Norms come as float32; MLX wants one activation dtype, and float16 holds what a float16 file held.
            array = np.asarray(tensor.data).astype(PLAIN[kind], copy=False)
            array = uninterleave(array, count) if interleaved else array
            yield name, _as_float16(array)
        else:
            rows = uninterleave(np.asarray(tensor.data), count) if interleaved else np.asarray(tensor.data)
            try:
                affine = from_blocks(rows, kind)
            except ValueError as error:
                raise UserError(f"{gguf.path}: {tensor.name}: {error}", "Download it again.") from error
            yield name.removesuffix(".weight"), (affine.weight, affine.scales, affine.biases, affine.bits)


def _as_float16(array: np.ndarray) -> np.ndarray:
    """float16 when that loses nothing, else as it is."""
    with np.errstate(over="ignore"):  # an overflow is what the comparison finds
        half = array.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), array.astype(np.float32)) else array


def convert(gguf: Gguf, folder: Path) -> dict[str, Any]:
    """Write an MLX model folder that `mlx_lm.load` loads. Returns its config.json.

    Every quantized tensor keeps its codes and scales: dequantized in float32 it equals the GGUF's own values bit for
    bit.
    """
    config = model_config(gguf)
    writer = ShardWriter(folder, {"format": "mlx"})
    overrides: dict[str, dict[str, Any]] = {}
    for name, value in mlx_tensors(gguf):
        if isinstance(value, tuple):
            weight, scales, biases, bits = value
            overrides[name] = {"group_size": GROUP, "bits": bits, "mode": "affine"}
            for suffix, array in (("weight", weight), ("scales", scales), ("biases", biases)):
                writer.add(f"{name}.{suffix}", array)
        else:
            writer.add(name, value)
    writer.close()
    original = dict(config)
    if overrides:
        widths = [entry["bits"] for entry in overrides.values()]
        common = max(set(widths), key=widths.count)
        table: dict[str, Any] = {"group_size": GROUP, "bits": common, "mode": "affine"}
        table.update({name: entry for name, entry in overrides.items() if entry["bits"] != common})
        config["quantization"] = config["quantization_config"] = table
    ends = vocab.write_tokenizer(gguf.metadata, folder, gguf.value("context_length"))
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": ends[0] if len(ends) == 1 else ends})
    write_json(folder / SOURCE_FILE, {"kind": "gguf", "name": "", "config": original})
    return config
