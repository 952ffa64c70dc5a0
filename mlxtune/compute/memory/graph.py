"""What a computation keeps in memory, told from its graph: nothing is computed and no weight is read.

MLX builds a graph before it computes. `traced` takes down a function's graph with the sizes of its arrays;
`Ledger.compute` then goes through it as MLX's evaluation does (mlx/transforms.cpp, eval_impl): the same order, views
that share a buffer, outputs that take over an input's buffer, buffers that wait for work still queued.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxtune.compute.memory.strides import contiguous, dense, rows_of, stored, strides_as

WIDTH = 20  # MLX_BFS_MAX_WIDTH, of a level of the graph before evaluation goes down
# Results that share their input's buffer (mlx/backend/common/common.cpp).
VIEWS = frozenset(
    """AsStrided Broadcast BroadcastAxes Copy CustomTransforms Depends ExpandDims Flatten Unflatten Reshape Slice Split
    Squeeze StopGradient Transpose View Contiguous""".split()  # noqa: SIM905  # a table of names
)
RANDOM = frozenset(["RandomBits"])  # masks of dropout are kept as well
# Results that take over the buffer of an input of their size which nothing else needs (unary, binary, copies).
IN_PLACE = frozenset(
    """Abs Add AddMM ArcCos ArcSin ArcTan ArcTan2 AsType Ceil Cos Cosh Divide Erf ErfInv Exp Expm1 Floor Log Log1p
    LogAddExp LogicalNot Maximum Minimum Multiply Negative Power Remainder Round Select Sigmoid Sign Sin Sinh
    SliceUpdate Softmax Sqrt Rsqrt Square Subtract Tan Tanh DynamicSliceUpdate""".split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. name: of MLX's primitive; inputs, outputs: numbers of arrays; arguments: the primitive's own."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: Any


@dataclass(frozen=True)
class Graph:
    """A traced function. sizes, shapes: of each array, bytes and lengths; made: array -> number of the node that makes
    it; inputs, outputs: arrays of the function.
    """

    nodes: list[Node]
    sizes: list[int]
    shapes: list[tuple[int, ...]]
    made: dict[int, int]
    inputs: list[int]
    outputs: list[int]


def traced(function: Callable[..., Sequence[mx.array]], arguments: Sequence[mx.array]) -> Graph:
    """The graph of `function(*arguments)`, whose numbers do not matter."""
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
            inputs, outputs = (tuple(map(number, event[key])) for key in ("inputs", "outputs"))
            graph.made.update(dict.fromkeys(outputs, len(graph.nodes)))
            graph.nodes.append(Node(event["name"], inputs, outputs, event["arguments"]))

    mx.export_function(take, function, *arguments)
    return _constants_apart(graph)


def _constants_apart(graph: Graph) -> Graph:
    """Exporting makes one of all equal constants; when it computes, MLX has one for each that needs it, which changes
    the order of evaluation.
    """
    constant: dict[int, Node] = {}
    nodes: list[Node] = []

    def copied(array: int) -> int:
        if array not in constant:
            return array
        node = constant[array]
        inputs = tuple(map(copied, node.inputs))
        graph.sizes.append(graph.sizes[array])
        graph.shapes.append(graph.shapes[array])
        nodes.append(Node(node.name, inputs, (len(graph.sizes) - 1,), node.arguments))
        return len(graph.sizes) - 1

    given = set(graph.inputs)
    for node in graph.nodes:
        fixed = all(one in constant or (one not in graph.made and one not in given) for one in node.inputs)
        if fixed and node.name in ("Full", "Broadcast"):
            constant[node.outputs[0]] = node
        else:
            nodes.append(Node(node.name, tuple(map(copied, node.inputs)), node.outputs, node.arguments))
    outputs = [copied(array) for array in graph.outputs]
    made = {array: number for number, node in enumerate(nodes) for array in node.outputs}
    return Graph(nodes, graph.sizes, graph.shapes, made, graph.inputs, outputs)


class Ledger:
    """The buffers of a graph while it is computed. `held`: bytes alive now.

    counted: the function's inputs that results must depend on to be counted (what is made of weights alone is not).
    ahead: operations that are queued, at most, before the oldest is finished and lets go of its inputs.
    """

    def __init__(self, graph: Graph, counted: Iterable[int], ahead: int = 0) -> None:
        self.graph = graph
        self.ahead = ahead
        self.copying = ahead > 0
        self.held = 0
        self.depends = set(counted)
        for node in graph.nodes:
            if node.name in RANDOM or not self.depends.isdisjoint(node.inputs):
                self.depends.update(node.outputs)
        self.done = [False] * len(graph.nodes)
        self.waiting = [0] * len(graph.sizes)  # nodes that still need an array, and the caller
        for node in graph.nodes:
            for array in set(node.inputs):
                self.waiting[array] += 1
        for array in [*graph.outputs, *graph.inputs]:
            self.waiting[array] += 1
        self.buffer = list(range(len(graph.sizes)))  # of each array: the array that it was allocated for
        self.users = [0] * len(graph.sizes)  # of each buffer: arrays and queued operations
        self.bytes = [0] * len(graph.sizes)  # of each buffer
        self.strides: dict[int, tuple[int, ...]] = {}  # of arrays that are not contiguous in rows
        for array in graph.inputs:
            self.users[array] = 1

    def compute(self, outputs: Iterable[int]) -> int:
        """Compute these arrays; the most bytes that were alive at once."""
        highest = self.held
        queue: deque[tuple[int, list[int]]] = deque()
        clock = 0
        for number in self._order(outputs):
            node = self.graph.nodes[number]
            clock += 1 if node.name in VIEWS else 2
            while queue and queue[0][0] < clock - self.ahead:
                self._release(queue.popleft()[1])
            copies = self._copied(node) if self.copying else 0
            self._evaluate(node)
            self.held += copies
            highest = max(highest, self.held)
            self.done[number] = True
            own = {self.buffer[array] for array in node.outputs}
            used = [buffer for buffer in {self.buffer[array] for array in node.inputs} if buffer not in own]
            for buffer in used:
                self.users[buffer] += 1
            if copies:
                self.bytes.append(copies)
                self.users.append(1)
                used.append(len(self.bytes) - 1)
            queue.append((clock, used))
            for array in set(node.inputs):
                self.waiting[array] -= 1
                if not self.waiting[array]:
                    self._release([self.buffer[array]])
            for array in node.outputs:
                if not self.waiting[array]:
                    self._release([self.buffer[array]])
        for _, used in queue:
            self._release(used)
        return highest

    def _order(self, outputs: Iterable[int]) -> list[int]:
        """Numbers of the nodes to compute, as MLX's eval_impl orders them."""
        graph, made = self.graph, self.graph.made
        wanted = [made[array] for array in outputs if array in made and not self.done[made[array]]]
        before: dict[int, list[int]] = {}  # node -> nodes that make its inputs

        def needs(number: int) -> list[int]:
            if number not in before:
                inputs = graph.nodes[number].inputs
                before[number] = [made[array] for array in inputs if array in made and not self.done[made[array]]]
            return before[number]

        degree: dict[int, int] = {}
        before[-1] = wanted
        stack = [(-1, 0)]
        while stack:
            number, index = stack.pop()
            inputs = needs(number)
            if index < len(inputs):
                stack.append((number, index + 1))
                one = inputs[index]
                if one not in degree:
                    degree[one] = 1
                    stack.append((one, 0))
                else:
                    degree[one] += 1
        tape = [-1]
        later: list[tuple[int, int]] = []
        place = 0
        while degree and (place < len(tape) or later):
            if place >= len(tape):
                number, index = later.pop()
            else:
                number, index = tape[place], 0
                place += 1
            inputs = before[number]
            while index < len(inputs):
                if len(tape) - place >= WIDTH:
                    later.append((number, index))
                    break
                one = inputs[index]
                index += 1
                degree[one] -= 1
                if degree[one] == 0:
                    del degree[one]
                    tape.append(one)
        return tape[:0:-1]

    def _evaluate(self, node: Node) -> None:
        """Give the node's outputs their buffers."""
        if node.name in VIEWS and self._is_view(node):
            for index, array in enumerate(node.outputs):
                source = node.inputs[
                    min(index, len(node.inputs) - 1) if node.name in ("Depends", "CustomTransforms") else 0
                ]
                self._share(array, self.buffer[source])
            return
        for array in node.outputs:
            over = self._taken_over(node, array)
            if over is not None:
                self._share(array, over)
                continue
            size = self._allocated(node, array) if array in self.depends else 0
            self.bytes[array] = size
            self.users[array] = 1
            self.held += size

    def _allocated(self, node: Node, output: int) -> int:
        """Bytes of a new array, its strides set: those of the input, where one operation serves its whole buffer."""
        size = self.graph.sizes[output]
        if node.name not in IN_PLACE:
            return size
        if len(node.inputs) == 1:
            strides = self.strides.get(node.inputs[0])
            shape = self.graph.shapes[output]
            if strides is not None and dense(shape, strides):
                self._set(output, strides)
                return size * stored(shape, strides) // max(1, math.prod(shape))
        elif node.name not in ("Select", "AddMM", "SliceUpdate"):
            for one, other in (node.inputs, node.inputs[::-1]):
                strides = self.strides.get(one)
                zeros = self.strides.get(other)
                alone = math.prod(self.graph.shapes[other]) == 1 or (zeros is not None and not any(zeros))
                if strides is not None and any(strides) and alone and dense(self.graph.shapes[one], strides):
                    self._set(output, strides)
                    return size * stored(self.graph.shapes[one], strides) // math.prod(self.graph.shapes[one])
        return size

    def _copied(self, node: Node) -> int:
        """Bytes of the copies that the CPU's operations make of inputs which do not lie as they need them."""
        if node.name in ("Matmul", "AddMM"):
            return sum(self.graph.sizes[array] for array in node.inputs[:2] if self._no_matrix(array))
        if node.name in ("Scan", "LogSumExp"):
            return sum(self.graph.sizes[array] for array in node.inputs if array in self.strides)
        return 0

    def _no_matrix(self, array: int) -> bool:
        strides, shape = self.strides.get(array), self.graph.shapes[array]
        if strides is None or array not in self.depends:
            return False
        by_rows = strides[-2] == shape[-1] and strides[-1] == 1
        return not by_rows and not (strides[-2] == 1 and strides[-1] == shape[-2])

    def _taken_over(self, node: Node, output: int) -> int | None:
        if node.name not in IN_PLACE:
            return None
        candidates = {"SliceUpdate": node.inputs[:1], "AddMM": node.inputs[2:]}.get(node.name, node.inputs)
        for array in candidates:
            buffer = self.buffer[array]
            alone = self.waiting[array] == 1 and self.users[buffer] == 1 and array not in self.strides
            if alone and array in self.depends and self.bytes[buffer] == self.graph.sizes[output]:
                return buffer
        return None

    def _share(self, array: int, buffer: int) -> None:
        self.buffer[array] = buffer
        self.users[buffer] += 1

    def _release(self, buffers: list[int]) -> None:
        for buffer in buffers:
            self.users[buffer] -= 1
            if not self.users[buffer]:
                self.held -= self.bytes[buffer]
                self.bytes[buffer] = 0

    # Strides, in elements: which reshapes copy.

    def _is_view(self, node: Node) -> bool:
        source, output = node.inputs[0], node.outputs[0]
        before, after = self.graph.shapes[source], self.graph.shapes[output]
        strides = self.strides.get(source) or rows_of(before)
        if node.name in ("Depends", "CustomTransforms"):
            for index, array in enumerate(node.outputs):
                self._set(array, self.strides.get(node.inputs[min(index, len(node.inputs) - 1)]))
            return True
        if node.name in ("Reshape", "Flatten", "Unflatten", "Contiguous", "View"):
            found = (
                strides_as(before, strides, after)
                if node.name not in ("Contiguous", "View")
                else (strides if strides == rows_of(before) else None)
            )
            if found is None:
                return False
            self._set(output, found)
        elif node.name == "Transpose":
            axes = node.arguments[0]
            self._set(output, tuple(strides[axis] for axis in axes))
        elif node.name in ("Broadcast", "BroadcastAxes"):
            missing = len(after) - len(before)
            kept = (
                0 if have != want else stride
                for have, want, stride in zip(before, after[missing:], strides, strict=True)
            )
            self._set(output, (0,) * missing + tuple(kept))
        elif node.name == "ExpandDims":
            out = list(strides)
            for axis in sorted(node.arguments[0]):
                out.insert(axis, 1)
            self._set(output, tuple(out))
        elif node.name == "Squeeze":
            self._set(output, tuple(stride for axis, stride in enumerate(strides) if axis not in node.arguments[0]))
        elif node.name == "Slice":
            steps = node.arguments[2]
            self._set(output, tuple(stride * step for stride, step in zip(strides, steps, strict=True)))
        elif node.name == "Split":
            for array in node.outputs:
                self._set(array, strides)
        else:
            self._set(output, strides if before == after else None)
        return True

    def _set(self, array: int, strides: tuple[int, ...] | None) -> None:
        if strides is not None and not contiguous(self.graph.shapes[array], strides):
            self.strides[array] = strides
