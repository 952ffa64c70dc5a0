"""The first 20 losses of every shipped recipe on a tiny model, as tests/golden.json keeps them.

python tests/golden.py writes that file anew: only after a change that is meant to change what is computed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

FILE = Path(__file__).with_name("golden.json")
RECIPES = {"quick": 4, "qlora": 4, "lora": 16}  # and the bits of the base
# Small steps for a small model, and everything random switched on.
SETTINGS = ("train.lr=2e-3", "train.seed=11", "data.max_tokens=128", "lora.dropout=0.05", "train.neftune_alpha=2")


def curve(recipe: str, folder: Path) -> list[float]:
    """20 training losses, trained as `mlxtune train -c recipe` does."""
    import tiny
    from rich.console import Console

    from mlxtune import config, tuning
    from mlxtune.train import events
    from mlxtune.train.display import Display

    if not (folder / "hf").exists():
        tiny.make_model(folder / "hf", "qwen3", seed=7)
        tiny.write_jsonl(folder / "data" / "train.jsonl", tiny.conversations(40))
    model = folder / f"{RECIPES[recipe]}-bit"
    if not model.exists():
        bits = ("--bits", str(RECIPES[recipe]), *(("--group-size", "32") if RECIPES[recipe] < 16 else ()))
        done = tiny.mlxtune("convert", folder / "hf", model, *bits)
        assert done.returncode == 0, done.stderr
    flags = {"model.path": str(model), "data.path": str(folder / "data")}
    resolved = config.load(recipe, (*SETTINGS, "train.steps=20", "train.epochs=null"), flags)
    with Display(Console(quiet=True)) as display:
        tuning.tune(resolved, folder / recipe, display)
    return [event["loss"] for event in events.read(folder / recipe) if event["kind"] == "train"]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as made:
        FILE.write_text(json.dumps({recipe: curve(recipe, Path(made)) for recipe in RECIPES}, indent=1) + "\n")
