"""MLX LoRA factors <-> a GGUF adapter file, bit for bit.

llama.cpp adds B (A x) * alpha / rank to <tensor>.weight from <tensor>.weight.lora_a [r, in] and .lora_b [out, r], the
rank being that of each tensor; expert tensors have one more dimension in front. MLX keeps the transposes (experts: the
same layout) and one scale. The rows of B move with the rows of the base, so q and k are interleaved where the base's
are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlxtune_convert import gguf_file
from mlxtune_convert.errors import UserError
from mlxtune_convert.files import write_json
from mlxtune_convert.gguf_families import FAMILIES, Family, interleave, uninterleave
from mlxtune_convert.gguf_file import FLOATS, Field, File, Writer
from mlxtune_convert.tensors import save_checked

Factors = dict[str, tuple[np.ndarray, np.ndarray, float]]  # module path -> (a, b, scale), as MLX has them
HEADS = ("attention.head_count", "attention.head_count_kv", "block_count")
MAX_BLOCKS = 1024  # or heads: a larger number is damage
CONFIG_KEYS = ("num_attention_heads", "num_key_value_heads", "num_hidden_layers")


def write_adapter(path: Path, family: Family, config: dict[str, Any], factors: Factors, base_name: str) -> None:
    """Write one GGUF adapter, float32. config: of the base.

    factors: dense a [in, r] and b [r, out]; experts a [E, r, in] and b [E, out, r]. Ranks and scales may differ: what
    does not follow from the one alpha is folded into B. Raises UserError for what llama.cpp cannot apply.
    """
    if any(name.startswith("model.embed_tokens") for name in factors):
        raise UserError(
            "an adapter on the embedding cannot be used by llama.cpp (it aborts where the embedding is also the head)",
            "Merge it: --to gguf.",
        )
    tensors = adapter_tensors(family, config, factors)
    known = {"general.base_model.count": Field.of(1), "general.base_model.0.name": Field.of(base_name)}
    out = {
        "general.architecture": Field.of(family.gguf),
        "general.type": Field.of("adapter"),
        **(known if base_name else {}),
        "adapter.type": Field.of("lora"),
        "adapter.lora.alpha": Field.of(_alpha(factors)),
        # llama.cpp reads these from the base; the way back to MLX needs them.
        **{
            f"{family.gguf}.{key}": Field.of(int(config[name]))
            for key, name in zip(HEADS, CONFIG_KEYS, strict=True)
            if config.get(name)
        },
    }
    with Writer(path, out, {name: array.shape for name, array in tensors.items()}) as writer:
        for name, array in tensors.items():
            writer.add(name, "F32", array)


def _alpha(factors: Factors) -> float:
    """scale * rank of most modules."""
    found = [scale * _rank(a) for a, _, scale in factors.values()]
    return float(max(found, key=found.count))


def _rank(a: np.ndarray) -> int:
    return a.shape[-1] if a.ndim == 2 else a.shape[-2]


def adapter_tensors(family: Family, config: dict[str, Any], factors: Factors) -> dict[str, np.ndarray]:
    """The tensors of an adapter file under GGUF's names, float32."""
    alpha = _alpha(factors)
    out = {}
    for path, (a, b, scale) in factors.items():
        name = family.gguf_name(f"{path}.weight")
        rest = np.float32(scale * _rank(a) / alpha)
        a, b = (a, b) if a.ndim == 3 else (a.T, b.T)
        b = b if rest == 1 else b * rest
        heads = family.heads(name, config)
        out[f"{name}.lora_a"] = np.ascontiguousarray(a, dtype=np.float32)
        out[f"{name}.lora_b"] = np.ascontiguousarray(interleave(b, heads) if heads else b, dtype=np.float32)
    return out


def check_adapter(path: Path, family: Family, config: dict[str, Any], factors: Factors) -> int:
    """Read the file back; return how many tensors equal theirs bit for bit. Raises UserError when one does not."""
    file, expected = gguf_file.read(path), adapter_tensors(family, config, factors)
    for name, array in expected.items():
        if file.rows(name).tobytes() != array.tobytes():
            raise UserError(f"{name}: the file does not hold what was trained", "Check the disk.")
    return len(expected)


def is_adapter(file: File) -> bool:
    return file.get("general.type") == "adapter"


