"""A check that the user wrote: a function of Python. It runs in this process, with the user's own rights."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from typing import Any

from mlxtune.evaluate.checks.arguments import Arguments, CheckError, Kind, Place
from mlxtune.evaluate.checks.check import Rule, Score, SuiteRow
from mlxtune.evaluate.engines.request import Answer

RIGHTS = "ran with your own rights, in no sandbox"
ALLOW = "Read the file, then allow it with --run-code: it runs with your own rights, in no sandbox."


def _python(arguments: Arguments, place: Place) -> Rule:
    """A function of yours, FILE:FUNCTION, says true of (answer, row); with `graded` it gives a number from 0 to 1."""
    name, colon, function_name = arguments.text("python").rpartition(":")
    if not colon or not name:
        raise CheckError(f"python is {function_name!r}", "It is FILE:FUNCTION, such as checks.py:is_polite.")
    graded = arguments.flag("graded")
    if not place.programs.allowed:
        raise CheckError(f"the check python runs {name}", ALLOW)
    function = _function(name, function_name, place)
    arguments.notes[f"{name} {RIGHTS}"] += 0  # said whatever the answers are

    def judge(answer: Answer, row: SuiteRow) -> Score:
        try:
            value = function(answer, row)
        except Exception as error:
            arguments.notes[f"{name}:{function_name} raised {type(error).__name__}: counted as failed"] += 1
            return 0.0
        if value is None:
            return None
        good = isinstance(value, bool | int | float) and math.isfinite(value) and 0 <= value <= 1
        if not good or (not graded and value not in (0, 1)):
            allowed = "a number from 0 to 1" if graded else "true or false"
            arguments.notes[f"{name}:{function_name} gave {str(value)[:40]!r}, not {allowed}: counted as failed"] += 1
            return 0.0
        return float(value)

    return Rule(judge, graded)


def _function(name: str, function_name: str, place: Place) -> Callable[[Answer, SuiteRow], Any]:
    source = place.read(name)
    module = types.ModuleType(f"mlxtune_check_{len(place.files)}")
    module.__file__ = str(place.folder / name)
    sys.modules[module.__name__] = module  # dataclasses look for it there
    try:
        exec(compile(source, module.__file__, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise CheckError(f"{name} cannot be run ({type(error).__name__}: {error})") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        named = [key for key, value in vars(module).items() if isinstance(value, types.FunctionType)]
        raise CheckError(f"{name} has no function {function_name}", f"It has: {', '.join(named) or 'none'}.")
    return function


KINDS = {"python": Kind(_python, ("graded",))}
