"""The graph of a function: its operations and the sizes of its arrays. Nothing is computed and no weight is read.

MLX builds a graph before it computes, and exports one as a row of events. Of `mx.exp(x + 1)`, x of 2 numbers:

    inputs      [("A", (2,), float32)]
    primitive   Add, inputs A and a constant B -> ("C", (2,), float32)
    primitive   Exp, input C -> ("D", (2,), float32)
    outputs     [D]

`traced` writes them down with a number for each array: A 0, B 1, C 2, D 3; C is made by node 0, D by node 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Node:
    """One operation."""

    name: str  # of MLX's primitive
    inputs: tuple[int, ...]  # numbers of arrays
    outputs: tuple[int, ...]  # numbers of arrays
    arguments: Any  # the primitive's own, such as the axes of a transpose


@dataclass(frozen=True)
class Graph:
    """A traced function. Arrays have numbers, from 0 on; nodes too."""

    nodes: list[Node]  # each after those whose results it needs
    sizes: list[int]  # bytes of each array
    shapes: list[tuple[int, ...]]  # lengths of the axes of each array
    made: dict[int, int]  # array -> the node that makes it; inputs and constants are not in it
    inputs: list[int]  # arrays that the function is given
    outputs: list[int]  # arrays that it gives


def traced(function: Callable[..., Sequence[mx.array]], arguments: Sequence[mx.array]) -> Graph:
    """The graph of `function(*arguments)`. Of the arguments only shapes and types matter, not what they hold."""
    numbers: dict[str, int] = {}
    sizes: list[int] = []
    shapes: list[tuple[int, ...]] = []
    graph = Graph([], sizes, shapes, {}, [], [])

    def number(array: Any) -> int:
        name, shape, dtype = array
        if name not in numbers:
            numbers[name] = len(sizes)
            sizes.append(math.prod(shape) * dtype.size)
            shapes.append(tuple(shape))
        return numbers[name]

    def take(event: dict[str, Any]) -> None:
        if event["type"] == "inputs":
            graph.inputs.extend(map(number, event["inputs"]))
        elif event["type"] == "outputs":
            graph.outputs.extend(map(number, event["outputs"]))
        elif event["type"] == "primitive":
            inputs = tuple(map(number, event["inputs"]))
            outputs = tuple(map(number, event["outputs"]))
            graph.made.update(dict.fromkeys(outputs, len(graph.nodes)))
            graph.nodes.append(Node(event["name"], inputs, outputs, event["arguments"]))

    mx.export_function(take, function, *arguments)
    return _constants_apart(graph)


def _constants_apart(graph: Graph) -> Graph:
    """Exporting makes one of all equal constants; when it computes, MLX has one for each that needs it, which changes
    the order of evaluation.
    """
    constant: dict[int, Node] = {}  # array -> the node that makes it
    nodes: list[Node] = []

    def copied(array: int) -> int:
        """The array, or where it is a constant a new one that is made like it."""
        if array not in constant:
            return array
        node = constant[array]
        inputs = tuple(map(copied, node.inputs))
        graph.sizes.append(graph.sizes[array])
        graph.shapes.append(graph.shapes[array])
        nodes.append(Node(node.name, inputs, (len(graph.sizes) - 1,), node.arguments))
        return len(graph.sizes) - 1

    given = set(graph.inputs)

    def is_constant(array: int) -> bool:
        return array in constant or (array not in graph.made and array not in given)

    for node in graph.nodes:
        if node.name in ("Full", "Broadcast") and all(map(is_constant, node.inputs)):
            constant[node.outputs[0]] = node
        else:
            nodes.append(Node(node.name, tuple(map(copied, node.inputs)), node.outputs, node.arguments))
    outputs = [copied(array) for array in graph.outputs]
    made = {}
    for number, node in enumerate(nodes):
        made.update(dict.fromkeys(node.outputs, number))
    return Graph(nodes, graph.sizes, graph.shapes, made, graph.inputs, outputs)
