"""What the recipes compute does not change unnoticed."""

from __future__ import annotations

import json
from pathlib import Path

import golden
import numpy as np
import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("run", golden.RUNS, ids=lambda run: run.name)
def test_the_first_twenty_losses_of_a_recipe_are_those_that_were_committed(run: golden.Run, folder: Path) -> None:
    """Within the run's limit, of which tests/golden.py says where it comes from. It made the numbers, too."""
    wanted = json.loads(golden.FILE.read_text())[run.name]
    assert len(wanted) == 20 and wanted[-1] < wanted[0]
    np.testing.assert_allclose(golden.curve(run, folder), wanted, rtol=run.limit)


@pytest.mark.parametrize("run", [run for run in golden.RUNS if run.dtype != "float32"], ids=lambda run: run.name)
def test_a_run_that_forgot_its_16_bits_would_be_noticed(run: golden.Run) -> None:
    kept = json.loads(golden.FILE.read_text())
    apart = np.array(kept[run.name]) / np.array(kept[f"{run.recipe} float32"]) - 1
    assert np.abs(apart).max() > run.limit
