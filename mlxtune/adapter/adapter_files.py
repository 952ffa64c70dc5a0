"""An adapter folder: adapter_config.json and a safetensors file, with names and layout of mlx-lm where it has them.

`mlxtune_convert.adapters` knows the format without MLX; here it meets a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlxtune_convert.adapters import (
    ADAPTER_FILE,
    CONFIG_FILE,
    OTHER_MODEL,
    OWN_FILE,
    UNTIE,
    AdapterConfig,
    adapter_file,
    other_rows,
)
from mlxtune_convert.tensors import read_header, require_fractions

from mlxtune.adapter import attach
from mlxtune.adapter.plan import AdapterPlan, heads
from mlxtune.adapter.vocabulary import add_rows_of_adapter
from mlxtune.errors import UserError
from mlxtune.machine.gpu_errors import recognise
from mlxtune.model.arrays import save_arrays, to_numpy

__all__ = [
    "ADAPTER_FILE",
    "CONFIG_FILE",
    "OTHER_MODEL",
    "OWN_FILE",
    "UNTIE",
    "adapter_file",
    "load_adapter",
    "load_tensors",
    "require_fit",
    "save_config",
    "save_tensors",
]


def save_config(folder: Path, plan: AdapterPlan) -> None:
    """Write adapter_config.json, as mlx-lm reads it where it can hold the adapter."""
    plan.config.save(folder)


def save_tensors(model: nn.Module, folder: Path, file: str = ADAPTER_FILE) -> None:
    """Write what was trained into `folder`, whole or not at all. file: AdapterPlan.file. A full disk raises OSError."""
    save_arrays(folder / file, attach.trained_tensors(model))


def load_adapter(model: nn.Module, folder: Path, config: dict[str, Any] | None = None) -> AdapterPlan:
    """Attach the adapter in `folder` and load its tensors.

    config: the model's, needed where the adapter was trained with added tokens: its vocab_size follows. Raises
    UserError listing every tensor that does not fit: the adapter was trained on another base.
    """
    saved = AdapterConfig.read(folder)
    file = folder / saved.file
    if not file.is_file():
        raise UserError(f"{folder} has no {saved.file}", "The run saved no adapter: train it, or resume it.")
    plan = AdapterPlan.resolve(saved, folder, model)
    saved.check_head(bool(heads(model)), folder)
    if config is not None:
        add_rows_of_adapter(model, folder, config)
    attach.attach(model, plan)
    load_tensors(model, file)
    return plan


def load_tensors(model: nn.Module, file: Path) -> None:
    """Copy saved tensors into the attached layers, exactly. Raises UserError for a torn file or wrong names or
    shapes.
    """
    try:
        tensors: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
        mx.eval(tensors)
    except (RuntimeError, ValueError) as error:
        if recognise(error):
            raise
        raise UserError(f"{file}: not a safetensors file, or a torn one") from error
    _require_shapes(model, file, {name: array.shape for name, array in tensors.items()})
    for name, array in tensors.items():
        if not mx.issubdtype(array.dtype, mx.floating) or not mx.isfinite(array).all():
            require_fractions(file, name, to_numpy(array))
    # Copies: MLX reads files lazily, and the file may be replaced while we hold it.
    model.load_weights([(name, mx.array(array.astype(mx.float32))) for name, array in tensors.items()], strict=False)
    mx.eval(attach.trained_tensors(model))


def require_fit(model: nn.Module, file: Path) -> None:
    """The same of its names and shapes alone: no tensor is read."""
    _require_shapes(model, file, {name: facts["shape"] for name, facts in read_header(file).items()})


def _require_shapes(model: nn.Module, file: Path, found: Mapping[str, Sequence[int]]) -> None:
    expected = {name: array.shape for name, array in attach.trained_tensors(model).items()}
    problems = _problems(expected, found)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{file} does not fit this model: {min(problems)}{more}", _what_to_do(expected, found))


def _problems(expected: Mapping[str, Sequence[int]], saved: Mapping[str, Sequence[int]]) -> list[str]:
    """Why saved tensors are not those of the attached layers. expected, saved: their names and shapes."""
    found = []
    for name in expected.keys() - saved.keys():
        found.append(f"{name} is missing")
    for name in saved.keys() - expected.keys():
        found.append(f"{name} has no place in this model")
    for name, shape in expected.items():
        if name in saved and tuple(saved[name]) != tuple(shape):
            found.append(f"{name} is {tuple(saved[name])}, the model needs {tuple(shape)}")
    return found


def _what_to_do(expected: Mapping[str, Sequence[int]], saved: Mapping[str, Sequence[int]]) -> str:
    """The hint for tensors that do not fit: where a matrix has only other rows, its vocabulary is another one."""
    for name, shape in expected.items():
        rows = saved[name][0] if saved.get(name) else 0
        if name.endswith(".weight") and rows and tuple(saved[name]) == (rows, *shape[1:]) and rows != shape[0]:
            return other_rows(rows, shape[0])
    return OTHER_MODEL
