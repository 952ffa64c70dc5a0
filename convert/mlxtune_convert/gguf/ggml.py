"""ggml's own quantizers, from the optional package xllamacpp: the K-quants that the gguf package cannot make."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from mlxtune_convert.errors import UserError
from mlxtune_convert.gguf.container import stored_bytes

PACKAGE = "xllamacpp"
TRIED = "2026.10.11549"  # the version that mlxtune is tested with


def library_file() -> Path | None:
    """The shared library of the installed xllamacpp, which holds all of llama.cpp; None without one. Loads nothing."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or () for file in Path(folder).glob(f"{PACKAGE}*.so")), None)


@cache
def library() -> ctypes.CDLL:
    """Raises UserError where it is not installed, or was built without the C interface."""
    file = library_file()
    try:
        found = ctypes.CDLL(str(file)) if file else None
        assert found is None or found.ggml_quantize_chunk
    except (OSError, AttributeError):
        found = None
    if found is None:
        raise UserError(
            "K-quants are made by llama.cpp's own code, which is not installed",
            f"pip install {PACKAGE}; or --type f16, then llama-quantize; or --type q8_0, q5_1, q4_1, q4_0.",
        )
    return found


def quantize(weight: np.ndarray, kind: str) -> np.ndarray:
    """[rows, columns] float32 -> [rows, bytes] uint8, rounded as llama-quantize does without an importance matrix."""
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    rows, columns = weight.shape
    out = np.empty((rows, stored_bytes(kind, (1, columns))), dtype=np.uint8)
    function = library().ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    number = GGMLQuantizationType[kind].value
    written = function(number, weight.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    assert written == out.nbytes, (kind, written, out.nbytes)
    return out
