"""Does a step take as much less time as it computes fewer tokens? The same step with shared beginnings and without.

    python benchmarks/step_time.py MODEL FILE [--rows 4] [--turns 4] [--pairs 5]

MODEL: a model folder; FILE: conversations. The first --rows of them with --turns answers or more, cut behind so many,
each answer an example of its own (`data.expand_turns=all`). Both runs are prepared in this process, proofs included;
then they take the same step in turns, so that a machine's moods fall on both. Prints seconds, the ratio of the medians
with its spread, and the share of the tokens that is computed: the ratio should be at most 1.3 times the share.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from mlxtune.config import resolve
from mlxtune.config.resolve import Config
from mlxtune.data.rows.formats import Record, read
from mlxtune.train import optim
from mlxtune.train.preparation import prepare
from mlxtune.train.run_data import read_data
from mlxtune.train.run_folder import RunFolder
from mlxtune.train.step import StepFunction

SETTINGS = ("train.epochs=1", "data.expand_turns=all", "data.on_damage=keep", "data.cache=off", "data.max_tokens=8192")
RANK = ("lora.rank=8", "lora.alpha=16", "train.dtype=float32", "train.memory_limit=off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_rows(asked.file, Path(folder), asked.rows, asked.turns)
        flags = {"model.path": str(asked.model), "data.path": folder, "train.batch_rows": asked.rows}
        usual = resolve.load(None, (*SETTINGS, *RANK), flags)
        steps = {"shared": step_of(usual), "apart": step_of(with_prefix_off(usual))}
        for step in steps.values():
            step(1)  # which warms up
        found: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
        for number in range(asked.pairs):
            for name in list(steps) if number % 2 else reversed(list(steps)):
                found[name].append(steps[name](1))
                print(f"pair {number + 1}: {name} {found[name][-1]['seconds']:.2f} s", flush=True)
    report(found["shared"], found["apart"])


def write_rows(file: Path, folder: Path, rows: int, turns: int) -> None:
    """train.jsonl with the first conversations of so many answers, cut behind the last; valid.jsonl with one."""
    chosen: list[str] = []
    for record in read(file, {}):
        messages = record.messages or [] if isinstance(record, Record) else []
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if len(answers) >= turns and len(chosen) < rows:
            chosen.append(json.dumps({"messages": messages[: answers[turns - 1] + 1]}))
    (folder / "train.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    (folder / "valid.jsonl").write_text(chosen[0] + "\n", encoding="utf-8")


def with_prefix_off(config: Config) -> Config:
    return config.model_copy(update={"fast": config.fast.model_copy(update={"prefix": "off"})})


def step_of(config: Config) -> StepFunction:
    """The step of a run, its fast ways proven."""
    data, config = read_data(config)
    prepared = prepare(config, data, RunFolder(Path()))
    job = prepared.job
    print(f"{prepared.notes[-1]}; {len(job.plan.rows_of_step(1))} rows in step 1", flush=True)
    return StepFunction(job, optim.build(job.section, job.model.trainable_parameters()))


def report(shared: list[dict[str, float]], apart: list[dict[str, float]]) -> None:
    ratios = [one["seconds"] / other["seconds"] for one, other in zip(shared, apart, strict=True)]
    ratio = statistics.median(one["seconds"] for one in shared) / statistics.median(one["seconds"] for one in apart)
    share = shared[0]["computed_tokens"] / apart[0]["computed_tokens"]
    assert shared[0]["tokens"] == apart[0]["tokens"]
    print(f"tokens {shared[0]['tokens']}, computed {shared[0]['computed_tokens']} and {apart[0]['computed_tokens']}")
    print(
        f"time {ratio:.3f} (single pairs {min(ratios):.3f} to {max(ratios):.3f}), share of the tokens {share:.3f}: "
        f"{ratio / share:.2f} times the share"
    )


if __name__ == "__main__":
    main()
