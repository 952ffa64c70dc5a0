"""A foreign quantized folder -> the same folder in 16-bit (or 32-bit) floats, or with its codes in MLX's layout.

Tensors keep the names they have in the source, so that whatever reads the plain model reads this.
"""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxtune_convert.errors import UserError
from mlxtune_convert.families.table import family_of
from mlxtune_convert.files import write_json
from mlxtune_convert.foreign.method import BESIDE, Foreign
from mlxtune_convert.foreign.parts import Found, Part
from mlxtune_convert.foreign.weights import FLOAT8, OF_ACTIVATIONS, TYPES, Weights
from mlxtune_convert.hf import families
from mlxtune_convert.hf.configs import unquantized
from mlxtune_convert.hf.rules import Layout
from mlxtune_convert.tensors import ShardWriter

# Names that only quantization gives: one that no part uses has lost its partner.
OF_QUANTIZATION = re.compile(
    r"(_scale_inv|\.weight_(scale|scale_2|zero_point|packed|shape|global_scale|g_idx|format)|\.SCB|_proj_scale"
    r"|_proj_(blocks|scales)|\.(qweight|qzeros|scales|g_idx)|\.(nested_)?(absmax|quant_map)|\.quant_state\..*)$"
)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
TYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Opened:
    """A foreign model that is understood."""

    foreign: Foreign  # what it declares
    weights: Weights  # all its tensors
    found: Found  # its quantized tensors
    kept: bool  # their codes stay what they are, in MLX's layout
    dtype: np.dtype  # of the floats that come out
    plain: list[str]  # names of the tensors that are copied as they are

    @property
    def converted_bytes(self) -> int:
        """What the result's weights take, on the high side."""
        sizes = [math.prod(part.shape) * (1 if self.kept else self.dtype.itemsize) for part in self.found.parts]
        return sum(sizes) + sum(self.weights.array(name).nbytes for name in self.plain)

    def note(self, bits: int) -> str:
        """What becomes of it, in one line. bits: asked for, 16 for none."""
        title = self.found.title
        if not self.found.parts:
            return f"config.json names {self.foreign.name}, but no tensor is quantized: read as it is"
        if self.kept:
            left = [name for name in self.plain if len(self.weights.shape(name)) > 1 and name.endswith(".weight")]
            rest = f"; {len(left)} matrices that it left unquantized stay so (--bits 4 quantizes all anew)"
            return f"{title}: its codes are kept{rest if left else ''}"
        return f"{title}: dequantized" + ("" if bits == 16 else ", then quantized as asked")


def open_foreign(foreign: Foreign, keep: bool, dtype: str | None = None) -> Opened:
    """Read what is quantized and how; nothing is computed yet.

    keep: keep the codes where MLX can hold all of them; dtype: of the result's floats, by default the model's own.
    Raises UserError where it cannot be read, or where a tensor lacks its partner.
    """
    found = foreign.read()
    weights = Weights(foreign.folder)
    plain = _plain(foreign.config, weights, found)
    kind = TYPES[TYPE_NAMES[dtype]] if dtype else _dtype(foreign.config, weights, plain)
    all_fit = bool(found.parts) and all(part.codes for part in found.parts)
    kept = keep and dtype is None and all_fit and _same_names(foreign.config)
    return Opened(foreign, weights, found, kept, kind, plain)


def _plain(config: dict[str, Any], weights: Weights, found: Found) -> list[str]:
    """The tensors that stay as they are: of no quantized weight, and needed without quantized activations.

    Raises UserError for a tensor that is there twice, or whose weight is not there.
    """
    used: set[str] = set()
    for part in found.parts:
        used.update(part.uses)
    for part in found.parts:
        if part.name in weights and part.name not in used:
            raise weights.wrong(part.name, "is there twice, quantized and not")
    left = [name for name in weights if name not in used and not OF_ACTIVATIONS.search(name)]
    for name in left:
        if OF_QUANTIZATION.search(name) or weights.kind(name) in FLOAT8:
            raise weights.wrong(name, f"belongs to a quantized weight that is not there ({found.title})")
    needless = _needless_biases(config, weights, found.parts)
    return [name for name in left if name not in needless]


