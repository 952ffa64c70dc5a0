"""Whether files hold what they were made of: the same tensors, bit for bit or, after a sum, within rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

from mlxtune_convert.errors import UserError
from mlxtune_convert.peft.adapter_folder import Update

SUMS = 1e-6  # relative to a matrix's largest number: how far apart two orders of summing in float32 may be


@dataclass
class Comparison:
    """How many tensors hold what they were made of."""

    equal: int = 0  # the same bit for bit
    near: int = 0  # the same within rounding
    wrong: list[str] = field(default_factory=list)  # names of all others
    largest: float = 0.0  # difference of two numbers in one of those
    left_out: int = 0  # have no counterpart in MLX, so that nothing can be said

    def require(self, source: Path) -> str:
        """What is equal, in words. Raises UserError when something is not, or when there is nothing."""
        count = self.equal + self.near + len(self.wrong)
        if not count:
            raise UserError(f"nothing to compare with {source}: no tensors")
        if self.wrong:
            much = f", by up to {self.largest:.2g}" if self.largest else ""
            raise UserError(
                f"{len(self.wrong)} of {count} tensors are not those of {source}{much}, first {self.wrong[0]}",
                "It was made of something else, trained since, or damaged.",
            )
        near = f", {self.near} within rounding" if self.near else ""
        left = f"; {self.left_out} that MLX does not have were not compared" if self.left_out else ""
        return f"{self.equal} tensors equal bit for bit{near}{left}"


def compare(
    found: Mapping[str, Callable[[], np.ndarray]],
    expected: Iterable[tuple[str, np.ndarray]],
    is_left_out: Callable[[str], bool] = lambda name: False,
    summed: bool = False,
) -> Comparison:
    """Compare named tensors, of any shape.

    found: how to read each; expected: (name, what it should be); is_left_out: names that may be in `found` alone;
    summed: numbers that were added up may differ by the rounding of their type.
    """
    result, seen = Comparison(), set()
    for name, array in expected:
        seen.add(name)
        other = found[name]() if name in found else None
        if other is None or other.shape != array.shape:
            result.wrong.append(name)
        elif other.dtype == array.dtype and other.tobytes() == array.tobytes():
            result.equal += array.ndim > 0  # a scale is no tensor
        else:
            difference = _difference(other, array)
            if summed and difference <= _rounding(array):
                result.near += 1
            else:
                result.wrong.append(name)
                result.largest = max(result.largest, difference)
    for name in found.keys() - seen:
        if is_left_out(name):
            result.left_out += 1
        else:
            result.wrong.append(name)
    result.wrong.sort()
    return result


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest; infinite where only one of two numbers is finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(one.astype(np.float32) - other.astype(np.float32))
    return float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max(initial=0.0))


def _rounding(array: np.ndarray) -> float:
    """How far two ways to sum and round a matrix may be apart in its largest number."""
    with np.errstate(over="ignore"):
        largest = float(np.abs(array.astype(np.float32)).max(initial=0.0))
    return largest * (float(ml_dtypes.finfo(array.dtype).eps) + SUMS)


def merged(weight: np.ndarray, update: Update) -> np.ndarray:
    """A layer's matrix [out, in], or stack of them, with its update, float32: as `LoRALinear.merged` has it."""
    a, b, scale = update.a, update.b, np.float32(update.scale)
    moved: np.ndarray = weight.astype(np.float32) + scale * (b @ a if a.ndim == 3 else b.T @ a.T)
    if update.m is None:
        return moved
    return moved * (update.m / np.linalg.norm(moved, axis=1))[:, None]
