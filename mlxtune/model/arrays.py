"""Small readings of MLX arrays that every room needs."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten


def scalar(array: mx.array) -> float:
    """The value of a one-element array; computes it."""
    return float(array.item())  # type: ignore[arg-type]


def named(tree: Any) -> dict[str, mx.array]:
    """The arrays of a parameter tree under their dotted names."""
    return dict(tree_flatten(tree))


def to_numpy(array: mx.array) -> np.ndarray:
    """The same bits; bfloat16 as ml_dtypes' type, which numpy does not have itself."""
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def dtype_name(dtype: mx.Dtype) -> str:
    """float16 for mlx.core.float16."""
    return str(dtype).removeprefix("mlx.core.")
