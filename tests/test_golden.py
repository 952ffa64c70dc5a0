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


@pytest.mark.parametrize("recipe", golden.RECIPES)
def test_the_first_twenty_losses_of_a_recipe_are_those_that_were_committed(recipe: str, folder: Path) -> None:
    """To 1e-5: the last bits depend on the BLAS and its threads. tests/golden.py made the numbers."""
    wanted = json.loads(golden.FILE.read_text())[recipe]
    assert len(wanted) == 20 and wanted[-1] < wanted[0]
    np.testing.assert_allclose(golden.curve(recipe, folder), wanted, rtol=1e-5)
