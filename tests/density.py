"""How dense the code is to read, in figures that a reader feels.

    python tests/density.py             both packages
    python tests/density.py --worst 10  and the ten worst of each list
    python tests/density.py DIR ...     other folders, such as another project's

For each 100 statements: comprehensions, conditional expressions, comments. Lengths of functions. Functions that are
large (syntax nodes), dense (nodes a line) or have many branches. Fields of dataclasses that no comment on their line
explains, and arrays of public functions whose shape is said nowhere. `unexplained_fields` and `shapeless_arrays` are
for tests as well.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mlxtune", "convert/mlxtune_convert")

MOST_NODES, MOST_NODES_A_LINE, LINES_OF_DENSE, MOST_BRANCHES = 500, 16, 10, 15
LARGE = f"of more than {MOST_NODES} syntax nodes"
DENSE = f"of {LINES_OF_DENSE} lines or more with more than {MOST_NODES_A_LINE} nodes a line"
MANY = f"with more than {MOST_BRANCHES} branches"
BRANCHES = (
    *(ast.If, ast.For, ast.AsyncFor, ast.While, ast.IfExp, ast.ExceptHandler, ast.With, ast.AsyncWith, ast.Assert),
    *(ast.comprehension, ast.match_case),
)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
ARRAY = re.compile(r"\b(mx\.array|np\.ndarray|NDArray|torch\.Tensor)\b")
# A shape as this project writes them, [rows, width] or [N], or in words.
SHAPE = re.compile(r"\[[\w.][\w+*/. -]*(, [\w+*/. -]+)*\]|\bscalars?\b|\bshapes?\b", re.IGNORECASE)
FOR_TOOLS = ("type:", "noqa", "mypy:", "pragma:")  # how comments begin that explain nothing


@dataclass(frozen=True)
class Source:
    """One file, parsed."""

    path: Path
    tree: ast.Module
    comments: dict[int, str]  # line, from 1 -> the comment on it, without "#"
    alone: frozenset[int]  # lines that hold nothing but a comment

    @staticmethod
    def of(path: Path) -> Source:
        text = path.read_text(encoding="utf-8")
        found: dict[int, str] = {}
        alone: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            words = token.string.lstrip("#! ")
            if token.type == tokenize.COMMENT and not words.startswith(FOR_TOOLS):
                found[token.start[0]] = words
                if not token.line[: token.start[1]].strip():
                    alone.add(token.start[0])
        return Source(path, ast.parse(text), found, frozenset(alone))

    def place(self, node: ast.stmt, name: str = "") -> str:
        path = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        return f"{path}:{node.lineno} {name or getattr(node, 'name', '')}"


def sources(*folders: str | Path) -> list[Source]:
    """Every Python file below the folders (of this project, where they are relative)."""
    return [Source.of(path) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def statements(tree: ast.AST) -> int:
    """Docstrings are none: they are explanation."""
    return sum(isinstance(node, ast.stmt) and not _is_text(node) for node in ast.walk(tree))


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            yield node


def nodes(function: ast.AST) -> int:
    return sum(1 for _ in ast.walk(function))


def lines(function: ast.stmt) -> int:
    """From `def` to the last line, decorators not counted, the docstring counted."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def branches(function: ast.AST) -> int:
    """Places where the way parts: ifs, loops, handlers, `and` and `or`, comprehensions and their ifs."""
    count = 0
    for node in ast.walk(function):
        if isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
        elif isinstance(node, BRANCHES):
            count += 1
    return count


def unexplained_fields(source: Source) -> list[str]:
    """Fields of dataclasses without a comment on their line or on the line above: "file:line Class.field"."""
    out = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(one) for one in node.decorator_list):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and not _explained(source, field):
                    out.append(source.place(field, f"{node.name}.{ast.unparse(field.target)}"))
    return out


def fields(source: Source) -> int:
    """How many fields the dataclasses of a file have."""
    return sum(
        isinstance(field, ast.AnnAssign)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(one) for one in node.decorator_list)
        for field in node.body
    )


def _explained(source: Source, field: ast.AnnAssign) -> bool:
    """A comment on one of its lines, or one that fills the line above."""
    own = range(field.lineno, (field.end_lineno or field.lineno) + 1)
    return field.lineno - 1 in source.alone or any(line in source.comments for line in own)


def shapeless_arrays(source: Source) -> list[str]:
    """Public functions that take or give an array and say no shape in their docstring or comments."""
    return [
        source.place(function, name) for name, function in _with_arrays(source) if not _says_shape(source, function)
    ]


