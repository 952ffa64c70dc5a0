"""An MLX model folder read without MLX: its layers, its types, and its weights as the dense matrices they stand for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from mlxtune_convert.checks import merged
from mlxtune_convert.errors import UserError
from mlxtune_convert.files import matching, read_json
from mlxtune_convert.gguf.quant_blocks import Codes, dequantize
from mlxtune_convert.hf.configs import QUANTIZATION_KEYS, SOURCE_FILE
from mlxtune_convert.peft.adapter_folder import Adapter
from mlxtune_convert.peft.base_model import Base
from mlxtune_convert.peft.tensors import is_head
from mlxtune_convert.tensors import weight_files

FLOAT32 = np.dtype(np.float32)
FLOATS = {"F32": FLOAT32, "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
OF_CODES = ("weight", "scales", "biases", "global_scale")  # what a quantized matrix consists of
# group_size and bits of each mode where an entry of config.json leaves them out, as MLX has them.
DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
CHUNK_ROWS = 8192  # of a matrix that are dense in float32 at a time
# Largest E4M3 number times largest E2M1 number: what MLX divides the largest weight of a tensor by (nvfp4).
NVFP4_RANGE = np.float32(448 * 6)


@dataclass(frozen=True)
class Stored:
    """A tensor where it lies."""

    file: Path  # that holds it
    dtype: str  # as safetensors spells it, such as BF16 or U32
    shape: tuple[int, ...]  # as stored: of codes, in words


@dataclass(frozen=True)
class MlxFolder:
    """A model folder, its headers read; tensors are read when they are asked for."""

    path: Path  # of the folder
    config: dict[str, Any]  # its config.json
    tensors: dict[str, Stored]  # by name
    is_mlx: bool  # they are named and shaped as in MLX, not as in Hugging Face's files

    @staticmethod
    def open(path: Path) -> MlxFolder:
        """Reads headers alone. Raises UserError when it is no model folder."""
        config = read_json(path / "config.json", "an MLX model folder: config.json and safetensors weights")
        tensors: dict[str, Stored] = {}
        formats = set()
        for file in weight_files(path):
            with safe_open(file, "numpy") as opened:
                formats.add((opened.metadata() or {}).get("format"))
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    tensors[name] = Stored(file, part.get_dtype(), tuple(part.get_shape()))
        is_mlx = formats == {"mlx"} or "quantization" in config or (path / SOURCE_FILE).is_file()
        if is_mlx:
            _require_whole_layers(path, tensors)
        return MlxFolder(path, config, tensors, is_mlx)

    def require_mlx(self) -> None:
        """Raise UserError when this is another maker's folder."""
        if not self.is_mlx:
            raise UserError(f"{self.path} is no MLX model folder", "Name what mlxtune convert or mlx_lm.convert made.")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path of every layer -> the shape of its matrix when dense; () where it has none."""
        found: dict[str, tuple[int, ...]] = {}
        for name, stored in self.tensors.items():
            path, _, part = name.rpartition(".")
            found.setdefault(path, ())
            if part == "weight":
                *rows, columns = stored.shape or (1,)
                if self.is_quantized(path):
                    columns = columns * 32 // self.form(path)["bits"]
                found[path] = (*rows, columns)
        return found

    @property
    def base(self) -> Base:
        return Base(self.path, source_of(self.path)["config"], self)

    @property
    def own_head(self) -> bool:
        """Whether there is a head beside the embedding."""
        return any(is_head(path) for path in self.shapes)

    @cached_property
    def dtype(self) -> np.dtype:
        """The floating type that most of the model's numbers have (scales stand for quantized weights)."""
        sizes: Counter[str] = Counter()
        for stored in self.tensors.values():
            if stored.dtype in FLOATS:
                sizes[stored.dtype] += math.prod(stored.shape)
        if not sizes:
            raise UserError(f"{self.path} holds no floating numbers of a known type", "Convert it again.")
        return FLOATS[sizes.most_common(1)[0][0]]

    @property
    def parameters(self) -> int:
        """Numbers in the model when dense."""
        quantized = sum(math.prod(self.shapes[path]) for path in self.shapes if self.is_quantized(path))
        return quantized + sum(math.prod(self.tensors[name].shape) for name in self.tensors if not self._codes(name))

    def is_quantized(self, path: str) -> bool:
        return f"{path}.scales" in self.tensors and f"{path}.weight" in self.tensors

    def _codes(self, name: str) -> bool:
        """Whether a tensor is a part of a quantized matrix."""
        path, _, part = name.rpartition(".")
        return part in OF_CODES and self.is_quantized(path)

    def form(self, path: str) -> dict[str, Any]:
        """bits, group_size and mode of a quantized layer: its own entry in config.json, else the common one.

        Raises UserError when these cannot be the tensors' (mlx-lm would then guess from the model's widths).
        """
        table = self.config.get("quantization")
        common = table if isinstance(table, dict) else {}
        entry = common[path] if isinstance(common.get(path), dict) else common
        words, groups = self.tensors[f"{path}.weight"].shape[-1], self.tensors[f"{path}.scales"].shape[-1]
        mode = str(entry.get("mode", "affine"))
        usual = DEFAULTS.get(mode, (None, None))
        group, bits = entry.get("group_size", usual[0]), entry.get("bits", usual[1])
        if not isinstance(bits, int) or not isinstance(group, int) or words * 32 != groups * group * bits:
            raise UserError(
                f"{self.path}: {path} is not quantized as config.json says ({mode}, {bits} bits, groups of {group})",
                "Convert the model again.",
            )
        if (mode == "affine") != (f"{path}.biases" in self.tensors):
            raise UserError(f"{self.path}: {path} is not quantized as config.json says (mode {mode})")
        return {"bits": bits, "group_size": group, "mode": mode}

    def dense(self, dtype: np.dtype, adapter: Adapter | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array) of every tensor of the dense model, in MLX's shape and floats in `dtype`.

        A quantized matrix is computed in float32, as MLX does from its scales in float32, and rounded once. One tensor
        is in memory at a time, and CHUNK_ROWS of its rows in float32. adapter: under MLX's names, folded in (then a
        whole matrix is in float32).
        """
        updates, trained = ({}, {}) if adapter is None else (adapter.updates, adapter.trained)
        for name in self.tensors:
            path, _, part = name.rpartition(".")
            if self._codes(name) and part != "weight":
                continue
            if name in trained:
                yield name, _rounded(trained[name], dtype)
            elif part == "weight" and path in updates:
                yield name, _rounded(merged(self.matrix(path, FLOAT32), updates[path]), dtype)
            elif part == "weight":
                yield name, self.matrix(path, dtype)
            else:
                yield name, _rounded(self.read(name), dtype)

    def read(self, name: str) -> np.ndarray:
        """One tensor as it is stored, in that shape."""
        with safe_open(self.tensors[name].file, "numpy") as opened:
            array: np.ndarray = opened.get_tensor(name)
        return array

    def matrix(self, path: str, dtype: np.dtype = FLOAT32) -> np.ndarray:
        """The weight of a layer, [out, in] or [E, out, in]; that of a quantized one is computed in float32 and rounded
        to `dtype`.
        """
        if not self.is_quantized(path):
            return _rounded(self.read(f"{path}.weight"), dtype)
        form = self.form(path)
        parts = {part: self.read(f"{path}.{part}") for part in OF_CODES if f"{path}.{part}" in self.tensors}
        *outer, words = parts["weight"].shape  # outer: [out] or [E, out]
        rows = math.prod(outer)
        weight = parts["weight"].reshape(rows, words)
        groups = parts["scales"].shape[-1]
        scales = parts["scales"].reshape(-1, groups)
        biases = parts["biases"].reshape(-1, groups) if "biases" in parts else None
        factor = self._factor(path, parts, outer)
        out = np.empty((rows, words * 32 // form["bits"]), dtype)
        for start in range(0, rows, CHUNK_ROWS):
            here = slice(start, start + CHUNK_ROWS)
            codes = Codes(
                weight[here],
                scales[here],
                None if biases is None else biases[here],
                form["bits"],
                form["group_size"],
                form["mode"],
            )
            out[here] = _rounded(dequantize(codes, None if factor is None else factor[here]), dtype)
        return out.reshape(*outer, -1)

    def _factor(self, path: str, parts: dict[str, np.ndarray], rows: list[int]) -> np.ndarray | None:
        """[rows, 1] what the scale of a whole tensor (nvfp4) multiplies the scales of its rows by; None without one."""
        if "global_scale" not in parts:
            return None
        scale = parts["global_scale"].astype(np.float32).reshape(-1, 1) / NVFP4_RANGE
        return np.repeat(scale, math.prod(rows) // len(scale), axis=0)


def _require_whole_layers(folder: Path, tensors: dict[str, Stored]) -> None:
    """Raise UserError where a quantized layer lost its codes, or codes lost their scales."""
    for name, stored in tensors.items():
        path, _, part = name.rpartition(".")
        if part == "scales" and f"{path}.weight" not in tensors:
            lost = "weight"
        elif part == "weight" and stored.dtype == "U32" and f"{path}.scales" not in tensors:
            lost = "scales"
        else:
            continue
        raise UserError(f"{folder}: {path} has a {part} tensor and no {lost}", "Convert or download the model again.")


def _rounded(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Floats in another type, what is too large for it infinite, as in MLX; other numbers as they are."""
    if array.dtype not in FLOATS.values():
        return array
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def source_of(path: Path) -> dict[str, Any]:
    """Where a converted model came from: {"kind", "name", "config"}; its own config when it was not converted by
    mlxtune.
    """
    file = path / SOURCE_FILE
    if file.is_file():
        source = read_json(file, "written by mlxtune convert")
        kinds = {"kind": str, "name": str, "config": dict}
        wrong = [key for key, kind in kinds.items() if not isinstance(source.get(key), kind)]
        if wrong:
            raise UserError(f"{file}: its {wrong[0]} is {source.get(wrong[0])!r:.80}", "Convert the model again.")
        return source
    config = read_json(path / "config.json", "a model folder")
    kind = "mlx" if any(config.get(key) for key in QUANTIZATION_KEYS) else "hf"
    return {"kind": kind, "name": "", "config": config}


def base_of(path: Path) -> Base:
    """What a base's folder, or its config.json alone, says about names.

    Raises UserError when it is neither. A Hugging Face folder's weights are not looked at: they have other names.
    """
    if path.is_file():
        return Base(path.parent, read_json(path, "the base model's config.json"), None)
    config = source_of(path)["config"]
    if not matching(path, "model*.safetensors"):
        return Base(path, config, None)
    folder = MlxFolder.open(path)
    return folder.base if folder.is_mlx else Base(path, config, None)
