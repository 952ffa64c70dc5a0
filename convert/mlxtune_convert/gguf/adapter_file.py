"""LoRA factors <-> a GGUF adapter file, bit for bit.

llama.cpp adds B (A x) * alpha / rank to <tensor>.weight from <tensor>.weight.lora_a [r, in] and .lora_b [out, r], the
rank being that of each tensor; expert tensors have one more dimension in front. MLX keeps the transposes (experts: the
same layout). The rows of B move with the rows of the base, so q and k are interleaved where the base's are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlxtune_convert.errors import UserError
from mlxtune_convert.gguf.architectures import FAMILIES
from mlxtune_convert.gguf.container import FLOATS, Field, File, Writer
from mlxtune_convert.gguf.family import GgufFamily, uninterleave
from mlxtune_convert.gguf.tensor_name import TensorName
from mlxtune_convert.peft.adapter_folder import Update

# GGUF key -> config.json key. llama.cpp reads them from the base; the way back to MLX needs them here.
BASE_KEYS = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "block_count": "num_hidden_layers",
}
MAX_BLOCKS = 1024  # or heads: a larger number is damage
A, B = ".lora_a", ".lora_b"  # what follows the name of the adapted tensor


def write_adapter(
    path: Path, family: GgufFamily, config: dict[str, Any], updates: dict[str, Update], base_name: str
) -> None:
    """Write one GGUF adapter, float32. config: of the base; updates: by module path in MLX.

    Ranks and scales may differ: what does not follow from the one alpha is folded into B. Raises UserError for what
    llama.cpp cannot apply.
    """
    if any(name.startswith("model.embed_tokens") for name in updates):
        raise UserError(
            "an adapter on the embedding cannot be used by llama.cpp (it aborts where the embedding is also the head)",
            "Merge it: --to gguf.",
        )
    tensors = adapter_tensors(family, config, updates)
    fields: dict[str, Any] = {"general.architecture": family.gguf, "general.type": "adapter"}
    if base_name:
        fields |= {"general.base_model.count": 1, "general.base_model.0.name": base_name}
    fields |= {"adapter.type": "lora", "adapter.lora.alpha": _alpha(updates)}
    fields |= {f"{family.gguf}.{key}": int(config[name]) for key, name in BASE_KEYS.items() if config.get(name)}
    shapes = {name: array.shape for name, array in tensors.items()}
    with Writer(path, {key: Field.of(value) for key, value in fields.items()}, shapes) as writer:
        for name, array in tensors.items():
            writer.add(name, "F32", array)


def _alpha(updates: dict[str, Update]) -> float:
    """scale * rank of most modules."""
    found = [update.scale * update.rank for update in updates.values()]
    return float(max(found, key=found.count))


def adapter_tensors(family: GgufFamily, config: dict[str, Any], updates: dict[str, Update]) -> dict[str, np.ndarray]:
    """The tensors of an adapter file under GGUF's names, float32."""
    alpha = _alpha(updates)
    out = {}
    for path, update in updates.items():
        name = family.gguf_name(f"{path}.weight")
        rest = np.float32(update.scale * update.rank / alpha)
        if update.a.ndim == 3:  # experts: [E, r, in] and [E, out, r] on both sides
            a, b = update.a, update.b
        else:
            a, b = update.a.T, update.b.T  # [r, in] and [out, r]
        if rest != 1:
            b = b * rest
        columns = family.column_order(name, config)
        if columns is not None:
            a = a[..., columns]
        rows = family.row_order(name, config, len(b))
        if rows is not None:
            b = b[rows]
        out[name + A] = np.ascontiguousarray(a, dtype=np.float32)
        out[name + B] = np.ascontiguousarray(b, dtype=np.float32)
    return out


def is_adapter(file: File) -> bool:
    return file.get("general.type") == "adapter"


