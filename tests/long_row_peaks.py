"""Peaks of the installed `mlxtune train` on one row of 8,192 tokens and on one of 32,768, on a model of four blocks.

    python tests/long_row_peaks.py            the peaks, and their ratio: linear is 4, at most 4.5 is allowed
    python tests/long_row_peaks.py 2048 8192  other lengths

It takes some minutes, so no test runs it; `test_long_rows.py` holds shorter rows to the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiny

ALLOWED = 4.5  # times the peak, for four times the tokens
ONE_STEP = ("train.steps=1", "train.batch_rows=1", "train.save_every=0", "lora.rank=4")


def row(tokens: int) -> dict[str, list[dict[str, str]]]:
    """A conversation of so many tokens, about, of which the tokenizer has one for each byte."""
    answer = "The answer is 42."
    question = ("What follows? " * tokens)[: tokens - len(answer) - 30]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def peak_of(folder: Path, model: Path, tokens: int) -> int:
    """Bytes at the peak of a run on one row, its evaluation on another one of the same length included."""
    data = folder / f"data-{tokens}"
    for name in ("train", "valid"):
        tiny.write_jsonl(data / f"{name}.jsonl", [row(tokens + (name == "train"))])
    began, run = time.perf_counter(), folder / f"run-{tokens}"
    settings = (*ONE_STEP, "train.checkpoint_layers=nested", f"data.max_tokens={tokens + 64}")
    command = [str(Path(sys.executable).with_name("mlxtune")), "train", "--model", str(model), "--data", str(data)]
    command += ["--out", str(run), *(word for setting in settings for word in ("--set", setting))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (step,) = [event for event in events if event["kind"] == "train"]
    notes = [event["text"] for event in events if event["kind"] == "note"]
    peak = max(event["peak_bytes"] for event in events if "peak_bytes" in event)
    print(f"{step['tokens']} tokens: peak {peak / 1e6:.1f} MB, {time.perf_counter() - began:.0f} s", flush=True)
    print("  " + "\n  ".join(note for note in notes if "computed:" in note or "not used" in note))
    return int(peak)


def main() -> None:
    """Print the peaks; end with status 1 where they grow faster than they may."""
    short, long = (int(text) for text in sys.argv[1:3]) if len(sys.argv) > 2 else (8192, 32768)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 1}
        sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 2 * long}
        model = tiny.make_model(folder / "model", "llama", **sizes)
        ratio = peak_of(folder, model, long) / peak_of(folder, model, short)
    print(f"{ratio:.2f} times the peak for {long / short:.0f} times the tokens")
    sys.exit(ratio > ALLOWED * long / short / 4)


if __name__ == "__main__":
    main()