def convert(file: File, folder: Path, base: dict[str, Any] | None) -> int:
    """Write an MLX adapter folder; return the number of adapted modules. base: config.json of the base, where the file
    itself does not say how many heads and blocks that has.

    Raises UserError for another kind of adapter, for what is damaged, and when the base must be named.
    """
    if file.get("adapter.type") != "lora":
        raise UserError(f"{file.path}: an adapter of type {str(file.get('adapter.type'))[:40]!r}, not lora")
    alpha = file.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not np.isfinite(alpha) or "adapter.alora.invocation_tokens" in file.fields:
        raise UserError(f"{file.path}: adapter.lora.alpha is {str(alpha)[:40]}, or the adapter is an activated one")
    family = _family(file)
    config = _base_numbers(file, family, base)
    modules: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
    for name, tensor in file.tensors.items():
        if not name.endswith(".weight.lora_a"):
            continue
        stem = name.removesuffix(".lora_a")
        heads = family.heads(stem, config)
        a, b = (file.rows(f"{stem}.lora_{letter}").astype(np.float32) for letter in "ab")
        if heads and b.shape[0] % (2 * heads):
            raise UserError(f"{file.path}: {stem} has {b.shape[0]} rows for {heads} heads", "Name its own base.")
        b = uninterleave(b, heads) if heads else b
        rank = tensor.shape[-2]
        modules[family.mlx_name(stem).removesuffix(".weight")] = (a, b, alpha / rank if alpha else 1.0)
    _write_mlx(folder, modules, config["num_hidden_layers"], file.path)
    return len(modules)


def _family(file: File) -> Family:
    """The family whose tensors these are. Also checks that factors come in fitting pairs of floats."""
    stems = {name.removesuffix(end) for name in file.tensors for end in (".lora_a", ".lora_b") if name.endswith(end)}
    for stem in stems:
        pair = [file.tensors.get(f"{stem}.lora_{letter}") for letter in "ab"]
        a, b = pair
        if a is None or b is None or a.kind not in FLOATS or b.kind not in FLOATS:
            raise UserError(f"{file.path}: {stem[:80]} has no pair of float factors", "The file is damaged.")
        fit = len(a.shape) == len(b.shape) >= 2 and a.shape[:-2] == b.shape[:-2] and a.shape[-2] == b.shape[-1]
        if not fit:
            raise UserError(f"{file.path}: the factors of {stem[:80]} do not fit: {a.shape} and {b.shape}")
    if not stems or len(stems) * 2 != len(file.tensors):
        raise UserError(f"{file.path}: tensors that are no LoRA factors", "MLX adapters hold factors alone.")
    known = [family for family in FAMILIES if family.gguf == file.get("general.architecture")]
    error: UserError | None = None
    for family in known:
        try:
            for stem in stems:
                family.mlx_name(stem)
            return family
        except UserError as caught:
            error = caught
    raise error or UserError(f"{file.path}: adapters for {str(file.get('general.architecture'))[:40]} are not known")


def _base_numbers(file: File, family: Family, base: dict[str, Any] | None) -> dict[str, Any]:
    found = {name: file.get(f"{family.gguf}.{key}") for key, name in zip(HEADS, CONFIG_KEYS, strict=True)}
    if base is not None:
        found = {name: base.get(name) for name in CONFIG_KEYS}
    if not all(isinstance(value, int) and 0 < value <= MAX_BLOCKS for value in found.values()):
        raise UserError(
            f"{file.path} does not say how many heads and blocks its base has", "Name the base: --base MODEL_FOLDER."
        )
    return found


def _write_mlx(folder: Path, modules: Factors, layers: int, source: Path) -> None:
    """MLX has one rank and scale, and the same modules in each of the last blocks: smaller ranks are padded with zeros,
    other scales folded into b, absent modules are zero.
    """
    places = {path: path.removeprefix("model.layers.").split(".", 1) for path in modules}
    if not all(len(parts) == 2 and parts[0].isdecimal() and int(parts[0]) < layers for parts in places.values()):
        raise UserError(f"{source}: it adapts more than the base's {layers} blocks", "Name its own base.")
    rank = max(a.shape[-2] for a, _, _ in modules.values())
    scales = [scale for _, _, scale in modules.values()]
    scale = max(scales, key=scales.count)
    keys = sorted({parts[1] for parts in places.values()})
    first = min(int(parts[0]) for parts in places.values())
    tensors: dict[str, np.ndarray] = {}
    for key in keys:
        pattern = next(modules[path] for path, parts in places.items() if parts[1] == key)
        for layer in range(first, layers):
            path = f"model.layers.{layer}.{key}"
            a, b, own = modules.get(path) or (np.zeros_like(pattern[0]), np.zeros_like(pattern[1]), scale)
            missing = rank - a.shape[-2]
            a = np.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, missing), (0, 0)])
            b = np.pad(b, [(0, 0)] * (b.ndim - 1) + [(0, missing)])
            b = b if own == scale else b * np.float32(own / scale)
            for letter, array in (("a", a), ("b", b)):
                tensors[f"{path}.lora_{letter}"] = np.ascontiguousarray(array if array.ndim == 3 else array.T)
    save_checked(folder / "adapters.safetensors", tensors, {"format": "mlx"})
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    write_json(
        folder / "adapter_config.json",
        {"fine_tune_type": "lora", "num_layers": layers - first, "lora_parameters": parameters},
    )
