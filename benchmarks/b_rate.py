"""LoRA+ (`lora.b_rate`): the losses of short runs that differ in B's rate alone.

    python benchmarks/b_rate.py --model MODEL --data DATA --steps 60 --rates 1e-4 --ratios 1 4 16

DATA: a folder with train.jsonl and valid.jsonl. The dated results are in results.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from mlxtune.config import resolve
from mlxtune.machine import backend
from mlxtune.train import events
from mlxtune.train.run import tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4], help="train.lr")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.0, 4.0, 16.0], help="lora.b_rate")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], help="other settings of all runs")
    given = parser.parse_args()
    backend.prepare()
    print("| train.lr | lora.b_rate | training loss, quarter by quarter | validation loss, at each evaluation |")
    print("|---|---|---|---|")
    for rate in given.rates:
        for ratio in given.ratios:
            taught, held_out = losses(given, rate, ratio)
            quarter = max(1, len(taught) // 4)
            means = [sum(taught[at : at + quarter]) / quarter for at in range(0, quarter * 4, quarter)]
            print(f"| {rate:g} | {ratio:g} | {shown(means)} | {shown(held_out)} |", flush=True)


def losses(given: argparse.Namespace, rate: float, ratio: float) -> tuple[list[float], list[float]]:
    """(of each step, of each evaluation), nats a token."""
    settings = (
        *(f"train.steps={given.steps}", f"train.batch_rows={given.rows}", f"train.lr={rate}", f"lora.b_rate={ratio}"),
        *(f"train.eval_every={max(1, given.steps // 2)}", "train.save_every=0", "train.schedule=constant"),
        *("train.warmup_steps=3", *given.settings),
    )
    config = resolve.load(None, settings, {"model.path": given.model, "data.path": given.data})
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        tune(config, out)
        happened: list[dict[str, Any]] = events.read(out)
    of = {kind: [event["loss"] for event in happened if event["kind"] == kind] for kind in ("train", "eval")}
    return of["train"], of["eval"]


def shown(numbers: list[float]) -> str:
    return ", ".join(f"{number:.3f}" for number in numbers)


if __name__ == "__main__":
    main()
