"""The box of the program: runs it, and does what the box of the tests asks for with what it made."""

from __future__ import annotations

import builtins
import sys
import types
from typing import Any

from mlxtune.evaluate.checks.sandbox.values import Lines, pack, unpack

NAME = "solution"  # the module that the program is


class _Kept:
    """What the program made and the tests hold: they know it by its number."""

    def __init__(self) -> None:
        self._values: list[Any] = []

    def keep(self, value: Any) -> dict[str, Any]:
        if isinstance(value, types.ModuleType):
            return {"module": value.__name__}
        if isinstance(value, type) and issubclass(value, Exception):
            return {"exception": _builtin_of(value), "name": value.__name__}
        if value is NotImplemented:
            return {"not implemented": True}
        self._values.append(value)
        return {"kept": len(self._values) - 1, "type": type(value).__name__}

    def value(self, packed: dict[str, Any]) -> Any:
        return self._values[packed["kept"]]


def _builtin_of(kind: type) -> str:
    """The name of Python's own class that an exception is of."""
    for one in kind.__mro__:
        if getattr(builtins, one.__name__, None) is one:
            return one.__name__
    return "Exception"


def run(source: str, lines: Lines) -> None:
    """Run the program, say what it defines, and then answer until nobody asks any more."""
    kept = _Kept()
    module = types.ModuleType(NAME)
    sys.modules[NAME] = module
    try:
        exec(compile(source, f"{NAME}.py", "exec"), module.__dict__)
        defined = {name: value for name, value in vars(module).items() if not name.startswith("__")}
        lines.send({"defined": {name: _packed(value, kept) for name, value in defined.items()}})
    except BaseException as error:
        lines.send(_raised(error))
        return
    while True:
        try:
            asked = lines.receive()
        except EOFError:
            return
        lines.send(_answer(asked, kept))


def _packed(value: Any, kept: _Kept) -> Any:
    """A value to send; one that holds itself, which no text can, is kept."""
    try:
        return pack(value, kept.keep)
    except RecursionError:
        return kept.keep(value)


def _answer(asked: dict[str, Any], kept: _Kept) -> dict[str, Any]:
    try:
        arguments = unpack(asked["arguments"], kept.value)
        by_name = unpack(asked["by_name"], kept.value)
        target = kept.value(asked)
        if asked["do"] == "call":
            found = target(*arguments, **by_name)
        elif asked["do"] == "get":
            found = getattr(target, *arguments)
        elif asked["do"] == "set":
            setattr(target, *arguments)
            found = None
        elif asked["do"] == "same":
            found = bool(target == arguments[0])
        else:
            found = getattr(type(target), asked["do"])(target, *arguments)
        return {"gave": pack(found, kept.keep), "arguments": pack(arguments, kept.keep)}
    except BaseException as error:
        return _raised(error)


def _raised(error: BaseException) -> dict[str, Any]:
    try:
        text = str(error)[:500]
    except BaseException:
        text = ""
    return {"raised": _builtin_of(type(error)), "name": type(error).__name__, "text": text}
