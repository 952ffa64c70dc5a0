"""How good a model is: loss on held-out rows, and the answers it gives."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """This package, called: `mlxtune.evaluate(run)`. The function of the API and the room have one name, and whatever
    imports a module of the room puts the room into `mlxtune.evaluate`.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        return importlib.import_module("mlxtune.api.evaluating").evaluate(*args, **options)


sys.modules[__name__].__class__ = _Room
