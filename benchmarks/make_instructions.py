"""Self-Instruct with a real model on this machine: what a round gives, without a network, and whether kills change it.

    python benchmarks/make_instructions.py MODEL SEEDS OUT [--kills N] [options of `mlxtune make instructions`]

Runs the installed command without a network, where the system can take it away (`unshare --net`), and with the suite
basics guarded. Then the package rouge-score, which shares no code with ours, compares every kept instruction with the
seeds, with those kept before it and with the guarded prompts. --kills: the same is made again in OUT-killed, with so
many SIGKILLs at times drawn from the first making's length, and its files are compared byte by byte. Prints one JSON
document; what was measured stands in benchmarks/made.md.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

from mlxtune.evaluate.checks.suite import read_prompts
from mlxtune.make.folder import OURS
from mlxtune.make.seeds import read_seeds

GUARDED = "basics"
WITHOUT_NETWORK = ("unshare", "--net", "--map-root-user")


def command(model: str, seeds: str, out: Path, more: list[str]) -> list[str]:
    program = [str(Path(sys.executable).with_name("mlxtune")), "make", "instructions"]
    return [*program, "--engine", model, "--seeds", seeds, "--out", str(out), "--avoid", GUARDED, *more]


def isolation() -> list[str]:
    """What takes the network from a command; [] where the system does not let us."""
    tried = subprocess.run([*WITHOUT_NETWORK, "true"], capture_output=True, check=False)
    return list(WITHOUT_NETWORK) if tried.returncode == 0 else []


def checked(out: Path, seeds: Path) -> dict[str, Any]:
    """The nearest pairs, by the package rouge-score."""
    scorer = RougeScorer(["rougeL"])

    def nearest(text: str, others: list[str]) -> float:
        return max((scorer.score(other, text)["rougeL"].fmeasure for other in others), default=0.0)

    kept = list(dict.fromkeys(row["made"]["id"] for row in _lines(out / "train.jsonl")))
    texts = {row["made"]["id"]: row["messages"][0]["content"].split("\n\n")[0] for row in _lines(out / "train.jsonl")}
    known = [seed.text for seed in read_seeds(seeds)]
    guarded = [str(message["content"]) for prompt in read_prompts(Path(GUARDED)) for message in prompt]
    worst = {"to_seeds_and_kept": 0.0, "to_guarded": 0.0}
    for name in kept:
        worst["to_seeds_and_kept"] = max(worst["to_seeds_and_kept"], nearest(texts[name], known))
        worst["to_guarded"] = max(worst["to_guarded"], nearest(texts[name], guarded))
        known.append(texts[name])
    return {"instructions": len(kept), **{name: round(score, 4) for name, score in worst.items()}}


def killed(line: list[str], out: Path, seconds: float, kills: int) -> list[float]:
    """Make it again with kills in between; when they fell, in seconds after each start."""
    draw = random.Random(0)
    moments = [round(draw.uniform(0.2, 0.8) * seconds, 1) for _ in range(kills)]
    for moment in moments:
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    return moments


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    model, seeds, out, *more = sys.argv[1:]
    kills = 0
    if "--kills" in more:
        place = more.index("--kills")
        kills = int(more[place + 1])
        del more[place : place + 2]
    alone = isolation()
    began = time.perf_counter()
    line = [*alone, *command(model, seeds, Path(out), [*more, "--json"])]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    document = json.loads(done.stdout)
    found = {
        "network": "cut" if alone else "there",
        "seconds": round(seconds, 1),
        **document,
        "by_rouge_score": checked(Path(out), Path(seeds)),
    }
    if kills:
        again = Path(f"{out}-killed")
        shutil.rmtree(again, ignore_errors=True)
        found["killed_after_seconds"] = killed([*alone, *command(model, seeds, again, more)], again, seconds, kills)
        same = [name for name in OURS if _bytes(again / name) == _bytes(Path(out) / name)]
        found["same_bytes"] = same
    print(json.dumps(found, indent=2, ensure_ascii=False))


def _bytes(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


if __name__ == "__main__":
    main()
