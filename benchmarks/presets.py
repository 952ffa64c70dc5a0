"""Presets against the memory: what the table promises, and what runs take.

    python benchmarks/presets.py                                 12 Macs x 7 sizes: each peak at most 80%, or none fits
    python benchmarks/presets.py --model MODEL --data DATA       three presets of a small model, measured here

The second gives a real model (an MLX folder) three limits of memory, which its presets fill in three ways, runs one
epoch of the 32 longest rows with each, and compares the peak with the predicted one. Ends with status 1 where something
is off by more than 15%.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from mlxtune.compute.fit_memory import SHARE
from mlxtune.compute.memory.prediction import Memory
from mlxtune.config import resolve
from mlxtune.data.rows import formats
from mlxtune.data.rows.formats import Record
from mlxtune.machine import backend
from mlxtune.machine.backend import Machine
from mlxtune.presets import rules, search, table
from mlxtune.presets.peaks import Peaks, Settings
from mlxtune.presets.search import Preset
from mlxtune.presets.wanted import Wanted
from mlxtune.train import events
from mlxtune.train.run import tune
from mlxtune.train.run_data import read_data

ALLOWED = 0.15  # of the predicted peak
ROWS = 32  # of the run whose peak is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="MLX folder")
    parser.add_argument("--data", help="rows to train on")
    given = parser.parse_args()
    if given.model:
        with tempfile.TemporaryDirectory() as name:
            sys.exit(not measured(given.model, given.data, Path(name)))
    sys.exit(not promised())


def promised() -> bool:
    """Print the table, and say whether each cell keeps to its budget."""
    began = time.perf_counter()
    cells = table.table()
    kept = True
    for cell in cells:
        allowed = 0.8 * backend.mac(cell.memory_gib * backend.GIB).working_set
        needed = cell.peak_bytes or cell.needed_bytes or 0
        is_right = needed <= allowed if cell.settings else needed > allowed
        kept = kept and is_right
        print(("" if is_right else "WRONG ") + cell.line())
    print(f"{len(cells)} cells in {time.perf_counter() - began:.0f} s")
    return kept


def measured(model: str, data: str, folder: Path) -> bool:
    """Run three presets, and say whether their peaks were as predicted. folder: for rows and runs."""
    flags = {"model.path": model, "data.path": str(longest_rows(data, folder)), "fast.prefix": "off"}
    rows, _ = read_data(resolve.load(None, (), flags))
    supervised = float(rows.train.targets.sum() / rows.train.lengths.sum())
    wanted = Wanted("format", 1_000, rows.train.lengths.tolist(), supervised)  # so many rows have steps of 16
    peaks = Peaks(Path(model), backend.kind(), wanted)
    rank = rules.advice(wanted, peaks.parameters()).settings["lora.rank"]
    tokens = wanted.covering(search.COVERAGES[0])
    good = True
    for batch_rows, checkpoint in ((8, "none"), (4, 2), (1, "all")):
        # A limit that those settings just fit: which of them is taken then, the search decides.
        memory = peaks.memory(Settings(None, rank, tokens, batch_rows, 16, checkpoint))
        assert isinstance(memory, Memory), memory
        machine = Machine(backend.kind(), backend.memory_bytes(), int(1.02 * memory.total / SHARE))
        preset = search.search(peaks, machine, (None,))
        assert isinstance(preset, Preset) and preset.peak_bytes is not None, preset
        limit = {"train.memory_limit": preset.budget_bytes}
        found = peak_of({**flags, **preset.settings, **limit}, folder / f"run-{batch_rows}")
        off = preset.peak_bytes / found - 1
        good = good and abs(off) <= ALLOWED
        chosen = {key: preset.settings.get(key, "none") for key in ("train.batch_rows", "train.checkpoint_layers")}
        print(f"{chosen}: predicted {preset.peak_bytes / 1e6:.1f} MB, measured {found / 1e6:.1f} MB ({off:+.1%})")
    return good


def longest_rows(data: str, folder: Path) -> Path:
    """A data folder with the longest rows of a file, by their letters: so each epoch has the widest batch there is."""
    records = [record for record in formats.read(Path(data)) if isinstance(record, Record) and record.messages]
    records.sort(key=lambda record: len(json.dumps(record.messages)), reverse=True)
    for name, chosen in (("train", records[:ROWS]), ("valid", records[ROWS : ROWS + 2])):
        lines = [json.dumps({"messages": record.messages}) + "\n" for record in chosen]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def peak_of(settings: dict[str, object], run: Path) -> int:
    """Bytes at the peak of a run of one epoch."""
    fixed = {"train.epochs": 1, "train.eval_every": 0, "train.save_every": 0, "train.patience": 0}
    tune(resolve.load(None, (), {**settings, **fixed}), run)
    return max(int(event["peak_bytes"]) for event in events.read(run) if event["kind"] == "train")


if __name__ == "__main__":
    main()
