"""A task that supervised tuning leaves half done, and what preferences make of it.

    python benchmarks/preference.py MODEL --work FOLDER
    python benchmarks/preference.py tiny --work FOLDER

MODEL: a small instruction model in mlxtune's format. The rows are the demo's questions to a support desk, each with its
answer as JSON and as the sentence inside it. tiny: two blocks of random weights, and whether a number is odd; a minute.
Half of the rows that SFT sees are answered in JSON, half in words, so that its model is not sure of either.
Then DPO prefers JSON to words, from that adapter:

    held-out accuracy    pairs of which the JSON answer has the higher reward
    the check's rate     answers to prompts that no run saw which are JSON as a whole (`mlxtune eval --suite`)

FOLDER keeps what was computed: a second call goes on with what is missing. Dated results are in results.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Question = tuple[list[dict[str, str]], str, str]  # messages, the answer in JSON, the same in words
DEMO = Path(__file__).resolve().parent.parent / "mlxtune" / "demo" / "data"
ROWS = 96  # to learn from
PROMPTS = 16  # of the suite
ANSWER_TOKENS = 80  # of an answer: those of the rows have fewer
SFT = ("train.epochs=1", "train.batch_rows=4", "train.lr=4e-4", "train.warmup_steps=4", "train.eval_every=0")
DPO = ("train.epochs=1", "train.batch_rows=2", "train.accumulate=4", "train.lr=1e-4", "train.warmup_steps=2")
# Of the tiny model, which knows nothing yet.
TINY_SFT = ("train.steps=100", "train.batch_rows=16", "train.lr=1e-2", "lora.train_also=[embeddings, head, norms]")
TINY_DPO = ("train.epochs=1", "train.batch_rows=4", "train.accumulate=2", "train.lr=5e-4", "train.warmup_steps=2")
COMMON = ("train.report=off", "train.save_every=0", "lora.rank=8", "lora.alpha=16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's folder, or tiny")
    parser.add_argument("--work", type=Path, required=True, help="a folder that keeps everything")
    parser.add_argument("--objective", default="dpo", help="dpo, ipo, apo, simpo or orpo")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], help="other settings of the run on pairs")
    given = parser.parse_args()
    is_tiny = given.model == "tiny"
    model = tiny_model(given.work) if is_tiny else Path(given.model)
    write_rows(given.work, odd_or_even if is_tiny else questions)
    sft, tuned = given.work / "sft", given.work / given.objective
    train(model, given.work / "rows", sft, *(TINY_SFT if is_tiny else SFT))
    on_pairs = TINY_DPO if is_tiny else DPO
    objective = f"preference.loss={given.objective}"
    train(model, given.work / "pairs", tuned, *on_pairs, objective, f"lora.start_from={sft}", *given.settings)
    events = [json.loads(line) for line in (tuned / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [event for event in events if event["kind"] == "eval"]
    for name in ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected"):
        print(f"held-out {name}: {evaluations[0][name]:.4f} -> {evaluations[-1][name]:.4f}")
    steps = [event for event in events if event["kind"] == "train"]
    tokens, computed = (sum(step[name] for step in steps) for name in ("tokens", "computed_tokens"))
    print(f"{len(steps)} steps, {computed:,} tokens computed, {computed / tokens:.2f} of those of both whole rows")
    base = ("--against", model, "--against-adapter", sft)
    suite = ("--suite", given.work / "suite.jsonl", "--max-tokens", str(ANSWER_TOKENS))
    run("eval", "--model", model, "--adapter", tuned, *base, *suite)


def write_rows(work: Path, asked: Callable[[str], Iterator[Question]]) -> None:
    """rows: SFT's, in JSON and in words by turns; pairs: JSON preferred to words; suite.jsonl: prompts, checked."""
    learned, held_out, unseen = (list(asked(name)) for name in ("train", "valid", "test"))
    learned = learned[:ROWS]
    (work / "rows").mkdir(parents=True, exist_ok=True)
    (work / "pairs").mkdir(exist_ok=True)
    for name, some in (("train", learned), ("valid", held_out)):
        supervised, pairs = [], []
        for number, (messages, answer, words) in enumerate(some):
            said = answer if number % 2 else words
            supervised.append({"messages": [*messages, {"role": "assistant", "content": said}]})
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (answer, words))
            pairs.append({"prompt": messages, "chosen": chosen, "rejected": rejected})
        write(work / "rows" / f"{name}.jsonl", supervised)
        write(work / "pairs" / f"{name}.jsonl", pairs)
    suite = [{"messages": messages, "checks": ["json"]} for messages, _, _ in unseen[:PROMPTS]]
    write(work / "suite.jsonl", suite)


def questions(split: str) -> Iterator[Question]:
    """(messages up to the first answer, that answer in JSON, the sentence inside it) of each of the demo's rows."""
    for line in (DEMO / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        place = [message["role"] for message in messages].index("assistant")
        answer = messages[place]["content"]
        yield messages[:place], answer, json.loads(answer)["reply"]


def odd_or_even(split: str) -> Iterator[Question]:
    """The same of numbers, each in one split."""
    start = ["train", "valid", "test"].index(split)
    for number in range(start, 3 * ROWS, 3):
        is_odd = number % 2 == 1
        words = "yes, it is odd" if is_odd else "no, it is even"
        yield [{"role": "user", "content": f"is {number} odd?"}], json.dumps({"odd": is_odd}), words


def tiny_model(work: Path) -> Path:
    """A model of random weights, as the tests make it."""
    sys.path.insert(0, str(DEMO.parent.parent.parent / "tests"))
    import tiny

    folder = work / "model"
    return folder if folder.is_dir() else tiny.make_model(folder)


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def train(model: Path, data: Path, out: Path, *settings: str) -> None:
    """A run, unless it is there; how long it took."""
    if (out / "adapter_config.json").exists():
        return
    chosen = [word for setting in (*COMMON, *settings) for word in ("--set", setting)]
    began = time.perf_counter()
    run("train", "--model", model, "--data", data, "--out", out, *chosen)
    print(f"{out.name}: {time.perf_counter() - began:.0f} s", flush=True)


def run(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "mlxtune", *map(str, words)], check=True)


if __name__ == "__main__":
    main()
