"""What Metal, CUDA and MLX's allocators say when they fail, and which kind of failure that is.

MLX raises RuntimeError with a text, nothing more. The texts are those of MLX 0.32's source: backend/metal/device.cpp
and allocator.cpp, backend/cuda/allocator.cpp, device.cpp and utils.cpp; Metal's own words follow "Command buffer
execution failed:". `std::bad_alloc` arrives in Python as MemoryError.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """Kinds of failure; the value is what a person is told."""

    OUT_OF_MEMORY = "there is not enough memory"
    TOO_LARGE = "one array is larger than the GPU takes"
    WATCHDOG = "macOS ended the GPU's work, because it held up the display"
    TIMEOUT = "the GPU's work was ended, because one piece of it took too long"
    BUFFERS = "the GPU has no buffers left"
    LOST = "the GPU failed and takes no more work from this process"
    NO_GPU = "there is no usable GPU in this session"
    OTHER = "the GPU failed"


# A CUDA call that failed: "cudaMallocAsync(&data, size, stream) failed: out of memory".
CALL = r"\bcu(?:da|blas|blasLt|dnn)?[A-Z]\w*(?:\(.*\))? failed"

# (kind, how its texts are recognised); the first that is found counts.
TEXTS: tuple[tuple[Kind, str], ...] = (
    (Kind.NO_GPU, r"\[metal::load_device\] No Metal device available"),
    # The allocators, before any work is sent.
    (Kind.TOO_LARGE, r"\[metal::malloc\] Attempting to allocate \d+ bytes which is greater than"),
    (Kind.BUFFERS, r"\[metal::malloc\] Resource limit \(\d+\) exceeded"),
    (Kind.OUT_OF_MEMORY, r"\[malloc\] Unable to allocate \d+ bytes"),
    # Metal, after work was sent.
    (Kind.OUT_OF_MEMORY, r"Command buffer execution failed: Insufficient Memory|CallbackErrorOutOfMemory"),
    (Kind.WATCHDOG, r"Command buffer execution failed: Impacting Interactivity|CallbackErrorImpactingInteractivity"),
    (Kind.TIMEOUT, r"Caused GPU (Timeout|Hang) Error|CallbackError(Timeout|Hang)"),
    (Kind.LOST, r"Ignored \(for causing prior/excessive GPU errors\)|CallbackErrorSubmissionsIgnored"),
    (Kind.LOST, r"victim of GPU error/recovery|CallbackErrorInnocentVictim"),
    (Kind.LOST, r"Caused GPU Address Fault Error|CallbackErrorPageFault"),
    (Kind.LOST, r"CallbackError(DeviceRemoved|AccessRevoked)"),
    (Kind.OTHER, r"^\[METAL\] |^\[metal::|Failed to create Metal shared event"),
    # CUDA.
    (Kind.OUT_OF_MEMORY, CALL + ": out of memory"),
    (Kind.TIMEOUT, CALL + ": the launch timed out and was terminated"),
    (Kind.LOST, CALL + ": (an illegal memory access|unspecified launch failure)"),
    (Kind.NO_GPU, CALL + ": (no CUDA-capable device|CUDA driver version is insufficient)"),
    (Kind.OTHER, CALL),
)

# What a smaller computation can mend.
FOR_WANT_OF_MEMORY = (Kind.OUT_OF_MEMORY, Kind.TOO_LARGE)


@dataclass(frozen=True)
class Failure:
    """A failure of the device or its memory. text: the library's own, on one line."""

    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.kind.value} ({self.text})" if self.text else self.kind.value

    @property
    def of_memory(self) -> bool:
        """Whether a smaller computation may succeed."""
        return self.kind in FOR_WANT_OF_MEMORY


def recognise(error: BaseException) -> Failure | None:
    """The device's failure that an error reports, or None for any other error, an ordinary bug among them."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return Failure(Kind.OUT_OF_MEMORY, text)
    if not isinstance(error, RuntimeError):
        return None
    return next((Failure(kind, text) for kind, pattern in TEXTS if re.search(pattern, text)), None)
