"""Everything that depends on the device: Metal, CUDA or CPU.

`before_mlx()` runs when the package is imported: the macOS watchdog variable and the BLAS that MLX's CPU backend
binds to are read once, when mlx.core loads. `prepare()` then sets limits on the device that MLX chose.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import sys
from typing import TYPE_CHECKING, Any

from mlxtune.errors import UserError

if TYPE_CHECKING:
    import mlx.core as mx

GIB = 1 << 30


_blas = ""
_prepared = False


def before_mlx() -> None:
    """Set up what MLX reads when it loads. Cheap, and without effect on a process that already loaded MLX."""
    global _blas
    # macOS 26 kills GPU work that holds up the display; long training steps do (mlx issue 3267).
    os.environ.setdefault("AGX_RELAX_CDM_CTXSTORE_TIMEOUT", "1")
    # Newer GPUs would multiply float32 in TF32 (10 bits): merging and proofs need the float32 that is written down.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if sys.platform == "linux":
        _blas = _load_openblas()


def prepare() -> None:
    """Set limits and compile policy for the device, once. Raises UserError when MLX cannot load at all."""
    global _prepared
    if _prepared:
        return
    try:
        import mlx.core as mx
    except ImportError as error:
        hint = (
            "On Linux install a backend: pip install 'mlxtune[cpu]', or 'mlxtune[cuda]' with an NVIDIA GPU."
            if sys.platform == "linux"
            else "mlxtune needs macOS 14 or later and an arm64 Python."
        )
        raise UserError(f"MLX cannot load ({error})", hint) from error
    if kind() == "cpu":
        # On the CPU, compiling a graph shells out to a C++ compiler for every shape.
        mx.disable_compile()
    _limit_memory(mx)
    _prepared = True


def blas() -> str:
    """The OpenBLAS library in use, or "": none was found, or none is needed."""
    return _blas


def _load_openblas() -> str:
    """Make OpenBLAS's symbols global before MLX binds them: its own reference BLAS is some 30 times slower."""
    if "mlx.core" in sys.modules:
        return _blas
    for name in ("libopenblas.so.0", ctypes.util.find_library("openblas")):
        if name:
            try:
                ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            return name
    return ""


def _limit_memory(mx: Any) -> None:
    """Keep MLX inside the working set that macOS recommends, and its cache of free buffers small.

    Past the memory limit MLX waits for work that is still queued; before an allocation would pass 95% of the working
    set it empties its cache. So neither has to be left room for in a plan.
    """
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if kind() == "metal" and recommended:
        mx.set_memory_limit(recommended)
        mx.set_cache_limit(min(2 * GIB, recommended // 8))
    elif kind() == "cpu":
        mx.set_cache_limit(1 * GIB)


def wire(size: int) -> None:
    """Keep `size` bytes, what is used all the time and stays, from being swapped out or compressed.

    Not the whole working set: what changes would be wired and let go again and again, and other programs would have
    nothing left (mlx issue 3186). Only Metal has it; macOS 14 ignores it.
    """
    import mlx.core as mx

    recommended = mx.device_info().get("max_recommended_working_set_size")
    if kind() == "metal" and recommended:
        mx.set_wired_limit(min(int(recommended), size))


def kind() -> str:
    """ "metal", "cuda" or "cpu": where MLX's default device computes."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def compiles() -> bool:
    """Whether MLX compiles graphs: on a GPU, unless its own variable forbids it."""
    return kind() != "cpu" and not os.environ.get("MLX_DISABLE_COMPILE")


def dtype_for(name: str, model_dtype: mx.Dtype, quantized: bool) -> mx.Dtype:
    """The activation dtype of a run.

    name: `train.dtype`. On the CPU, half precision is some 40 times slower than float32, so `auto` is float32 there;
    elsewhere it is the model's own. A 4-bit model cannot be moved between the two 16-bit types: its scales would be
    rounded, and the base would no longer be the one the adapter is shipped with.
    """
    import mlx.core as mx

    if name == "auto":
        return mx.float32 if kind() == "cpu" else model_dtype
    wanted: mx.Dtype = getattr(mx, name)
    if quantized and wanted not in (mx.float32, model_dtype):
        own = str(model_dtype).removeprefix("mlx.core.")
        raise UserError(
            f"train.dtype {name}: this quantized model is {own}; the change would round its scales",
            f"Use {' or '.join(dict.fromkeys(['auto', own, 'float32']))}.",
        )
    return wanted


def memory_bytes() -> int:
    """Physical memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def working_set_bytes() -> int:
    """What the device can hold at once: macOS's recommendation, the GPU's memory, or all of the machine's."""
    import mlx.core as mx

    info = mx.device_info()
    return int(info.get("max_recommended_working_set_size") or info.get("total_memory") or memory_bytes())


def chip() -> str:
    """The processor's name as its vendor writes it."""
    import mlx.core as mx

    return str(mx.device_info().get("device_name") or platform.processor() or platform.machine())
