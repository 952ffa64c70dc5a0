"""Whose quantization a model folder has, as its files declare it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxtune_convert.errors import UserError
from mlxtune_convert.families.table import family_of
from mlxtune_convert.files import read_json
from mlxtune_convert.foreign import bitsandbytes, compressed, fp4, fp8, modelopt, packed
from mlxtune_convert.foreign.original import advice
from mlxtune_convert.foreign.parts import Found
from mlxtune_convert.foreign.weights import FLOAT8, Weights

DECLARED = ("quantization_config", "compression_config")
TEXT = ("text_config", "language_config", "llm_config")  # where a model with several parts may declare it
# Files beside config.json in which older tools declare it, and the method where they do not name it.
BESIDE = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
ALIASES = {"compressed_tensors": "compressed-tensors", "sparseml": "compressed-tensors", "modelopt_fp4": "modelopt"}

Reader = Callable[[Weights, dict[str, Any]], Found]
READERS: dict[str, Reader] = {
    "fp8": fp8.find,
    "mxfp8": fp8.find,
    "compressed-tensors": compressed.find,
    "bitsandbytes": lambda weights, _: bitsandbytes.find(weights),
    "gptq": packed.gptq,
    "awq": packed.awq,
    "modelopt": modelopt.find,
    "mxfp4": lambda weights, _: fp4.gpt_oss(weights),
}
NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "hqq": "HQQ",
    "quanto": "Quanto",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "eetq": "EETQ",
    "bitnet": "BitNet",
    "fbgemm_fp8": "FBGEMM fp8",
    "spqr": "SpQR",
    "higgs": "HIGGS",
    "quark": "Quark",
    "auto-round": "AutoRound",
    "fp_quant": "FP-Quant",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "sinq": "SINQ",
}


@dataclass(frozen=True)
class Foreign:
    """A folder that another maker's tool quantized."""

    folder: Path  # of the model
    method: str  # its quant_method; "" where nothing names it
    settings: dict[str, Any]  # what it declares about that
    config: dict[str, Any] = field(repr=False)  # its config.json

    @property
    def name(self) -> str:
        """For people."""
        return _name(self.method) or "a method that no file names"

    def read(self) -> Found:
        """Its quantized tensors. Raises UserError where they cannot be read, with what to take instead."""
        if self.method not in READERS:
            raise self.not_here()
        return READERS[self.method](Weights(self.folder), self.settings)

    def not_here(self) -> UserError:
        """The error where only an MLX or 16-bit folder will do."""
        if self.method not in READERS:
            return UserError(f"{self.folder} is quantized with {self.name}, which cannot be read", advice(self.folder))
        return UserError(
            f"{self.folder} is quantized with {self.name}: that is read by `mlxtune convert` alone",
            f"Make an MLX model of it: mlxtune convert {self.folder} OUT",
        )


def of_folder(folder: Path, config: dict[str, Any]) -> Foreign | None:
    """Another maker's quantization, or None: not quantized, MLX's own, or one that mlx-lm reads as it is.

    Raises UserError where config.json declares it as something else than an object, and what `weight_files` raises.
    """
    if is_mlx(config):
        return None
    declared = _declared(folder, config)
    found = Foreign(folder, _method(declared), declared, config) if declared else _shown(folder, config)
    return None if of_mxfp4(config) and Weights(folder).ending("_blocks") else found


def unread(settings: dict[str, Any]) -> str:
    """The name of a method that cannot be read; "" for one that can, or where none is declared."""
    method = _method(settings)
    return "" if method in READERS else _name(method)


def _name(method: str) -> str:
    return NAMES.get(method, method[:40])


def of_mxfp4(config: dict[str, Any]) -> bool:
    """Whether it is declared as such a family is published, with codes that mlx-lm reads as they are (gpt-oss)."""
    settings = config.get("quantization_config")
    return family_of(config).mxfp4 and isinstance(settings, dict) and settings.get("quant_method") == "mxfp4"


def is_mlx(config: dict[str, Any]) -> bool:
    """Whether config.json says that MLX quantized the model."""
    own = config.get("quantization")
    return isinstance(own, dict) and "group_size" in own and "bits" in own


def _declared(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """What config.json declares, or a file beside it."""
    for part in (config, *(config.get(key) for key in TEXT)):
        for key in DECLARED:
            settings = part.get(key) if isinstance(part, dict) else None
            if settings is not None and not isinstance(settings, dict):
                raise UserError(f"{folder}/config.json: {key} must be an object, found {type(settings).__name__}")
            if settings:
                return settings
    for name, method in BESIDE.items():
        if (folder / name).is_file():
            settings = {"quant_method": method, **read_json(folder / name, "settings of a quantization")}
            if method == "modelopt" or Weights(folder).ending(".qweight"):
                return settings
    return None


def _method(settings: dict[str, Any]) -> str:
    """quant_method in lower case; where it is missing, what the other keys belong to."""
    method = settings.get("quant_method")
    if isinstance(method, str) and method:
        return ALIASES.get(method.lower(), method.lower())
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    if "config_groups" in settings:
        return "compressed-tensors"
    return "modelopt" if "quant_algo" in settings else ""


def _shown(folder: Path, config: dict[str, Any]) -> Foreign | None:
    """What the tensors show where nothing is declared."""
    weights = Weights(folder)
    if any(bitsandbytes.STATE in name or name.endswith(".SCB") for name in weights):
        return Foreign(folder, "bitsandbytes", {}, config)
    if weights.ending(".qweight") or weights.ending(".weight_packed"):
        return Foreign(folder, "", {}, config)
    if any(weights.kind(name) in FLOAT8 for name in weights):
        return Foreign(folder, "fp8", {}, config)
    return None
