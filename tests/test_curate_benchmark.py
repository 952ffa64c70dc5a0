"""benchmarks/curate.py: which runs it takes for done, and what it tells of the border."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parent.parent / "benchmarks" / "curate.py"


@pytest.fixture
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("curate_benchmark", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_counts_as_done_only_with_its_end_and_for_its_own_rows_and_settings(
    tmp_path: Path, benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Path] = []
    state = "interrupted"

    def train(*words: str | Path) -> str:
        run = Path(words[words.index("--out") + 1])
        assert "--force" in words
        trained.append(run)
        run.mkdir(exist_ok=True)
        begin = {"kind": "begin", "step": 0, "time": 0.0}
        events = [begin, {"kind": "eval", "step": 2, "loss": len(trained) / 10}]
        events += [{"kind": "end", "step": 2, "state": state}] if state else []
        (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        return ""

    monkeypatch.setattr(benchmark, "_mlxtune", train)
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    given = argparse.Namespace(model="m", settings=["train.lr=1"])
    assert benchmark._loss_after(given, tmp_path) == 0.1
    state = ""  # killed
    assert benchmark._loss_after(given, tmp_path) == 0.2
    state = "finished"
    assert [benchmark._loss_after(given, tmp_path) for _ in range(2)] == [0.3, 0.3]
    given.settings = ["train.lr=2"]
    assert benchmark._loss_after(given, tmp_path) == 0.4
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text('{"other": 1}\n')
        benchmark._loss_after(given, tmp_path)
    given.model = "n"
    assert benchmark._loss_after(given, tmp_path) == 0.7
    assert trained[0] == trained[1] == trained[2] and len(set(trained)) == 5
    given.settings, given.model = ["train.lr=2"], "m"
    assert benchmark._loss_after(given, tmp_path) == 0.6  # as it was


def test_the_rows_that_the_border_was_measured_on_are_told(
    tmp_path: Path, benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"Why {n}?"}, {"role": "assistant", "content": f"So {n}."}]}
        for n in range(41)
    ]
    benchmark._write(tmp_path / "mixed.jsonl", rows)
    candidates, _ = benchmark.reading.read([tmp_path / "mixed.jsonl"], {})
    made = benchmark.strangers(candidates)
    scores = [{"row": one.key, "behind": 1.6 + place / 100, "alone": 2.0} for place, one in enumerate(made)]
    benchmark._write(
        tmp_path / "curated.scores.jsonl", [{"of": {}}, *scores, {"row": "of a row", "behind": 0.1, "alone": 1.0}]
    )
    benchmark._draw_strangers(argparse.Namespace(work=tmp_path))
    assert capsys.readouterr().out == "41 strangers: IFD 0.800 at the least, 5% below 0.810, half below 0.900\n"
