"""Competitors measured in child processes, one after the other.

Every measurement is a child process that trains on the same rows and prints one JSON line; competitors take turns, so
that a machine's moods fall on both:

    pair 1   mlxtune, mlx-lm
    pair 2   mlx-lm, mlxtune
    ...

mlx-lm runs as its own command runs it (its batches, its padding, its loss, MLX's own limits of memory and cache, TF32
where MLX uses it), with our rank, targets, activation type, BLAS, compile setting and watchdog variable. What warms up
is not counted: one step, or where steps are compiled all of them, as often as it takes until nothing is compiled any
more; what the first time took is told apart.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxtune.bench.figures import OURS, THEIRS, Measured
from mlxtune.config.paths import with_absolute_paths
from mlxtune.config.resolve import Config
from mlxtune.errors import UserError
from mlxtune.machine import backend

REFUSED = 2  # a child's exit status that says what is wrong


def measure(settings: Config, rows: int, who: str) -> Measured:
    """Run one competitor in a child process. Raises UserError with what it says, or its last line, when it fails."""
    environment = dict(os.environ)
    if who != OURS:
        environment |= backend.as_without_mlxtune()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.yaml"
        file.write_text(with_absolute_paths(settings).to_yaml(), encoding="utf-8")
        command = [sys.executable, "-m", "mlxtune.bench", who, str(file), str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == REFUSED:
        error, hint = _last_line(done.stdout)
        raise UserError(f"the measurement of {who} failed: {error}", hint)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        reason = lines[-1] if lines else "no reason given"
        raise UserError(f"the measurement of {who} failed: {reason}")
    return Measured(**_last_line(done.stdout))


def _last_line(output: str) -> Any:
    """The JSON that a child printed last."""
    return json.loads(output.strip().splitlines()[-1])


def compare(
    settings: Config, rows: int, pairs: int, say: Callable[[str], None], other: str = THEIRS
) -> tuple[list[Measured], Any]:
    """(all measurements, the ratio of median seconds per row with its spread) of alternating pairs.

    say: is given a line for people after every measurement.
    """
    found: list[Measured] = []
    for number in range(1, pairs + 1):
        order = (OURS, other) if number % 2 else (other, OURS)
        for who in order:
            one = measure(settings, rows, who)
            found.append(one)
            say(f"pair {number}/{pairs}: {who} {one.seconds_per_row:.3f} s per {one.unit}")
    ours = [one for one in found if one.who == OURS]
    theirs = [one for one in found if one.who == other]
    our_seconds = [one.seconds_per_row for one in ours]
    their_seconds = [one.seconds_per_row for one in theirs]
    single_pairs = [a / b for a, b in zip(our_seconds, their_seconds, strict=True)]
    our_peak = statistics.median(one.peak_bytes for one in ours)
    their_peak = statistics.median(one.peak_bytes for one in theirs)
    return found, {
        "time": statistics.median(our_seconds) / statistics.median(their_seconds),
        "time_lowest": min(single_pairs),
        "time_highest": max(single_pairs),
        "peak": our_peak / their_peak,
        "pairs": pairs,
    }