def _needless_biases(config: dict[str, Any], weights: Weights, parts: list[Part]) -> set[str]:
    """Biases of zeros that AutoGPTQ wrote for each matrix of families without biases, whose models do not take them."""
    if not family_of(config).no_biases or config.get("attention_bias") or config.get("mlp_bias"):
        return set()
    found = set()
    for part in parts:
        name = f"{part.name.removesuffix('.weight')}.bias"
        if name in weights and not weights.array(name).any():
            found.add(name)
    return found


def _same_names(config: dict[str, Any]) -> bool:
    """Whether mlx-lm takes every matrix of this family as it is: then it takes codes and scales so too."""
    layout = families.of(config)
    return config.get("model_type") in families.LAYOUTS and layout.rules == Layout().rules and not layout.early


def _dtype(config: dict[str, Any], weights: Weights, names: list[str]) -> np.dtype:
    """The type that config.json names, else the one that most unquantized numbers have, else bfloat16."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            named = str(part.get("dtype") or part.get("torch_dtype") or "").removeprefix("torch.")
            if named in TYPE_NAMES:
                return TYPES[TYPE_NAMES[named]]
    sizes: Counter[str] = Counter()
    for name in names:
        if weights.kind(name) in TYPE_NAMES.values():
            sizes[weights.kind(name)] += math.prod(weights.shape(name))
    return TYPES[sizes.most_common(1)[0][0] if sizes else "BF16"]


def write(opened: Opened, folder: Path) -> None:
    """Write the model into an empty folder, tensor by tensor, and copy what is no weight.

    Raises UserError for a tensor whose numbers are not finite.
    """
    writer = ShardWriter(folder, {"format": "mlx" if opened.kept else "pt"})
    try:
        table = _write_tensors(opened, writer)
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    config = unquantized(opened.foreign.config)
    config.pop("transformers_weights", None)  # the files have other names now
    if table:
        entries = list(table.values())
        common = max(entries, key=entries.count)
        exceptions = {name: entry for name, entry in table.items() if entry != common}
        config["quantization"] = config["quantization_config"] = {**common, **exceptions}
    _copy_rest(opened.foreign.folder, folder)
    write_json(folder / "config.json", config)


def _write_tensors(opened: Opened, writer: ShardWriter) -> dict[str, dict[str, Any]]:
    """Returns the form of each module whose codes are kept, as config.json says it."""
    for name in opened.plain:
        writer.add(name, opened.weights.array(name))
    table: dict[str, dict[str, Any]] = {}
    for part in opened.found.parts:
        if not opened.kept:
            writer.add(part.name, _dense(opened, part))
            continue
        assert part.codes is not None
        codes, module = part.codes(opened.dtype), part.name.removesuffix(".weight")
        table[module] = {"group_size": codes.group, "bits": codes.bits, "mode": codes.mode}
        for suffix, array in (("weight", codes.weight), ("scales", codes.scales), ("biases", codes.biases)):
            if array is not None:
                _require_finite(opened, part.name, array)
                writer.add(f"{module}.{suffix}", array)
    return table


def _dense(opened: Opened, part: Part) -> np.ndarray:
    array = part.dense(opened.dtype)
    _require_finite(opened, part.name, array)
    return array


def _require_finite(opened: Opened, name: str, array: np.ndarray) -> None:
    if array.dtype.kind in "uib" or np.isfinite(array).all():
        return
    raise UserError(
        f"{opened.foreign.folder}: {name} holds a number that is not finite, or too large for {opened.dtype.name}",
        "--dtype bfloat16 holds larger numbers; where that does not help the folder is damaged.",
    )


def _copy_rest(source: Path, folder: Path) -> None:
    """Everything beside the weights: tokenizer, templates, settings of processors."""
    for path in source.iterdir():
        if path.is_file() and path.suffix not in WEIGHTS and path.name not in BESIDE:
            if not path.name.endswith(".safetensors.index.json"):
                shutil.copyfile(path, folder / path.name)
        elif path.name == "additional_chat_templates" and path.is_dir():
            shutil.copytree(path, folder / path.name)
