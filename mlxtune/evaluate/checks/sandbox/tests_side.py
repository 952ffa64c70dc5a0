"""The box of the tests: runs them, while the program that they ask stays in a box of its own.

So a program cannot reach what judges it: neither the assertions, nor the word that says that the last of them was
passed. Its functions and objects are stand-ins here, which send a question over a pipe. A result that is plain data is
plain data here too; any other object is a stand-in that can be called, indexed, compared with another one and so on. It
never equals plain data, for a class may claim to equal everything.
"""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Callable
from typing import Any

from mlxtune.evaluate.checks.sandbox.values import Lines, pack, unpack

FAILED = "failed: "  # begins what is said instead of the word
REASON = 300  # characters of it

# What Python calls on an object for an operator or a statement. Each is sent to the object.
_OPERATORS = (
    *(
        "len",
        "iter",
        "next",
        "getitem",
        "setitem",
        "delitem",
        "contains",
        "bool",
        "str",
        "repr",
        "hash",
        "int",
        "float",
    ),
    *("index", "abs", "neg", "pos", "invert", "enter", "exit", "lt", "le", "gt", "ge", "round", "reversed", "format"),
    *(
        f"{side}{name}"
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
        for side in ("", "r", "i")
    ),
    *(f"{side}{name}" for name in ("and", "or", "xor", "lshift", "rshift", "matmul") for side in ("", "r")),
)
# What `object` does where a class has no such method. (`bool` may fall back on the length.)
_FALLBACKS: dict[str, Callable[[Any], Any]] = {"__bool__": lambda one: True}


class _Program:
    """The program, as the tests see it."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._exceptions: dict[tuple[str, str], type[BaseException]] = {}

    def defined(self) -> dict[str, Any]:
        """What the program defines, by name. A name of Python's own means here what it means in Python: a program that
        defines its own `abs` shall not be measured with it.
        """
        said = self._received()
        found = {name: self.value(packed) for name, packed in said["defined"].items()}
        return {name: value for name, value in found.items() if not hasattr(builtins, name)}

    def ask(self, number: int, do: str, arguments: list[Any], by_name: dict[str, Any] | None = None) -> Any:
        self._lines.send(
            {"kept": number, "do": do, "arguments": pack(arguments, _number), "by_name": pack(by_name or {}, _number)}
        )
        said = self._received()
        _bring_back(arguments, unpack(said["arguments"], self._kept))
        return self.value(said["gave"])

    def value(self, packed: Any) -> Any:
        return unpack(packed, self._kept)

    def _kept(self, packed: dict[str, Any]) -> Any:
        if "kept" in packed:
            return Standin(self, int(packed["kept"]), str(packed["type"]))
        if "exception" in packed:
            return self._exception(packed["exception"], packed["name"])
        if "module" in packed:
            return _module(packed["module"])
        if "not implemented" in packed:
            return NotImplemented
        raise ValueError("not understood")

    def _received(self) -> Any:
        said = self._lines.receive()
        if "raised" in said:
            raise self._exception(said["raised"], said["name"])(said["text"])
        return said

    def _exception(self, builtin: str, name: str) -> type[BaseException]:
        """Python's own exception, or a class of its own for one of the program, the same each time."""
        kind = getattr(builtins, str(builtin), None)
        if not isinstance(kind, type) or not issubclass(kind, Exception):
            kind, name = RuntimeError, "RuntimeError"  # SystemExit and the like end the program, not the tests
        if name == kind.__name__:
            return kind
        return self._exceptions.setdefault((builtin, name), type(str(name), (kind,), {}))


class Standin:
    """Stands for an object of the program."""

    def __init__(self, program: _Program, number: int, kind: str) -> None:
        self.__dict__.update(_program=program, _number=number, _kind=kind)

    def __call__(self, *arguments: Any, **by_name: Any) -> Any:
        return self._program.ask(self._number, "call", list(arguments), by_name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_Standin"):
            raise AttributeError(name)
        return self._program.ask(self._number, "get", [name])

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.ask(self._number, "set", [name, value])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Standin):
            return False
        return bool(self._program.ask(self._number, "same", [other]))

    def __ne__(self, other: object) -> bool:
        return not self == other


def _forward(name: str) -> Callable[..., Any]:
    def forwarded(self: Standin, *arguments: Any) -> Any:
        if name == "__exit__":
            arguments = (None, None, None)
        try:
            return self._program.ask(self._number, name, list(arguments))
        except AttributeError:
            if name in _FALLBACKS:
                return _FALLBACKS[name](self)
            raise TypeError(f"{self._kind!r} does not support {name}") from None

    return forwarded


for _name in _OPERATORS:
    setattr(Standin, f"__{_name}__", _forward(f"__{_name}__"))


def _number(value: Any) -> dict[str, Any]:
    """How an argument that is no plain data is sent: an object of the program goes back to it."""
    if isinstance(value, Standin):
        return {"kept": value._number}
    raise TypeError(f"{type(value).__name__} cannot be handed to the program: plain data and its own objects can")


def _bring_back(arguments: list[Any], after: list[Any]) -> None:
    """What the program changed in the lists, dicts and sets that it was given is changed in the tests' own."""
    for before, now in zip(arguments, after, strict=True):
        if isinstance(before, list) and isinstance(now, list):
            before[:] = now
        elif isinstance(before, dict | set) and isinstance(now, dict | set):
            before.clear()
            before.update(now)


def _module(name: str) -> Any:
    """A module that the program imported, as Python has it. Of the standard library alone."""
    top = str(name).partition(".")[0]
    if top not in sys.stdlib_module_names or top.startswith("_"):
        return None
    __import__(name)
    return sys.modules[name]


def run(tests: str, word: str, lines: Lines, proof: int) -> None:
    """Run the tests, and after the last of them write the word to `proof`, a pipe; else why they failed."""
    try:
        namespace = {**_Program(lines).defined(), "__name__": "tests"}
        exec(compile(tests, "tests.py", "exec"), namespace)
        said = word
    except BaseException as error:
        said = FAILED + f"{type(error).__name__}: {error}".removesuffix(": ")[:REASON]
    os.write(proof, said.encode(errors="replace"))
