"""A device that fails as Metal and CUDA do: MLX raises RuntimeError with their texts where something is computed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxtune.cli import main
from mlxtune.compute.gradients import Gradients
from mlxtune.compute.loss import Way
from mlxtune.data.dataset.batches import Batch
from mlxtune.train import signals, step

METAL = "[METAL] Command buffer execution failed: {}"  # MLX ends it with a full stop, which we leave out
OUT_OF_MEMORY = METAL.format("Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)")
WATCHDOG = METAL.format("Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)")
LOST = METAL.format(
    "Ignored (for causing prior/excessive GPU errors) (00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)"
)
BUFFERS = "[metal::malloc] Resource limit (499000) exceeded"


class Evaluations:
    """Counts what is computed; from the n-th on (`fail`), everything fails with a text."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count, self.first, self.last, self.text = 0, 0, 0, ""
        for name in ("eval", "async_eval"):
            patch.setattr(mx, name, self._counted(getattr(mx, name)))

    def fail(self, number: int, text: str, times: int = 1 << 30) -> None:
        """The `number`-th from here on fails, and those after it, `times` of them."""
        self.first, self.text = self.count + number, text
        self.last = self.first + times - 1

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(*arrays: Any) -> Any:
            self.count += 1
            if self.text and self.first <= self.count <= self.last:
                raise RuntimeError(self.text)
            return real(*arrays)

        return evaluate


def command(capsys: pytest.CaptureFixture[str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in this process."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(signals, "unwind_on_signals", lambda: None)
        patch.setattr(sys, "stderr", sys.stderr)  # main puts another in its place
        main([*map(str, words)])
    said = capsys.readouterr()
    return subprocess.CompletedProcess(words, int(ended.value.code or 0), said.out, said.err)


def fail_gradients(
    patch: pytest.MonkeyPatch,
    number: int,
    text: str = OUT_OF_MEMORY,
    fits: Callable[[Batch, Way], bool] | None = None,
    kind: type[Exception] = RuntimeError,
) -> list[int]:
    """The run's micro-batches fail from the `number`-th on, counted from 1; with `fits`, those that do not.

    Returns the list of their sizes, which grows with every one that is computed.
    """
    sizes: list[int] = []

    class Failing(Gradients):
        def __call__(self, batch: Batch) -> tuple[mx.array, Any]:
            self.allocate(batch)
            return super().__call__(batch)

        def of_answers(self, batch: Batch, value_of: Any) -> tuple[mx.array, mx.array, Any]:
            self.allocate(batch)
            return super().of_answers(batch, value_of)

        def allocate(self, batch: Batch) -> None:
            if len(sizes) + 1 >= number and not (fits and fits(batch, self.way)):
                raise kind(text)
            sizes.append(len(batch.rows))

    patch.setattr(step, "Gradients", Failing)
    return sizes


def failing(text: str) -> Callable[..., Any]:
    """A function that fails whatever it is given."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(text)

    return fail
