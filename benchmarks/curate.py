"""Whether `mlxtune data curate` finds the sound rows of a set, and whether they teach more than as many by chance.

    python benchmarks/curate.py MODEL gsm8k_train.jsonl --work FOLDER

800 rows of questions and answers, every second one with the answer of another row. `data curate` keeps 150 by IFD
alone; 150 are drawn by chance, three times. Runs of the same settings train on them, and are compared on the loss of 64
rows that come after the 800 in the file. FOLDER keeps what was computed, so that a second call goes on. Dated results:
curate.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mlxtune.make.curation import candidates as reading
from mlxtune.make.curation.strangers import strangers
from mlxtune.train.events import EVENTS_FILE, read

SPOILED = "another row's answer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", type=Path, help='JSON Lines with "question" and "answer"')
    parser.add_argument("--work", type=Path, required=True, help="folder for what is computed")
    parser.add_argument("--count", type=int, default=800, help="rows to choose of")
    parser.add_argument("--keep", type=int, default=150)
    parser.add_argument("--draws", type=int, default=3, help="sets drawn by chance")
    parser.add_argument("--most-letters", type=int, help="of a row: take shorter ones alone, for a slow machine")
    parser.add_argument("--valid", type=int, default=64, help="rows to be compared on")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], help="settings of all runs")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    rows = _rows(given.rows, given.count + given.valid, given.most_letters)
    mixed = _spoiled(rows[: given.count])
    _write(given.work / "mixed.jsonl", mixed)
    began = time.perf_counter()
    report = _curated(given)
    print(f"curation: {time.perf_counter() - began:.0f} s, border {report['border']}, {json.dumps(report['after'])}")
    _draw_strangers(given)
    chosen = [json.loads(line) for line in (given.work / "curated.jsonl").read_text(encoding="utf-8").splitlines()]
    sets = {"by data curate": chosen}
    for draw in range(1, given.draws + 1):
        sets[f"by chance {draw}"] = random.Random(draw).sample(mixed, given.keep)
    print(f"| {given.keep} rows | spoiled | held-out loss |\n| --- | --- | --- |")
    for name, some in sets.items():
        data = given.work / name.replace(" ", "-")
        _write(data / "train.jsonl", [{"messages": row["messages"]} for row in some])
        _write(data / "valid.jsonl", rows[given.count :])
        print(f"| {name} | {_share(some):.1%} | {_loss_after(given, data):.4f} |", flush=True)
    _draw_scores(given)


def _rows(file: Path, count: int, most_letters: int | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if most_letters is not None and len(row["question"]) + len(row["answer"]) > most_letters:
                continue
            said = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            found.append({"messages": said})
            if len(found) == count:
                return found
    raise SystemExit(f"{file} has {len(found)} rows, {count} are needed")


def _spoiled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every second row with the answer of the second row after it."""
    bad = rows[1::2]
    answers = [row["messages"][1] for row in bad[1:] + bad[:1]]
    out = []
    for place, row in enumerate(rows):
        if place % 2:
            out.append({"messages": [row["messages"][0], answers[place // 2]], "spoiled": True})
        else:
            out.append({**row, "spoiled": False})
    return out


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _share(rows: list[dict[str, Any]]) -> float:
    return sum(row["spoiled"] for row in rows) / len(rows)


def _mlxtune(*words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mlxtune", *map(str, words)], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def _curated(given: argparse.Namespace) -> dict[str, Any]:
    out = given.work / "curated.jsonl"
    words = ("data", "curate", given.work / "mixed.jsonl", "--model", given.model, "--keep", str(given.keep))
    found: dict[str, Any] = json.loads(_mlxtune(*words, "--out", out, "--json", "--force"))
    return found


def _loss_after(given: argparse.Namespace, data: Path) -> float:
    """The held-out loss of a run on these rows, one epoch. A run that ended is not repeated; one of other rows, another
    model or other settings has a folder of its own.
    """
    settings = ["train.eval_every=0", *given.settings]
    of = [*(str((data / name).read_bytes()) for name in ("train.jsonl", "valid.jsonl")), given.model, *settings]
    run = data / f"run-{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:12]}"
    if not _has_ended(run):
        words = [word for setting in settings for word in ("--set", setting)]
        _mlxtune("train", "--model", given.model, "--data", data, "--out", run, "--force", *words)
    return float([event["loss"] for event in read(run) if event["kind"] == "eval"][-1])


def _has_ended(run: Path) -> bool:
    """Whether a run trained as long as it was to: an interrupted one ends too, in another state, a killed one never."""
    if not (run / EVENTS_FILE).exists():
        return False
    events = read(run)
    return bool(events) and events[-1]["kind"] == "end" and events[-1]["state"] == "finished"


def _scores(given: argparse.Namespace) -> dict[str, float]:
    """The IFD of each row and stranger, by its key."""
    rows = _read(given.work / "curated.scores.jsonl")
    return {row["row"]: row["behind"] / row["alone"] for row in rows if "behind" in row}


def _draw_strangers(given: argparse.Namespace) -> None:
    """What the border was measured on."""
    scores = _scores(given)
    candidates, _ = reading.read([given.work / "mixed.jsonl"], {})
    found = [scores[one.key] for one in strangers(candidates) if one.key in scores]
    if found:
        lowest, low, half = np.quantile(found, (0, 0.05, 0.5))
        print(f"{len(found)} strangers: IFD {lowest:.3f} at the least, 5% below {low:.3f}, half below {half:.3f}")


def _draw_scores(given: argparse.Namespace) -> None:
    """How IFD tells the two kinds of rows apart, and what the other direction would have kept."""
    mixed = {json.dumps(row["messages"]): row["spoiled"] for row in _read(given.work / "mixed.jsonl")}
    scores = _scores(given)
    candidates, _ = reading.read([given.work / "mixed.jsonl"], {})
    pairs = sorted((scores[one.key], mixed[json.dumps(one.messages)]) for one in candidates if one.key in scores)
    print("\n| rows | IFD: 10% below | half below | 90% below |\n| --- | --- | --- | --- |")
    for name, spoiled in (("sound", False), ("spoiled", True)):
        values = [score for score, is_spoiled in pairs if is_spoiled == spoiled]
        tenths = [values[round(part * (len(values) - 1))] for part in (0.1, 0.5, 0.9)]
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in tenths)} |")
    below = [is_spoiled for score, is_spoiled in pairs if score < 1]
    for name, some in (("smallest IFD", below[: given.keep]), ("largest IFD below 1", below[-given.keep :])):
        print(f"{name}: {sum(some) / len(some):.1%} of {len(some)} spoiled")


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
