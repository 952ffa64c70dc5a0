"""What `train.trunk_cache` brings: the time of a step epoch by epoch, and the losses beside those without it.

    python benchmarks/trunk_cache.py --model MODEL --data DATA --layers 8 --epochs 3

Two runs of the same rows, with and without. Seconds are the processor's own for this process, so that other programs
disturb them little. The dated results are in results.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
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
    parser.add_argument("--layers", type=int, default=8, help="lora.layers")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--set", dest="settings", nargs="*", default=[], help="other settings of both runs")
    given = parser.parse_args()
    backend.prepare()
    kept, kept_seconds = run(given, "auto")
    usual, usual_seconds = run(given, "off")
    each = len(kept) // given.epochs
    print("| epoch | seconds of a step, kept | as usual | kept, over its first epoch |")
    print("|---|---|---|---|")
    first = sum(kept_seconds[:each]) / each
    for epoch in range(given.epochs):
        of_epoch = slice(epoch * each, (epoch + 1) * each)
        one, other = (sum(seconds[of_epoch]) / each for seconds in (kept_seconds, usual_seconds))
        print(f"| {epoch + 1} | {one:.2f} | {other:.2f} | {one / first:.3f} |")
    apart = max(abs(one - other) / other for one, other in zip(kept, usual, strict=True))
    print(f"\nlosses of {len(kept)} steps differ by {apart:.1e} at most, relative")


def run(given: argparse.Namespace, cache: str) -> tuple[list[float], list[float]]:
    """(loss, the processor's seconds) of each step."""
    settings = (
        *(f"lora.layers={given.layers}", f"train.epochs={given.epochs}", f"train.trunk_cache={cache}"),
        *("train.eval_every=0", "train.save_every=0", "train.save_minutes=0", *given.settings),
    )
    config = resolve.load(None, settings, {"model.path": given.model, "data.path": given.data})
    seconds: list[float] = []
    last = 0.0

    def listen(event: dict[str, Any]) -> None:
        """Between two events of training there is nothing but a step."""
        nonlocal last
        now = time.process_time()
        if event["kind"] == "train":
            seconds.append(now - last)
        last = now

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        tune(config, out, listen)
        losses = [event["loss"] for event in events.read(out) if event["kind"] == "train"]
    return losses, seconds


if __name__ == "__main__":
    main()
