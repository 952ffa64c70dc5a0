"""What Metal, CUDA and MLX's allocators say when they fail, and which kind of failure that is.

MLX raises RuntimeError with a text, nothing more. The texts are those of MLX 0.32's source: backend/metal/device.cpp
and allocator.cpp, backend/cuda/allocator.cpp, device.cpp and utils.cpp; Metal's own words follow "Command buffer
execution failed:". `std::bad_alloc` arrives in Python as MemoryError.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
    (Kind.OTHER, r"\[METAL\] |\[metal::|Failed to create Metal shared event"),
    # CUDA.
    (Kind.OUT_OF_MEMORY, CALL + ": out of memory"),
    (Kind.TIMEOUT, CALL + ": the launch timed out and was terminated"),
    (Kind.LOST, CALL + ": (an illegal memory access|unspecified launch failure)"),
    (Kind.NO_GPU, CALL + ": (no CUDA-capable device|CUDA driver version is insufficient)"),
    (Kind.OTHER, CALL),
    # PyTorch, which runs exports to compare them.
    (Kind.OUT_OF_MEMORY, r"DefaultCPUAllocator: (can't allocate|not enough) memory"),
)

# What a smaller computation can mend.
FOR_WANT_OF_MEMORY = (Kind.OUT_OF_MEMORY, Kind.TOO_LARGE)
# After which nothing more can be computed in this process.
FINAL = (Kind.LOST, Kind.NO_GPU)

# What makes a command need less memory, besides closing other programs.
LESS = {
    "bench": "add --set train.batch_rows=1 --set train.checkpoint_layers=all",
    "chat": "take a model of fewer bits (mlxtune convert --bits 4), or begin a new conversation: /reset",
    "eval": "take a model of fewer bits (mlxtune convert --bits 4), or shorten the rows: --set data.max_tokens=N",
    "export": "leave the comparison out: --no-verify",
    "fuse": "leave the comparison out: --no-verify",
    "generate": "take a model of fewer bits (mlxtune convert --bits 4), or shorten --prompt and --max-tokens",
    "train": "take a model of fewer bits (mlxtune convert --bits 4), or lower data.max_tokens",
    "verify": "compare on shorter rows: --data PATH",
}
DISPLAY = "Let the display sleep meanwhile (pmset displaysleepnow)"
# What to do about the other kinds, whatever the command.
ADVICE = {
    Kind.WATCHDOG: f"{DISPLAY}, and run it again.",
    Kind.TIMEOUT: "Close what else uses the GPU, and run it again; shorter rows or prompts are shorter pieces of work.",
    Kind.BUFFERS: "Run it again: a new process begins with none taken.",
    Kind.LOST: "Run it again: a new process may use the GPU. If it fails again, restart the machine.",
    Kind.NO_GPU: "On a Mac, run it as a user who is logged in, outside of sandboxes and virtual machines; with CUDA, "
    "nvidia-smi says what is missing.",
    Kind.OTHER: "Run it again. If it fails again, restart the machine; mlxtune doctor says what is installed.",
}


@dataclass(frozen=True)
class Failure:
    """A failure of the device or its memory."""

    kind: Kind  # what can be done about it depends on this alone
    text: str  # the library's own, on one line, without its full stop

    def __str__(self) -> str:
        return f"{self.kind.value} ({self.text})" if self.text else self.kind.value

    @property
    def of_memory(self) -> bool:
        """Whether a smaller computation may succeed."""
        return self.kind in FOR_WANT_OF_MEMORY

    @property
    def final(self) -> bool:
        """Whether this process has no GPU any more."""
        return self.kind in FINAL

    def hint(self, command: str, words: Sequence[str] = ()) -> str:
        """What to do about it.

        command: that failed, such as "export"; words: the options it was given, so that none of them is advised again.
        """
        if not self.of_memory:
            return ADVICE[self.kind]
        less = LESS.get(command, "")
        if less.endswith("--no-verify") and "--no-verify" in words:
            less = ""
        return "Close programs that hold memory" + (f"; {less}." if less else ", and run it again.")


def recognise(error: BaseException) -> Failure | None:
    """The device's failure that an error reports, or None for any other error, an ordinary bug among them."""
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, MemoryError):
        return Failure(Kind.OUT_OF_MEMORY, text)
    if not isinstance(error, RuntimeError):
        return None
    return next((Failure(kind, text) for kind, pattern in TEXTS if re.search(pattern, text)), None)
