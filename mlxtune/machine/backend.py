"""Everything that depends on the device: Metal, CUDA or CPU.

`before_mlx()` runs when the package is imported: the macOS watchdog variable and the BLAS that MLX's CPU backend
binds to are read once, when mlx.core loads. `prepare()` then sets limits on the device that MLX chose.
"""

from __future__ import annotations

import gc
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxtune.errors import UserError

if TYPE_CHECKING:
    import mlx.core as mx

GIB = 1 << 30
MAX_ERRORS = 16  # kept for one stream: MLX has some ten command buffers under way

_blas = ""
_planned: Machine | None = None
_prepared = False
_unset: dict[str, str] = {}  # variables that MLX reads and the user had not set, with what MLX takes then


def before_mlx() -> None:
    """Set up what MLX reads when it loads. Cheap, and without effect on a process that already loaded MLX."""
    global _blas
    # macOS 26 kills GPU work that holds up the display; long training steps do (mlx issue 3267).
    os.environ.setdefault("AGX_RELAX_CDM_CTXSTORE_TIMEOUT", "1")
    # Newer GPUs would multiply float32 in TF32 (10 bits): merging and proofs need the float32 that is written down.
    if "MLX_ENABLE_TF32" not in os.environ:
        os.environ["MLX_ENABLE_TF32"] = "0"
        _unset["MLX_ENABLE_TF32"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if sys.platform == "linux":
        _blas = _load_openblas()


def as_without_mlxtune() -> dict[str, str]:
    """Environment for a process in which MLX is to compute as it would for other programs."""
    return dict(_unset)


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


def multiplies() -> str:
    """What multiplies float32 matrices on Linux's CPU, in words; "" elsewhere.

    Products of other libraries, for other processors or in another number of threads add up in another order, so their
    last bits differ. MLX binds to one when it loads: where it was loaded before mlxtune, that is its own.
    """
    if sys.platform != "linux" or kind() != "cpu":
        return ""
    if not _blas:
        return "MLX's own BLAS"
    import ctypes

    library = ctypes.CDLL(_blas)
    library.openblas_get_config.restype = library.openblas_get_corename.restype = ctypes.c_char_p
    version = library.openblas_get_config().decode().split()[1]  # "OpenBLAS 0.3.21 NO_LAPACKE ..."
    core, threads = library.openblas_get_corename().decode(), library.openblas_get_num_threads()
    return f"OpenBLAS {version} for {core} in {threads} thread{'s' if threads > 1 else ''}"


def _load_openblas() -> str:
    """Make OpenBLAS's symbols global before MLX binds them: its own reference BLAS is some 30 times slower."""
    if "mlx.core" in sys.modules:
        return _blas
    import ctypes

    for looked_for in (lambda: "libopenblas.so.0", _found_openblas):
        name = looked_for()
        if name:
            try:
                ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            return name
    return ""


def _found_openblas() -> str:
    """OpenBLAS under another name, "" for none. What looks for it takes longer to import than the rest of a start."""
    import ctypes.util

    return ctypes.util.find_library("openblas") or ""


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


def recover() -> None:
    """After a failure of the GPU: wait for what is under way, let go of errors that are kept for the next one who
    computes, and of the buffers that are kept for reuse.
    """
    import mlx.core as mx

    generate = sys.modules.get("mlx_lm.generate")  # which has a stream of its own
    for stream in (None, *([generate.generation_stream] if generate else [])):
        for _ in range(MAX_ERRORS):
            try:
                mx.synchronize(stream)
            except RuntimeError:
                continue  # the first of them; those of work that was sent after it may follow
            break
    gc.collect()  # graphs and the classes of checkpointed blocks refer to themselves, and hold arrays
    mx.clear_cache()


def wire(size: int) -> None:
    """Keep `size` bytes, what is used all the time and stays, from being swapped out or compressed.

    Not the whole working set: what changes would be wired and let go again and again, and other programs would have
    nothing left (mlx issue 3186). 0: nothing, as MLX begins. Only Metal has it; macOS 14 ignores it.
    """
    import mlx.core as mx

    recommended = mx.device_info().get("max_recommended_working_set_size")
    if kind() == "metal" and recommended:
        mx.set_wired_limit(min(int(recommended), size))


def kind() -> str:
    """ "metal", "cuda" or "cpu": where MLX's default device computes. (Of `planned_for`: that machine's.)"""
    if _planned is not None:
        return _planned.kind
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


@dataclass(frozen=True)
class Policy:
    """How a training step is computed on a kind of device."""

    compiled: bool  # graphs run as compiled functions
    # The parts of a step are handed to the device one after the other and waited for once; else each is waited for,
    # as on the CPU, where nothing is gained by going ahead.
    queued: bool
    tile: int  # rows that a matrix product works on at a time: a number between multiples costs as much as the next one


def policy() -> Policy:
    """The policy for MLX's default device. MLX's own variable MLX_DISABLE_COMPILE is heeded."""
    if kind() == "cpu":
        return Policy(compiled=False, queued=False, tile=1)
    # Tiles of Metal's quantized products have 32 rows, from M5 on 64 (mlx/backend/metal/quantized.cpp).
    return Policy(compiled=not os.environ.get("MLX_DISABLE_COMPILE"), queued=True, tile=64)


@contextmanager
def memory_held_to(most: int | None) -> Iterator[None]:
    """Inside, MLX waits for work that is under way before it takes more than so many bytes; None: as before.

    MLX allocates when it is handed a computation. Without this a queue of them takes the memory of some ten command
    buffers ahead of the GPU (mlx/transforms.cpp: MAX_ACTIVE_TASKS, and the memory limit there).
    """
    import mlx.core as mx

    if most is None:
        yield
        return
    before = mx.set_memory_limit(most)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


def dtype_for(name: str, model_dtype: mx.Dtype, quantized: bool) -> mx.Dtype:
    """The activation dtype of a model that runs or is trained.

    name: "own" to run it, `train.dtype` to train it. On the CPU, half precision is some 40 times slower than float32,
    so `own` and `auto` are float32 there; elsewhere they are the model's own type, but `auto` is float32 for a float16
    model: gradients may be larger than float16 holds, and float32 has every number of float16 exactly (bfloat16 would
    round them). A 4-bit model cannot be moved between the two 16-bit types: its scales would be rounded, and the base
    would no longer be the one the adapter is shipped with.
    """
    import mlx.core as mx

    if name in ("own", "auto"):
        for_gradients = name == "auto" and model_dtype == mx.float16
        return mx.float32 if kind() == "cpu" or for_gradients else model_dtype
    wanted: mx.Dtype = getattr(mx, name)
    if quantized and wanted not in (mx.float32, model_dtype):
        own = str(model_dtype).removeprefix("mlx.core.")
        raise UserError(
            f"train.dtype {name}: this quantized model is {own}; the change would round its scales",
            f"Use {' or '.join(dict.fromkeys(['auto', own, 'float32']))}.",
        )
    return wanted


def memory_bytes() -> int:
    """Physical memory of this machine in bytes. (Of `planned_for`: that machine's.)"""
    if _planned is not None:
        return _planned.memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def working_set_bytes() -> int:
    """What the device can hold at once: macOS's recommendation, the GPU's memory, or all of the machine's. (Of
    `planned_for`: that machine's.)
    """
    if _planned is not None:
        return _planned.working_set
    import mlx.core as mx

    info = mx.device_info()
    return int(info.get("max_recommended_working_set_size") or info.get("total_memory") or memory_bytes())


@dataclass(frozen=True)
class Machine:
    """What of a machine decides how a run is computed on it."""

    kind: str  # "metal", "cuda" or "cpu"
    memory: int  # bytes, all that it has
    working_set: int  # bytes that its device can hold at once


def here() -> Machine:
    """This machine."""
    return Machine(kind(), memory_bytes(), working_set_bytes())


def mac(memory: int) -> Machine:
    """A Mac with so many bytes of memory, by what macOS recommends for its GPU: two thirds of up to 32 GiB, three
    quarters of more (as llama.cpp prints it on start-up: 10.7 GiB of 16, 21.3 of 32, 27 of 36, 96 of 128). Newer
    systems recommend more of 16 GiB, up to 11.8.
    """
    return Machine("metal", memory, memory * 2 // 3 if memory <= 32 * GIB else memory * 3 // 4)


@contextmanager
def planned_for(machine: Machine) -> Iterator[None]:
    """Inside, this module speaks of another machine, so that whoever plans a run plans it for that one. Nothing may be
    computed inside.
    """
    global _planned
    before = _planned
    _planned = machine
    try:
        yield
    finally:
        _planned = before


def chip() -> str:
    """The processor's name as its vendor writes it."""
    import mlx.core as mx

    return str(mx.device_info().get("device_name") or platform.processor() or platform.machine())