def read_adapter(file: File, base: dict[str, Any] | None) -> tuple[dict[str, Update], int]:
    """The updates of a GGUF adapter by module path in MLX, and how many blocks its base has. base: config.json of the
    base, where the file itself does not say how many heads and blocks that has.

    Raises UserError for another kind of adapter, for what is damaged, and when the base must be named.
    """
    alpha = _alpha_of(file)
    names = _adapted(file)
    family = _family(file, names)
    config = {name: (base or {}).get(name, file.get(f"{family.gguf}.{key}")) for key, name in BASE_KEYS.items()}
    if not all(isinstance(value, int) and 0 < value <= MAX_BLOCKS for value in config.values()):
        raise UserError(
            f"{file.path} does not say how many heads and blocks its base has", "Name the base: --base MODEL_FOLDER."
        )
    layers = config["num_hidden_layers"]
    updates = {}
    for name in names:
        block = TensorName.of(name).block
        if block is None or block >= layers:
            raise UserError(f"{file.path}: it adapts more than the base's {layers} blocks", "Name its own base.")
        updates[family.mlx_name(name).removesuffix(".weight")] = _update(file, name, family.heads(name, config), alpha)
    return updates, layers


def _update(file: File, name: str, heads: int, alpha: float) -> Update:
    """The update of one tensor. heads: in how many groups its rows are interleaved, 0 for none; alpha: 0 for none."""
    a = file.rows(name + A).astype(np.float32)  # [r, in]; of experts [E, r, in]
    b = file.rows(name + B).astype(np.float32)  # [out, r]; of experts [E, out, r]
    if heads and len(b) % (2 * heads):
        raise UserError(f"{file.path}: {name} has {len(b)} rows for {heads} heads", "Name its own base.")
    scale = alpha / a.shape[-2] if alpha else 1.0
    b = uninterleave(b, heads)
    if a.ndim == 3:
        return Update(a, b, scale)
    return Update(a.T, b.T, scale)  # [in, r] and [r, out], as MLX has them


def _alpha_of(file: File) -> float:
    """lora_alpha. Raises UserError for an adapter of another kind than LoRA."""
    kind = file.get("adapter.type")
    if kind != "lora":
        raise UserError(f"{file.path}: an adapter of type {str(kind)[:40]!r}, not lora")
    alpha = file.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not np.isfinite(alpha) or "adapter.alora.invocation_tokens" in file.fields:
        raise UserError(f"{file.path}: adapter.lora.alpha is {str(alpha)[:40]}, or the adapter is an activated one")
    return alpha


def _adapted(file: File) -> list[str]:
    """The names of the adapted tensors, such as blk.0.attn_q.weight.

    Raises UserError unless the file holds fitting pairs of float factors alone.
    """
    if not file.tensors:
        raise UserError(f"{file.path}: it adapts no layer: it has no tensors", "Copy or download it again.")
    names = []
    for factor in file.tensors:
        if factor.endswith(f".weight{A}"):
            names.append(factor.removesuffix(A))
    for name in names:
        a, b = file.tensors.get(name + A), file.tensors.get(name + B)
        if a is None or b is None or a.kind not in FLOATS or b.kind not in FLOATS:
            raise UserError(f"{file.path}: {name[:80]} has no pair of float factors", "The file is damaged.")
        if not _fit(a.shape, b.shape):
            raise UserError(f"{file.path}: the factors of {name[:80]} do not fit: {a.shape} and {b.shape}")
    if not names or len(names) * 2 != len(file.tensors):
        raise UserError(f"{file.path}: tensors that are no LoRA factors", "MLX adapters hold factors alone.")
    return names


def _fit(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether a is [..., r, in] and b [..., out, r], with the same number of experts in front, if any."""
    if len(a) != len(b) or len(a) < 2:
        return False
    return a[:-2] == b[:-2] and a[-2] == b[-1]


def _family(file: File, names: list[str]) -> GgufFamily:
    """The family of the file's architecture that has all of these tensors."""
    architecture = file.get("general.architecture")
    error = UserError(f"{file.path}: adapters for {str(architecture)[:40]} are not known")
    for family in FAMILIES:
        if family.gguf != architecture or family.written_only:
            continue
        try:
            for name in names:
                family.mlx_name(name)
            return family
        except UserError as caught:
            error = caught
    raise error
