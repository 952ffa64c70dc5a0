"""Rows made in the columns of known benchmarks, and folders of them as `eval --benchmark-data` reads them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import tiny

THINGS = ("apples", "pears", "nails", "stamps", "coins", "books", "bricks", "shells")
SUBJECTS = ("anatomy", "astronomy")


def mmlu(questions: int, examples: int = 5, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Questions of two subjects in turn, and examples of each."""
    rng = random.Random(seed)
    splits: dict[str, list[dict[str, Any]]] = {"test": [], "dev": []}
    for split, count in (("test", questions), ("dev", examples * len(SUBJECTS))):
        for number in range(count):
            a, b = rng.randint(2, 60), rng.randint(2, 60)
            words = " ".join(rng.sample(THINGS, 3))
            choices = [str(a + b + off) for off in rng.sample(range(-3, 4), 4)]
            question = (
                f"{words}: {a} of the first and {b} of the last lie on table {number}. How many are they together?"
            )
            row = {"question": question, "choices": choices, "answer": rng.randrange(4)}
            splits[split].append({**row, "subject": SUBJECTS[number % 2]})
    return splits


def hellaswag(count: int, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Endings of several words; brackets, which the task takes out, stand in some of them."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        endings = [f"puts the {rng.choice(THINGS)} [step] into box {rng.randint(1, 99)} and goes." for _ in range(4)]
        first = f"A man has {rng.randint(2, 99)} {rng.choice(THINGS)} on a long table in the yard."
        rows.append(
            {
                "activity_label": "Sorting",
                "ctx_a": first,
                "ctx_b": "then he",
                "endings": endings,
                "label": str(number % 4),
            }
        )
    return {"validation": rows}


def gsm8k(count: int, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    rng = random.Random(seed)
    splits: dict[str, list[dict[str, Any]]] = {}
    for split in ("test", "train"):
        splits[split] = []
        for _ in range(count):
            a, b = rng.randint(2, 900), rng.randint(2, 900)
            question = f"Ann has {a} {rng.choice(THINGS)} and gets {b} more. How many has she?"
            splits[split].append(
                {"question": question, "answer": f"She has {a}+{b}=<<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"}
            )
    return splits


def write(folder: Path, **sets: dict[str, list[dict[str, Any]]]) -> Path:
    """The name of a benchmark -> its splits."""
    for name, splits in sets.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            tiny.write_jsonl(folder / name / f"{split}.jsonl", rows)
    return folder
