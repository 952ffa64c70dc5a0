"""Jinja's sandbox with an end to the length of texts.

A chat template is a stranger's program, and a few lines double a text until the memory is full: `{% set s = s ~ s %}`
in a loop. Here whatever makes a longer text of shorter ones is first asked how long it will be, and refused above the
limit. The rest of a template is the same code, and makes the same text.

What all texts and lists of a template hold together is bounded by the time alone that it may take.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import Environment, Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import SandboxedEnvironment

LONGEST = 256 << 20  # characters of one text
BITS = 1 << 16  # of one whole number: 2 ** (2 ** 36) would be 8 GB
NUMBER = re.compile(r"\d+")


class TooLong(Exception):
    """Says what of a template would be too long."""


def compile_bounded(source: str, environment: Environment) -> Template:
    """A template's source, compiled in a copy of a sandbox. environment: has the filters and globals it may use."""
    assert isinstance(environment, SandboxedEnvironment)
    own: Any = environment.overlay()
    own.code_generator_class = _Generator
    own.intercepted_binops = frozenset(OPERATORS)
    own.call_binop = _operate
    own.concat = _concat
    own.joined = _joined
    own.call = _asking_call(own.call)
    own.finalize = _finalized
    # Makes any number of paragraphs of nonsense by itself, in minutes; no chat template needs it.
    own.globals = {name: value for name, value in environment.globals.items() if name != "lipsum"}
    own.filters = {**environment.filters}
    for name, length in LENGTHS.items():
        if name in own.filters:
            own.filters[name] = _asked_first(own.filters[name], length)
    compiled: Template = own.from_string(source)
    return compiled


