"""A model folder or hub id -> a model ready to run or to tune on this device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlxtune_convert import unheeded
from mlxtune_convert.configs import QUANTIZATION_KEYS, SOURCE_FILE, normalise
from mlxtune_convert.files import read_json
from mlxtune_convert.layouts import LAYOUTS
from mlxtune_convert.rules import Layout
from mlxtune_convert.tensors import weight_files

from mlxtune import backend
from mlxtune.data.tokenizer import load_tokenizer, require_folder
from mlxtune.errors import UserError
from mlxtune.gpu_errors import recognise
from mlxtune.model.arrays import named
from mlxtune.model.corrected import correct, readable
from mlxtune.model.hub import resolve
from mlxtune.model.quantize import on_cpu
from mlxtune.model.reference import completed
from mlxtune.model.tying import by_files


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer. `tokenizer` is Hugging Face's own; `dtype` that of the activations, `own` that
    of the weights as they are stored."""

    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    path: Path
    dtype: mx.Dtype
    own: mx.Dtype

    @property
    def eos_ids(self) -> list[int]:
        """Every id that ends an answer: of the config, the generation config and the tokenizer."""
        listed = self.config.get("eos_token_id")
        ids = listed if isinstance(listed, list) else [listed]
        return sorted({index for index in [*ids, self.tokenizer.eos_token_id] if index is not None})

    def check_ids(self, rows: Iterable[Sequence[int]]) -> None:
        """Raise UserError for a token that the model has no embedding for: MLX would read whatever lies behind it."""
        known = self.config.get("vocab_size") or self.config.get("text_config", {}).get("vocab_size")
        highest = max((index for row in rows for index in row), default=0)
        if known is not None and highest >= known:
            raise UserError(
                f"{self.path}: the tokenizer makes the token {highest}, the model knows {known} tokens (from 0)",
                "The tokenizer is another model's, or tokens were added to it: take the model's own.",
            )


def load(source: str, dtype: str = "own", as_mlx_lm: bool = False) -> Loaded:
    """Load a model for running or training.

    source: MLX folder, 16-bit Hugging Face folder, or hub id; dtype: "own" to run it, `train.dtype` to train it;
    as_mlx_lm: with mlx-lm's own way to multiply on the CPU, to be compared with. Raises UserError for whatever is
    missing, torn or unknown.
    """
    backend.prepare()
    path = resolve(source)
    require_folder(path)
    model, config = open_model(path)
    tokenizer = load_tokenizer(path)
    own = model_dtype(model)
    wanted = backend.dtype_for(dtype, own, "quantization" in config)
    if wanted != own:
        cast(model, wanted)
    if backend.kind() == "cpu" and not as_mlx_lm:
        on_cpu(model)
    mx.eval(model.parameters())
    return Loaded(model, tokenizer, config, path, wanted, own)


def open_model(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The mlx-lm model of a folder, its weights not yet read, and its normalised config.json."""
    from mlx_lm.utils import load_config, load_model

    read_json(path / "config.json", "a model folder: config.json, safetensors weights and a tokenizer")
    weight_files(path)
    original = load_config(path)
    if not isinstance(original.get("model_type"), str):
        raise UserError(f"{path}/config.json names no type of model (model_type)")
    config = normalise(by_files(completed(original), path))
    try:
        model, config = load_model(
            path, lazy=True, model_config=config, get_model_classes=lambda config: _classes(config, original)
        )
        if why := unheeded.unable(config):
            raise UserError(f"{path}: mlx-lm has no such model of type {config.get('model_type')}: {why}")
        correct(model, config)
    except ValueError as error:
        if "not supported" in str(error):
            raise UserError(f"{path}: mlx-lm has no model of type {config.get('model_type')!r}") from error
        if why := unheeded.why(config):
            raise UserError(f"{path}: mlx-lm has no such model of type {config.get('model_type')}: {why}") from error
        raise UserError(
            f"{path}: the weights do not fit config.json ({shorten(str(error), 300, placeholder=' ...')})",
            "Copy or download the folder again.",
        ) from error
    except (OSError, UserError):
        raise
    except Exception as error:  # mlx-lm raises whatever its parts raise
        if recognise(error):
            raise
        raise UserError(
            f"{path}/config.json does not describe a model that mlx-lm knows ({type(error).__name__}: {error})"
        ) from error
    return model, config


@dataclass(frozen=True)
class _Readable:
    """mlx-lm's class of a model's arguments, made from what that class can read of a configuration."""

    arguments: Any

    def from_dict(self, config: dict[str, Any]) -> Any:
        return self.arguments.from_dict(readable(config))


def _classes(config: dict[str, Any], original: dict[str, Any]) -> tuple[type, Any]:
    """mlx-lm's classes; where it cannot read the names that transformers saves, our table puts them right first."""
    from mlx_lm.utils import _get_classes

    model, arguments = _get_classes(config)
    arguments = _Readable(arguments)
    layout = LAYOUTS.get(str(original.get("model_type")), Layout())
    if not layout.early:
        return model, arguments

    class Renamed(model):  # type: ignore[misc, valid-type]
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            early = dict(layout.for_mlx_lm(weights.items(), mx))
            return super().sanitize(early) if hasattr(model, "sanitize") else early

    return Renamed, arguments


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Change the floating type of a model's parameters, except those that its family keeps in float32."""
    wanted = getattr(model, "cast_predicate", lambda name: True)

    def to(name: str, array: mx.array) -> mx.array:
        return array.astype(dtype) if wanted(name) and mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map_with_path(to, model.parameters()))


def model_dtype(model: nn.Module) -> mx.Dtype:
    """The floating type that most of the model's numbers have (scales stand for quantized weights)."""
    sizes: dict[mx.Dtype, int] = {}
    for array in named(model.parameters()).values():
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
    return max(sizes, key=lambda dtype: sizes[dtype])


def source_of(path: Path) -> dict[str, Any]:
    """Where a converted model came from: {"kind", "name", "config"}; its own config when it was not converted by
    mlxtune.
    """
    if (path / SOURCE_FILE).is_file():
        return read_json(path / SOURCE_FILE, "written by mlxtune convert")
    config = read_json(path / "config.json", "a model folder")
    kind = "mlx" if any(key in config for key in QUANTIZATION_KEYS) else "hf"
    return {"kind": kind, "name": "", "config": config}
