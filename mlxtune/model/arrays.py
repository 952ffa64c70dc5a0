"""Small readings of MLX arrays that every room needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlxtune_convert.files import flush
from mlxtune_convert.tensors import save_checked


def scalar(array: mx.array) -> float:
    """The value of an array with one element, of any shape; computes it."""
    return float(array.item())  # type: ignore[arg-type]


def named(tree: Any) -> dict[str, mx.array]:
    """The arrays of a parameter tree under their dotted names, of any shape."""
    return dict(tree_flatten(tree))


def to_numpy(array: mx.array) -> np.ndarray:
    """The same bits and shape; bfloat16 as ml_dtypes' type, which numpy does not have itself.

    Of an evaluated array the bytes are read and nothing is computed, so that this can be done while another thread of
    the process is inside a computation, or after the device gave up.

    Raises what MLX raises. np.array alone would not: where computing the array fails, numpy takes that for "no buffer",
    asks in another way, and gets whatever lies in the memory.
    """
    computed = memoryview(array)  # type: ignore[arg-type]
    if array.dtype == mx.bfloat16:
        letters = bytearray(computed)
        return np.frombuffer(letters, np.uint16).reshape(array.shape).view(ml_dtypes.bfloat16)
    return np.array(array)


def save_arrays(file: Path, arrays: dict[str, mx.array]) -> None:
    """Write a safetensors file of arrays of any shape under a temporary name, then rename it: never half a file.

    A full disk raises OSError; MLX's own writer would raise a RuntimeError that does not say why.
    """
    partial = file.with_name(f".{file.stem}.partial.safetensors")
    try:
        partial.unlink(missing_ok=True)  # a link, say
        save_checked(partial, {name: to_numpy(array) for name, array in arrays.items()}, {"format": "mlx"})
        flush(partial)
        partial.replace(file)
        flush(file.parent)
    except OSError as error:
        error.filename = str(file)
        raise
    finally:
        partial.unlink(missing_ok=True)


def dtype_name(dtype: mx.Dtype) -> str:
    """float16 for mlx.core.float16."""
    return str(dtype).removeprefix("mlx.core.")
