"""Failures of the device are told from ordinary bugs, and from one another, by the texts that MLX gives them."""

from __future__ import annotations

import numpy as np
import pytest

from mlxtune.machine.gpu_errors import Kind, recognise

# As MLX 0.32 composes them (backend/metal/device.cpp, allocator.cpp, backend/cuda/utils.cpp), with what Metal and CUDA
# put in: as published in ml-explore/mlx, jundot/omlx, exo-explore/exo, WhirlyGlobe, flutter, tinygrad.
METAL = "[METAL] Command buffer execution failed: {}."
TEXTS = {
    METAL.format("Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"): Kind.OUT_OF_MEMORY,
    METAL.format("Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"): (
        Kind.WATCHDOG
    ),
    METAL.format("Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"): Kind.TIMEOUT,
    METAL.format("Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)"): Kind.TIMEOUT,
    METAL.format(
        "Ignored (for causing prior/excessive GPU errors) (00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)"
    ): Kind.LOST,
    METAL.format(
        "Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)"
    ): Kind.LOST,
    METAL.format("Caused GPU Address Fault Error (0000000b:kIOGPUCommandBufferCallbackErrorPageFault)"): Kind.LOST,
    METAL.format("Internal Error (00000001:Internal Error)"): Kind.OTHER,
    "[metal::malloc] Resource limit (499000) exceeded.": Kind.BUFFERS,
    "[metal::malloc] Attempting to allocate 20937965568 bytes which is greater than the maximum allowed buffer size "
    "of 9534832640 bytes.": Kind.TOO_LARGE,
    "[malloc] Unable to allocate 4294967296 bytes.": Kind.OUT_OF_MEMORY,
    "[metal::load_device] No Metal device available. This typically occurs in headless, sandboxed, or virtualized "
    "macOS sessions where the GPU is not accessible.": Kind.NO_GPU,
    "[metal::Device] Unable to load kernel steel_gemm\nCompiler encountered an internal error\n": Kind.OTHER,
    "[Event::Event] Failed to create Metal shared event.": Kind.OTHER,
    "cudaMallocAsync(&data, size, stream) failed: out of memory": Kind.OUT_OF_MEMORY,
    "cudaMallocManaged(&data, size) failed: out of memory": Kind.OUT_OF_MEMORY,
    "cudaGraphLaunch(graph_exec, stream_) failed: out of memory": Kind.OUT_OF_MEMORY,
    "cudaStreamSynchronize(stream_) failed: an illegal memory access was encountered": Kind.LOST,
    "cudaStreamSynchronize(stream_) failed: the launch timed out and was terminated": Kind.TIMEOUT,
    "cudaGetDeviceCount(&n) failed: no CUDA-capable device is detected": Kind.NO_GPU,
    "cublasLtMatmul(handle, desc) failed with code: 14.": Kind.OTHER,
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_of_the_device_is_recognised_as_its_kind(text: str) -> None:
    found = recognise(RuntimeError(text))
    assert found is not None and found.kind == TEXTS[text]
    assert "\n" not in str(found) and str(found).startswith(found.kind.value)
    assert str(found).endswith(f"({' '.join(text.split()).rstrip('.')})")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[load_safetensors] Invalid json header length"),
        RuntimeError("[matmul] Last dimension of first input with shape (2,3) must match"),
        RuntimeError("[metal_kernel] Must specify at least one output."),
        RuntimeError("[ring] Lost connection to peer 1"),
        RuntimeError("customer failed: out of memory"),
        RuntimeError("There is no Stream(gpu, 0) in current thread."),
        ValueError("[METAL] Command buffer execution failed: Insufficient Memory"),
        KeyError("[malloc] Unable to allocate 5 bytes."),
    ],
)
def test_another_error_is_not_taken_for_one_of_the_device(error: Exception) -> None:
    assert recognise(error) is None


def test_the_machines_own_memory_counts_too() -> None:
    """std::bad_alloc arrives as MemoryError; so does what numpy cannot get."""
    for raised in (MemoryError("std::bad_alloc"), MemoryError()):
        found = recognise(raised)
        assert found is not None and found.kind == Kind.OUT_OF_MEMORY and found.of_memory
    with pytest.raises(MemoryError) as failed:
        np.empty(1 << 60, np.uint8)
    assert "Unable to allocate" in str(recognise(failed.value))


def test_only_what_a_smaller_computation_mends_counts_as_memory() -> None:
    of_memory = {kind for text, kind in TEXTS.items() if (found := recognise(RuntimeError(text))) and found.of_memory}
    assert of_memory == {Kind.OUT_OF_MEMORY, Kind.TOO_LARGE}
