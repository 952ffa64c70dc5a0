"""mlxtune: convert, tune and ship language models on Apple silicon.

From Python (docs/python.md); nothing of it is imported before it is asked for:

    run = mlxtune.tune("qlora", {"model.path": "model", "data.path": "data"}, out="run")
    mlxtune.evaluate(run).tuned.loss
    mlxtune.export(run, to="peft", out="adapter")
    next(mlxtune.render("model", "data")).text
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mlxtune_convert import __version__

from mlxtune.machine.backend import before_mlx

if TYPE_CHECKING:
    from mlxtune.api.evaluating import Evaluation, evaluate, evaluate_preferences
    from mlxtune.api.exporting import export
    from mlxtune.api.rendering import Rendered, render
    from mlxtune.api.tuning import Run, tune
    from mlxtune.config.resolve import Config
    from mlxtune.errors import Interrupted, UserError

__all__ = [
    "Config",
    "Evaluation",
    "Interrupted",
    "Rendered",
    "Run",
    "UserError",
    "__version__",
    "evaluate",
    "evaluate_preferences",
    "export",
    "render",
    "tune",
]
# Where each name of the API is, from which it is taken when it is first asked for.
PLACES = {
    **dict.fromkeys(("Run", "tune"), "mlxtune.api.tuning"),
    **dict.fromkeys(("Evaluation", "evaluate_preferences"), "mlxtune.api.evaluating"),
    **dict.fromkeys(("export",), "mlxtune.api.exporting"),
    **dict.fromkeys(("Rendered", "render"), "mlxtune.api.rendering"),
    **dict.fromkeys(("Config",), "mlxtune.config.resolve"),
    **dict.fromkeys(("Interrupted", "UserError"), "mlxtune.errors"),
}


if not TYPE_CHECKING:  # a type checker knows the names above, and none but them

    def __getattr__(name: str) -> Any:
        if name == "evaluate":  # the room, which can be called
            return importlib.import_module("mlxtune.evaluate")
        if name not in PLACES:
            raise AttributeError(f"module 'mlxtune' has no attribute {name!r}")
        return getattr(importlib.import_module(PLACES[name]), name)


before_mlx()
