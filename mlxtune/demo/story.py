"""The demo, told step by step: convert, measure, tune, measure again, compare, fuse, export."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from mlxtune_convert.files import contents, digest, holds_something, refuse_existing
from mlxtune_convert.sizes import size
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxtune.adapter import adapter_files
from mlxtune.config import resolve
from mlxtune.data.dataset import conversations
from mlxtune.demo import model as embedded
from mlxtune.durations import clock
from mlxtune.errors import UserError
from mlxtune.evaluate import before_after
from mlxtune.evaluate.before_after import Answering, Asked
from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.checks.suite import read_suite
from mlxtune.evaluate.comparison.folder import NAMES
from mlxtune.evaluate.comparison.scores import Side
from mlxtune.evaluate.engines.pair import Pair
from mlxtune.evaluate.engines.request import Answer
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.evaluate.held_out import held_out
from mlxtune.evaluate.score import Score, score_examples
from mlxtune.model import convert
from mlxtune.model.load import Loaded, load
from mlxtune.ship.artefacts import Artefact, FusedMlx, HuggingFace, Peft
from mlxtune.ship.export import ship
from mlxtune.ship.gguf import Gguf, GgufAdapter
from mlxtune.ship.request import Request
from mlxtune.ship.verify import Report
from mlxtune.train import events
from mlxtune.train.events import Listener
from mlxtune.train.identity import of_model
from mlxtune.train.run import tune
from mlxtune.train.run_folder import RunFolder

STEPS = 48
# What the demo makes, and all that --force removes.
FOLDERS = ("model", "run", "evaluation", "fused", "peft", "hf", "gguf")
