"""The buffers of a graph while it is computed: how many bytes are alive at once.

`Ledger.compute` goes through a graph as MLX's evaluation does (mlx/transforms.cpp, eval_impl): the same order, views
that share a buffer, outputs that take over an input's buffer, buffers that wait for work still queued. Of exp(a @ b),
where a, b and the result are of 4 MB each:

    a, b       8 MB, inputs: they are the caller's and not counted
    a @ b      4 MB  a new buffer
    exp        4 MB  it takes over the buffer of a @ b, which nothing else needs
    the most   4 MB  and 8 MB if something else needed a @ b as well, such as a gradient
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from mlxtune.compute.memory.graph import Graph, Node
from mlxtune.compute.memory.strides import Strides, contiguous, dense, of_view, rows_of, stored

WIDTH = 20  # MLX_BFS_MAX_WIDTH, of a level of the graph before evaluation goes down
ALL = -1  # in place of a node: what needs all that is to be computed
# Results that share their input's buffer (mlx/backend/common/common.cpp).
VIEWS = frozenset(
    """AsStrided Broadcast BroadcastAxes Copy CustomTransforms Depends ExpandDims Flatten Unflatten Reshape Slice Split
    Squeeze StopGradient Transpose View Contiguous""".split()  # noqa: SIM905  # a table of names
)
BY_OUTPUT = frozenset(["Depends", "CustomTransforms"])  # views whose outputs are views of one input each
RANDOM = frozenset(["RandomBits"])  # masks of dropout are kept as well
# Results that take over the buffer of an input of their size which nothing else needs (unary, binary, copies).
IN_PLACE = frozenset(
    """Abs Add AddMM ArcCos ArcSin ArcTan ArcTan2 AsType Ceil Cos Cosh Divide Erf ErfInv Exp Expm1 Floor Log Log1p
    LogAddExp LogicalNot Maximum Minimum Multiply Negative Power Remainder Round Select Sigmoid Sign Sin Sinh
    SliceUpdate Softmax Sqrt Rsqrt Square Subtract Tan Tanh DynamicSliceUpdate""".split()  # noqa: SIM905
)


class Ledger:
    """The buffers of a graph while it is computed. `held`: bytes alive now.

    A buffer has the number of the array that it was allocated for. A view has the buffer of what it is a view of.

    counted: the function's inputs that results must depend on to be counted (what is made of weights alone is not).
    ahead: operations that are queued, at most, before the oldest is finished and lets go of its inputs.
    """

    def __init__(self, graph: Graph, counted: Iterable[int], ahead: int = 0) -> None:
        self.graph = graph
        self.ahead = ahead
        self.copying = ahead > 0
        self.held = 0
        self.depends = set(counted)  # arrays whose buffers are counted
        for node in graph.nodes:
            if node.name in RANDOM or not self.depends.isdisjoint(node.inputs):
                self.depends.update(node.outputs)
        self.done = [False] * len(graph.nodes)  # whether a node was computed
        self.waiting = [0] * len(graph.sizes)  # nodes that still need an array, and the caller
        for node in graph.nodes:
            for array in set(node.inputs):
                self.waiting[array] += 1
        for array in [*graph.outputs, *graph.inputs]:
            self.waiting[array] += 1
        self.buffer = list(range(len(graph.sizes)))  # of each array: the array that it was allocated for
        self.users = [0] * len(graph.sizes)  # of each buffer: arrays and queued operations
        self.bytes = [0] * len(graph.sizes)  # of each buffer
        self.strides: dict[int, Strides] = {}  # of arrays that do not lie row by row
        for array in graph.inputs:
            self.users[array] = 1

    def compute(self, outputs: Iterable[int]) -> int:
        """Compute these arrays; the most bytes that were alive at once."""
        highest = self.held
        queue: deque[tuple[int, list[int]]] = deque()  # (when an operation was queued, buffers that wait for it)
        clock = 0
        for number in self._order(outputs):
            node = self.graph.nodes[number]
            clock += 1 if node.name in VIEWS else 2
            while queue and queue[0][0] < clock - self.ahead:
                _, finished = queue.popleft()
                self._release(finished)
            copies = self._copied(node) if self.copying else 0
            self._evaluate(node)
            self.held += copies
            highest = max(highest, self.held)
            self.done[number] = True
            queue.append((clock, self._waiting_for(node, copies)))
            self._used_by(node)
        for _, finished in queue:
            self._release(finished)
        return highest

    def _waiting_for(self, node: Node, copies: int) -> list[int]:
        """The buffers that an operation which was queued needs until it is finished. copies: bytes of its copies."""
        own = {self.buffer[array] for array in node.outputs}
        buffers = [buffer for buffer in {self.buffer[array] for array in node.inputs} if buffer not in own]
        for buffer in buffers:
            self.users[buffer] += 1
        if copies:
            self.bytes.append(copies)
            self.users.append(1)
            buffers.append(len(self.bytes) - 1)
        return buffers

    def _used_by(self, node: Node) -> None:
        """Let go of what nobody needs any more after this node."""
        for array in set(node.inputs):
            self.waiting[array] -= 1
            if not self.waiting[array]:
                self._release([self.buffer[array]])
        for array in node.outputs:
            if not self.waiting[array]:
                self._release([self.buffer[array]])

    def _order(self, outputs: Iterable[int]) -> list[int]:
        """Numbers of the nodes to compute, as MLX's eval_impl orders them.

        First it counts, going down from the outputs, how many nodes need each node. Then it goes through the graph
        level by level, from the outputs to the inputs, and takes a node when all that need it were taken; where WIDTH
        nodes wait it leaves the level and comes back later. The nodes are computed in the opposite order.
        """
        before = {ALL: self._makers(outputs)}  # node -> nodes that make its inputs; ALL: what is to be computed
        needed_by: dict[int, int] = {}  # node -> how many nodes need it and were not taken yet
        stack = [(ALL, 0)]  # (node, how many of its inputs were looked at)
        while stack:
            number, index = stack.pop()
            if number not in before:
                before[number] = self._makers(self.graph.nodes[number].inputs)
            inputs = before[number]
            if index < len(inputs):
                stack.append((number, index + 1))
                maker = inputs[index]
                if maker in needed_by:
                    needed_by[maker] += 1
                else:
                    needed_by[maker] = 1
                    stack.append((maker, 0))
        taken = [ALL]
        later: list[tuple[int, int]] = []
        place = 0  # in `taken`: the node whose inputs are looked at next
        while needed_by and (place < len(taken) or later):
            if place < len(taken):
                number, index = taken[place], 0
                place += 1
            else:
                number, index = later.pop()
            inputs = before[number]
            while index < len(inputs):
                if len(taken) - place >= WIDTH:
                    later.append((number, index))
                    break
                maker = inputs[index]
                index += 1
                needed_by[maker] -= 1
                if needed_by[maker] == 0:
                    del needed_by[maker]
                    taken.append(maker)
        return taken[:0:-1]  # without ALL, the last first

    def _makers(self, arrays: Iterable[int]) -> list[int]:
        """The nodes, of those still to be computed, that make some arrays."""
        made = self.graph.made
        return [made[array] for array in arrays if array in made and not self.done[made[array]]]

    def _evaluate(self, node: Node) -> None:
        """Give the node's outputs their buffers."""
        if node.name in VIEWS and self._is_view(node):
            for index, array in enumerate(node.outputs):
                self._share(array, self.buffer[_source(node, index)])
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
        if node.name not in IN_PLACE or node.name in ("Select", "AddMM", "SliceUpdate"):
            return size
        if len(node.inputs) == 1:
            strides = self.strides.get(node.inputs[0])
            shape = self.graph.shapes[output]
            if strides is not None and dense(shape, strides):
                self._set(output, strides)
                return size * stored(shape, strides) // max(1, math.prod(shape))
            return size
        for one, other in (node.inputs, node.inputs[::-1]):
            strides = self.strides.get(one)
            shape = self.graph.shapes[one]
            if strides is not None and any(strides) and self._is_one_number(other) and dense(shape, strides):
                self._set(output, strides)
                return size * stored(shape, strides) // math.prod(shape)
        return size

    def _is_one_number(self, array: int) -> bool:
        """Whether an array holds one number, perhaps repeated."""
        strides = self.strides.get(array)
        return math.prod(self.graph.shapes[array]) == 1 or (strides is not None and not any(strides))

    def _copied(self, node: Node) -> int:
        """Bytes of the copies that the CPU's operations make of inputs which do not lie as they need them."""
        if node.name in ("Matmul", "AddMM"):
            return sum(self.graph.sizes[array] for array in node.inputs[:2] if self._no_matrix(array))
        if node.name in ("Scan", "LogSumExp"):
            return sum(self.graph.sizes[array] for array in node.inputs if array in self.strides)
        return 0

    def _no_matrix(self, array: int) -> bool:
        """Whether BLAS cannot take an array as it lies: neither row by row nor column by column."""
        strides, shape = self.strides.get(array), self.graph.shapes[array]
        if strides is None or array not in self.depends:
            return False
        by_rows = strides[-2] == shape[-1] and strides[-1] == 1
        by_columns = strides[-2] == 1 and strides[-1] == shape[-2]
        return not by_rows and not by_columns

    def _taken_over(self, node: Node, output: int) -> int | None:
        """The input's buffer that an output is computed into; None: it needs one of its own."""
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

    def _is_view(self, node: Node) -> bool:
        """Whether the outputs share the inputs' buffers; their strides are then set."""
        if node.name in BY_OUTPUT:
            for index, array in enumerate(node.outputs):
                self._set(array, self.strides.get(_source(node, index)))
            return True
        source, output = node.inputs[0], node.outputs[0]
        shape = self.graph.shapes[source]
        strides = self.strides.get(source) or rows_of(shape)
        found = of_view(node.name, node.arguments, shape, strides, self.graph.shapes[output])
        if found is None:
            return False
        for array in node.outputs:
            self._set(array, found)
        return True

    def _set(self, array: int, strides: Strides | None) -> None:
        """Note an array's strides, unless it lies row by row (None: it does)."""
        if strides is not None and not contiguous(self.graph.shapes[array], strides):
            self.strides[array] = strides


def _source(node: Node, index: int) -> int:
    """The input that a view's output of this index is a view of."""
    if node.name in BY_OUTPUT:
        return node.inputs[min(index, len(node.inputs) - 1)]
    return node.inputs[0]