class _Generator(CodeGenerator):
    """Compiles `a ~ b ~ c` as a call of ours: the sandbox hands this operator to nobody."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


def _require(length: float) -> None:
    """Raise TooLong for a text that would be too long."""
    if length > LONGEST:
        raise TooLong(f"it makes a text or list of {length:,.0f} characters or entries")


SIZED = (str, bytes, list, tuple, dict)


def _size(value: Any) -> int:
    """Characters of a text, or entries of a list."""
    return len(value) if isinstance(value, SIZED) else 0


def _printed(value: Any) -> int:
    """Characters of a value when it is made a text, or more."""
    if type(value) is str:
        return len(value)
    if not isinstance(value, SIZED):
        return 24  # a number
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    length = 4 * len(parts)  # the signs around them
    for part in parts:
        length += len(part) if type(part) is str else _printed(part)
    return length


def _operate(context: Any, operator: str, left: Any, right: Any) -> Any:
    if operator == "+" and type(left) is str and type(right) is str:  # the usual case, without a detour
        if len(left) + len(right) > LONGEST:
            _require(len(left) + len(right))
        return left + right
    return OPERATORS[operator](left, right)


def _add(left: Any, right: Any) -> Any:
    _require(_size(left) + _size(right))
    return left + right


def _joined(parts: tuple[Any, ...]) -> str:
    texts = [part if type(part) is str else _as_text(part) for part in parts]
    _require(sum(map(len, texts)))
    return "".join(texts)


def _as_text(value: Any) -> str:
    _require(_printed(value))
    return str(value)


def _multiply(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _require_bits(left.bit_length() + right.bit_length())
    elif isinstance(left, int):
        _require(left * _size(right))
    elif isinstance(right, int):
        _require(right * _size(left))
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _require_bits(left.bit_length() * max(0, right))
    return left**right


def _require_bits(bits: int) -> None:
    if bits > BITS:
        raise TooLong(f"it makes a number of {bits:,} bits")


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _require(_formatted(left, (right,)))
    return left % right


OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": _add,
    "*": _multiply,
    "**": _power,
    "%": _modulo,
}


def _finalized(value: Any) -> Any:
    """What a template prints, before it is made a text."""
    if type(value) in (list, tuple, dict):
        _require(_printed(value))
    return value


def _concat(pieces: Iterable[str]) -> str:
    """What a block, a macro or the whole template printed."""
    kept = list(pieces)
    _require(sum(map(len, kept)))
    return "".join(kept)


# What a method or filter of a text makes of it, in characters at most: (the text, the arguments) -> length. They have
# the same names, and their arguments the same order.
Length = Callable[[Any, tuple[Any, ...]], float]


def _widened(text: Any, args: tuple[Any, ...]) -> float:
    """center and its like: blanks are put around, as many as a number says."""
    return _printed(text) + sum(arg for arg in args if isinstance(arg, int))


def _per_line(text: Any, args: tuple[Any, ...]) -> float:
    """indent and its like: something is put into each line, a text or as many blanks as a number says."""
    added = 0
    for arg in args:
        added += arg if isinstance(arg, int) else _size(arg)
    lines = str(text).count("\n") + str(text).count("\t") + 1
    return _printed(text) + lines * added


def _replaced(text: Any, args: tuple[Any, ...]) -> float:
    """replace: a new text as often as the old one may be there."""
    old, new = (*args, "", "")[:2]
    places = 0
    if isinstance(text, str) and isinstance(old, str):
        places = len(text) // max(1, len(old)) + 1
    if places * _size(new) + _size(text) > LONGEST:
        places = text.count(old)  # exact, but slower
    return places * _size(new) + _size(text)


def _between(parts: Any, separator: Any) -> float:
    """join: the parts, and the separator between them."""
    if not isinstance(parts, list | tuple):
        return 0
    return _printed(parts) + _size(separator) * len(parts)


def _formatted(text: Any, args: tuple[Any, ...]) -> float:
    """Each field may print all arguments, and be as wide as any number in the text or among the arguments."""
    written = str(text)
    fields = written.count("%") + written.count("{")
    widths = 0
    for number in NUMBER.findall(written):
        widths += int(number[:12])  # more digits say no more: the limit is passed
    of_each = _printed(args)
    if "*" in written or "{" in written:  # a field may be as wide as an argument says
        of_each += sum(arg for arg in _flat(args) if isinstance(arg, int))
    return _size(text) + widths + fields * of_each


def _flat(args: Iterable[Any]) -> list[Any]:
    """The arguments, with the entries of lists and objects instead of these."""
    found: list[Any] = []
    for arg in args:
        if isinstance(arg, list | tuple):
            found += arg
        elif isinstance(arg, dict):
            found += arg.values()
        else:
            found.append(arg)
    return found


def _wrapped(text: Any, args: tuple[Any, ...]) -> float:
    """wordwrap: what ends a line, behind each character at most."""
    return _size(text) * (1 + sum(map(_size, args)))


LENGTHS: dict[str, Length] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _widened),
    **dict.fromkeys(("indent", "expandtabs"), _per_line),
    "replace": _replaced,
    "format": _formatted,
    "format_map": _formatted,
    "wordwrap": _wrapped,
    "translate": lambda text, args: _size(text) * max([1, *map(_size, _flat(args))]),
    "join": lambda parts, args: _between(parts, (*args, "")[0]),
    "string": lambda value, args: _printed(value),
    "tojson": lambda value, args: _printed(value) * (1 + sum(arg for arg in args if isinstance(arg, int))),
}


def _asked_first(used: Callable[..., Any], length: Length) -> Callable[..., Any]:
    """A filter that is asked first how long its text will be."""
    passed = getattr(used, "jinja_pass_arg", None)

    def asking(*args: Any, **named: Any) -> Any:
        before = args[: passed is not None]
        value, *others = args[len(before) :]
        if isinstance(value, Iterator):  # what is joined, say: it can be looked at once
            value = list(value)
        _require(length(value, (*others, *named.values())))
        return used(*before, value, *others, **named)

    if passed is not None:
        asking.jinja_pass_arg = passed  # type: ignore[attr-defined]
    return asking


def _asking_call(call: Callable[..., Any]) -> Callable[..., Any]:
    """The sandbox's way to call, where methods of texts are asked first how long their text will be."""

    def asking(context: Any, called: Any, /, *args: Any, **named: Any) -> Any:
        method = getattr(called, "__wrapped__", called)  # the sandbox wraps `format`
        text = getattr(method, "__self__", None)
        if type(text) is str and method.__name__ in LENGTHS:
            given = (*args, *named.values())
            # A text's own join takes the parts as its argument.
            is_join = method.__name__ == "join" and len(given) == 1
            _require(_between(given[0], text) if is_join else LENGTHS[method.__name__](text, given))
        return call(context, called, *args, **named)

    return asking
