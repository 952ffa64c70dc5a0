"""The first 20 losses of every shipped recipe on a tiny model, and of one of them in 16 bits, as tests/golden.json
keeps them.

python tests/golden.py writes that file anew: only after a change that is meant to change what is computed.
python tests/golden.py --spread measures how far the losses move when sums are taken in another order, as another CPU or
a GPU takes them: where the limits of the 16-bit runs come from.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("golden.json")
# Small steps for a small model, and everything random switched on.
SETTINGS = ("train.lr=2e-3", "train.seed=11", "data.max_tokens=128", "lora.dropout=0.05", "train.neftune_alpha=2")
JITTER, DRAWS = 3e-6, 8  # relative, of a product before it is rounded: another order of a float32 sum


@dataclass(frozen=True)
class Run:
    """recipe: its name; bits: of the base; dtype: of the base's scales and of the activations; limit: relative, how far
    a loss may be from the committed one.

    In float32 the last bits depend on the BLAS and its threads. In 16 bits they decide now and then how a product is
    rounded, and twenty steps carry that on. --spread found 5.6e-6 in float16 and 4.6e-5 in bfloat16, for products of
    the base alone; the limits are ten times that, for what else a machine sums in its own order. Still they are below
    the distance to the float32 run (1.4e-4 and 6.9e-4): one that forgot its type would be noticed.
    """

    recipe: str
    bits: int
    dtype: str = "float32"
    limit: float = 1e-5

    @property
    def name(self) -> str:
        return f"{self.recipe} {self.dtype}"


RUNS = (
    Run("quick", 4),
    Run("qlora", 4),
    Run("lora", 16),
    Run("quick", 4, "float16", 6e-5),
    Run("quick", 4, "bfloat16", 5e-4),
)


def curve(run: Run, folder: Path, out: str = "") -> list[float]:
    """20 training losses, trained as `mlxtune train -c RECIPE` does. out: name of the run's folder in `folder`."""
    import tiny
    from rich.console import Console

    from mlxtune.cli.display import Display
    from mlxtune.config import resolve
    from mlxtune.model import convert
    from mlxtune.train import events
    from mlxtune.train.run import tune as train

    if not (folder / "hf").exists():
        tiny.make_model(folder / "hf", "qwen3", seed=7)
        tiny.write_jsonl(folder / "data" / "train.jsonl", tiny.conversations(40))
    model = folder / f"{run.bits}-bit-{run.dtype}"
    if not model.exists():
        target = convert.Quantization.of(run.bits, 32 if run.bits < 16 else None, None)
        convert.convert(str(folder / "hf"), model, target, run.dtype)
    flags = {"model.path": str(model), "data.path": str(folder / "data"), "train.dtype": run.dtype}
    resolved = resolve.load(run.recipe, (*SETTINGS, "train.steps=20", "train.epochs=null"), flags)
    with Display(Console(quiet=True)) as display:
        train(resolved, folder / (out or run.name), display)
    return [event["loss"] for event in events.read(folder / (out or run.name)) if event["kind"] == "train"]


def summed_otherwise(draws: Any) -> Any:
    """A stand-in for `mlxtune.model.dense._multiply`: the product with its seeded jitter, then rounded."""
    import mlx.core as mx

    from mlxtune.model.dense import dense_weight

    def rounded(product: mx.array, dtype: mx.Dtype) -> mx.array:
        noise = mx.random.normal(product.shape, key=mx.random.key(next(draws)))
        return (product + JITTER * mx.abs(product).mean() * noise).astype(dtype)

    def multiply(layer: Any, x: mx.array) -> mx.array:
        @mx.custom_function
        def product(x: mx.array) -> mx.array:
            return rounded(x.astype(mx.float32) @ dense_weight(layer, x.dtype).astype(mx.float32).T, x.dtype)

        @product.vjp
        def product_vjp(primals: Any, cotangent: Any, _: Any) -> mx.array:
            back = cotangent.astype(mx.float32) @ dense_weight(layer, cotangent.dtype).astype(mx.float32)
            return rounded(back, cotangent.dtype)

        return product(x)

    return multiply


def spread(run: Run, folder: Path) -> float:
    """The largest relative difference of a loss from the undisturbed run's, over all draws."""
    from mlxtune.model import dense

    plain, real, worst = curve(run, folder), dense._multiply, 0.0
    for draw in range(DRAWS):
        dense._multiply = summed_otherwise(count(draw << 20))
        try:
            moved = curve(run, folder, f"{run.name} {draw}")
        finally:
            dense._multiply = real
        worst = max(worst, *(abs(a / b - 1) for a, b in zip(moved, plain, strict=True)))
    return worst


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as made:
        if "--spread" in sys.argv:
            for one in RUNS:
                if one.bits < 16:
                    print(f"{one.name}: {spread(one, Path(made)):.1e}")
        else:
            FILE.write_text(json.dumps({one.name: curve(one, Path(made)) for one in RUNS}, indent=1) + "\n")
