"""lm_eval, and what it does beside its work.

It prints to both streams, warns, logs, and draws progress bars; `quiet` keeps all of that from the user, whose output
is this command's own. It is asked for nothing that needs a network.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import random
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mlxtune.errors import UserError

NAME = "lm_eval"


def require() -> None:
    """Raise UserError where the package is not installed."""
    if importlib.util.find_spec(NAME) is None:
        raise UserError(
            "benchmarks need the package lm_eval, which is not installed", 'Install it: pip install "mlxtune[harness]".'
        )


def installed() -> str:
    """Its name and version, for the record: scores of other versions may differ."""
    return f"{NAME} {version(NAME)}"


def task_files() -> Path:
    """The folder of its tasks."""
    spec = importlib.util.find_spec(NAME)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, whatever it says goes nowhere, and random numbers that it draws are not taken from ours."""
    states = random.getstate(), np.random.get_state()
    silenced = {name: logging.getLogger(name) for name in (NAME, "evaluate", "datasets")}
    levels = {name: logger.level for name, logger in silenced.items()}
    bars = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        for logger in silenced.values():
            logger.setLevel(logging.CRITICAL)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, logger in silenced.items():
            logger.setLevel(levels[name])
        if bars is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = bars
        random.setstate(states[0])
        np.random.set_state(states[1])