def array_functions(source: Source) -> int:
    """How many public functions of a file take or give an array."""
    return len(_with_arrays(source))


def _with_arrays(source: Source) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Public functions, and public methods of public classes, with an array among their arguments or as result."""
    found = []
    for owner, function in _public(source.tree):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        types = [one.annotation for one in arguments] + [function.returns]
        if any(one is not None and ARRAY.search(ast.unparse(one)) for one in types):
            found.append((f"{owner}{function.name}", function))
    return found


def _public(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in tree.body:
        if isinstance(node, FUNCTIONS) and not node.name.startswith("_"):
            yield "", node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, FUNCTIONS) and (not inner.name.startswith("_") or inner.name == "__call__"):
                    yield f"{node.name}.", inner


def _says_shape(source: Source, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    texts = [ast.get_docstring(function) or ""]
    for line in range(function.lineno - 1, (function.end_lineno or function.lineno) + 1):
        texts.append(source.comments.get(line, ""))
    return any(SHAPE.search(text) for text in texts)


@dataclass(frozen=True)
class Figures:
    """What is printed of some sources."""

    rates: dict[str, float]  # what -> how many for each 100 statements
    lengths: tuple[float, float]  # lines of a function: the median, and what nine of ten do not exceed
    worst: dict[str, list[tuple[float, str]]]  # limit -> (value, place) of the functions beyond it, worst first
    unexplained: list[str]  # fields of dataclasses
    of_fields: int  # how many fields there are
    shapeless: list[str]  # public functions with arrays
    of_shapes: int  # how many of those there are


def figures(read: list[Source]) -> Figures:
    every = [(source, function) for source in read for function in functions(source.tree)]
    count = sum(statements(source.tree) for source in read)
    walked = [node for source in read for node in ast.walk(source.tree)]
    totals = {
        "comprehensions": sum(isinstance(node, COMPREHENSIONS) for node in walked),
        "conditional expressions": sum(isinstance(node, ast.IfExp) for node in walked),
        "comments": sum(len(source.comments) for source in read),
        "comments with a line of their own": sum(len(source.alone) for source in read),
    }
    lengths = sorted(lines(function) for _, function in every)
    beyond: dict[str, list[tuple[float, str]]] = {LARGE: [], DENSE: [], MANY: []}
    for source, function in every:
        place, size, long = source.place(function), nodes(function), lines(function)
        if size > MOST_NODES:
            beyond[LARGE].append((size, place))
        if long >= LINES_OF_DENSE and size / long > MOST_NODES_A_LINE:
            beyond[DENSE].append((round(size / long, 1), place))
        if branches(function) > MOST_BRANCHES:
            beyond[MANY].append((branches(function), place))
    return Figures(
        {what: 100 * total / count for what, total in totals.items()},
        (statistics.median(lengths), lengths[int(0.9 * len(lengths))]),
        {limit: sorted(found, reverse=True) for limit, found in beyond.items()},
        [place for source in read for place in unexplained_fields(source)],
        sum(fields(source) for source in read),
        [place for source in read for place in shapeless_arrays(source)],
        sum(len(_with_arrays(source)) for source in read),
    )


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("folders", nargs="*", default=PACKAGES, help="default: both packages")
    asked.add_argument("--worst", type=int, default=0, metavar="N", help="print N of each list")
    options = asked.parse_args()
    read = sources(*options.folders)
    if not read:
        raise SystemExit("no Python files there")
    found = figures(read)
    every = sum(statements(source.tree) for source in read)
    print(f"{len(read)} files, {every:,} statements; for each 100 of them:")
    for what, rate in found.rates.items():
        print(f"    {rate:5.1f}  {what}")
    median, most = found.lengths
    print(f"lines of a function: median {median:g}, nine of ten at most {most:g}")
    for limit, places in found.worst.items():
        print(f"{len(places)} functions {limit}")
        for value, place in places[: options.worst]:
            print(f"    {value:7g}  {place}")
    lists = {
        f"of {found.of_fields} fields of dataclasses are not explained on their line": found.unexplained,
        f"of {found.of_shapes} public functions with arrays say no shape": found.shapeless,
    }
    for what, names in lists.items():
        print(f"{len(names)} {what}")
        for name in names[: options.worst]:
            print(f"    {name}")


if __name__ == "__main__":
    main()
