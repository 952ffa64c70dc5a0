"""Checkpointed blocks for long rows: given a row piece by piece, and of several blocks the first one's input kept.

A checkpointed block keeps its input alone, but while it is computed it needs the arrays of all its tokens: of 32,768
tokens and an MLP of width 14,336, 1.9 GB in float32 for each of its arrays. In pieces of 512 tokens it needs the arrays
of one piece, and the keys and values of the tokens before, as when a model generates:

    forward    [tokens 0 .. 511] -> keys, values -> [tokens 512 .. 1023] -> keys, values -> [1024 .. 1535]
    backward   keys and values of all tokens again, and then the last piece first:
               [1024 .. 1535], computed again and differentiated -> gradients of its tokens, of the parameters, and of
               the keys and values before it -> [512 .. 1023], whose keys and values have got all their gradients by now

The whole is exact: a token sees those before it and itself, and all else in a block goes token by token. So whatever a
model does in its blocks, it may do in pieces, if it takes a cache of keys and values (`PrefixCache`).

Nested, blocks go by groups of `nested`, and each group keeps its first input. Of 8 blocks in groups of 4, the inputs of
all four blocks of a group are there only while it goes back; each block is then computed twice more, not once:

    forward    x0 -> [1] -> x1 -> [2] -> x2 -> [3] -> x3 -> [4] -> x4 -> [5] ... -> x8        kept: x0, x4, x8
    backward   x4 -> [5] -> x5 -> [6] -> x6 -> [7] -> x7, then back through [8] from x7, through [7] from x6, ...

Legend: B rows, T tokens of the pass, P tokens of a prefix that was computed before, K key heads, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxtune.compute.attention import Masks
from mlxtune.compute.checkpointing import checkpointed_call, flows, gradients_of
from mlxtune.compute.stages import Stages
from mlxtune.model.classes import as_classes, calling
from mlxtune.model.prefix_cache import PrefixCache

LOOKED_AT = 4  # tokens, in two pieces, with which a model is asked whether its blocks can be computed so
TOKENS = 512  # of a piece: fewer make thin matrix products, and read the weights more often
Span = tuple[int, int]  # (first token of a piece, the one after its last), counted in the pass


@contextmanager
def recomputed(
    model: nn.Module, tokens: int, nested: int, masks: Masks, stages: Stages | None = None
) -> Iterator[_Memory]:
    """Inside, every block is checkpointed and computed in pieces; after, blocks are themselves again.

    tokens: of a piece, those of all rows together; nested: blocks of a group that keep one input; masks: those that the
    model's masks are made with; stages: gets what is to be computed one after the other.

    A block that is called with more than hidden states, a causal mask and a cache is checkpointed as a whole. Yields
    what the calls know.
    """
    memory = _Memory(tokens, max(1, nested), masks, stages)
    try:
        with as_classes([(block, _remembering(type(block), memory)) for block in model.layers]):
            yield memory
    finally:
        memory.last = None  # classes are freed late, and with them what they know


def against(model: nn.Module) -> str:
    """Why not every block of a model can be computed in pieces, for people; "": all can.

    A few tokens go through the model, and nothing is computed: a graph is made, for which no weight is read.
    """
    try:
        with recomputed(model, LOOKED_AT // 2, 1, Masks()) as memory:
            model(mx.zeros((1, LOOKED_AT), mx.int32))
    except Exception as error:  # whatever a model's own code raises
        return (str(error).splitlines() or [type(error).__name__])[0]
    return "its blocks are given more than hidden states, a mask and a cache" if memory.whole else ""


def spans_of(tokens: int, rows: int, width: int) -> list[Span]:
    """The pieces of rows of `width` tokens each. tokens: of a piece of all rows, at most.

    They are as long as each other, but for one token: a last one of a token or two would be computed by other kernels.
    """
    count = -(-width // max(1, tokens // rows))
    borders = [number * width // count for number in range(count + 1)]
    return list(pairwise(borders))


def _remembering(kind: type, memory: _Memory) -> type:
    def note(leaf: Any) -> None:
        if flows(leaf):
            _later(memory.stages, leaf)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = _in_pieces(self, kind, args, kwargs, memory)
        if found is None:
            memory.last = None
            memory.whole += 1
            out = checkpointed_call(self, kind.__call__, (args, kwargs))
        else:
            out = memory.run(*found)
        tree_map(note, out)
        return out

    return calling(kind, call)


@dataclass
class _Memory:
    """What the calls of a model's blocks know of each other."""

    tokens: int  # of a piece, all rows together
    nested: int  # blocks of a group
    masks: Masks  # of the context
    stages: Stages | None  # what is to be computed one after the other; None: nobody asks
    last: tuple[mx.array, _Call] | None = None  # the newest block's result, and its call
    whole: int = 0  # calls that could not be computed in pieces

    def run(self, pieces: _Pieces, hidden: mx.array) -> mx.array:
        """The block's result [B, T, D], of which a gradient keeps no more than the group's first input."""
        cache = pieces.cache
        state = [] if cache is None else cache.state
        call = _Call(pieces, pieces.block.trainable_parameters(), state, self._before(hidden))
        if call.before is None:
            call.kept = hidden
        else:
            call.place = call.before.place + 1

        @mx.custom_function
        def block(parameters: Any, hidden: mx.array, state: list[mx.array]) -> tuple[mx.array, list[mx.array]]:
            return pieces.forward(parameters, hidden, state)

        @block.vjp
        def block_vjp(primals: Any, cotangents: Any, _: Any) -> Any:
            parameters, hidden, state = primals
            d_out, d_recorded = cotangents
            hidden = call.input_again(hidden, after=[d_out, *d_recorded])
            return pieces.backward(parameters, hidden, state, d_out, d_recorded)

        result: Any = block(call.parameters, hidden, call.state)
        out, recorded = result
        if cache is not None and recorded:
            cache.recorded = recorded
        self.last = out, call
        return out

    def _before(self, hidden: mx.array) -> _Call | None:
        """The call of this group whose very result is this block's input; None: the block keeps its input itself."""
        if self.last is None:
            return None
        out, call = self.last
        if out is not hidden or call.place + 1 >= self.nested:
            return None
        return call


@dataclass
class _Call:
    """One call of a block, as its group computes it again."""

    pieces: _Pieces  # what computes it
    parameters: Any  # that train, as they were in the forward pass
    state: list[mx.array]  # keys and values of the prefix, or []
    before: _Call | None  # the call that gave the input; None: the input is kept
    kept: mx.array | None = None  # the input, where it is kept
    place: int = 0  # in its group
    again: mx.array | None = None  # the input, computed again

    def input_again(self, hidden: mx.array, after: list[mx.array]) -> mx.array:
        """The input, not to be computed before `after` is. hidden: the one that would be kept by being used."""
        if self.before is None:
            return mx.depends([hidden], after)[0]
        if self.again is None:
            self._compute_group_again(after)
        assert self.again is not None
        return self.again

    def _compute_group_again(self, after: list[mx.array]) -> None:
        """The inputs of this call and of all before it in the group."""
        group: list[_Call] = [self]
        while group[0].before is not None:
            group.insert(0, group[0].before)
        assert group[0].kept is not None
        hidden = mx.depends([group[0].kept], after)[0]
        for call, following in pairwise(group):
            hidden, _ = call.pieces.forward(call.parameters, hidden, call.state)
            following.again = hidden


class _Piece(PrefixCache):
    """The cache of one piece: the keys and values before it, and then its own."""

    def __init__(self, before: list[mx.array], offset: int) -> None:
        super().__init__(before, offset)
        self.own: list[mx.array] = []  # [keys, values] of the piece, [B, K, tokens, width] each
        self.all: list[mx.array] = []  # those before it and its own

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.own = [keys, values]
        fetched = super().update_and_fetch(keys, values)
        self.all = list(fetched)
        return fetched


@dataclass
class _Pieces:
    """A block's call, computed in pieces."""

    block: nn.Module  # whose parameters it takes
    function: Callable[..., Any]  # the block's own call
    # Of the call: the block itself, and the others in their order; hidden states, mask and cache are those of a piece.
    arguments: inspect.BoundArguments
    mask: Any  # "causal", or booleans that broadcast to [B, heads, T, P + T]
    cache: PrefixCache | None  # of the call
    spans: list[Span]  # the pieces
    masks: Masks  # of the context
    stages: Stages | None  # what is to be computed one after the other; None: nobody asks
    offset: int = field(init=False)  # P, as it is now: the pass that follows moves the cache

    def __post_init__(self) -> None:
        self.offset = 0 if self.cache is None else self.cache.offset

    def forward(self, parameters: Any, hidden: mx.array, state: list[mx.array]) -> tuple[mx.array, list[mx.array]]:
        """(the block's result [B, T, D], its keys and values where a later pass needs them)."""
        known = _for_all_rows(state, hidden)
        outs: list[mx.array] = []
        for span in self.spans:
            tokens = hidden[:, slice(*span)]
            if outs:
                tokens = mx.depends([tokens], [outs[-1]])[0]
            out, cache = self._piece(parameters, tokens, known, span)
            known = cache.all
            outs.append(out)
            _later(self.stages, [out, *known])
        records = self.cache is not None and self.cache.records
        return mx.concatenate(outs, axis=1), known if records else []

    def backward(
        self, parameters: Any, hidden: mx.array, state: list[mx.array], d_out: mx.array, d_recorded: list[mx.array]
    ) -> tuple[Any, mx.array, list[mx.array]]:
        """Gradients of the parameters, of the hidden states and of the prefix's keys and values."""
        known = self._keys_and_values(parameters, hidden, state)
        d_known = [mx.zeros(array.shape, mx.float32 if array.dtype.size == 2 else array.dtype) for array in known]
        if d_recorded:
            d_known = [gradient.astype(zeros.dtype) for gradient, zeros in zip(d_recorded, d_known, strict=True)]
        d_parameters: Any = None
        d_hidden: list[mx.array] = []
        for span in reversed(self.spans):
            first, end = (self.offset + place for place in span)  # among all keys
            tokens = hidden[:, slice(*span)]
            if d_hidden:
                tokens = mx.depends([tokens], d_known)[0]
            given = parameters, tokens, [array[:, :, :first] for array in known] if first else []
            d_own = [d[:, :, first:end].astype(array.dtype) for d, array in zip(d_known, known, strict=True)]

            def piece(given: Any, span: Span = span) -> list[mx.array]:
                parameters, tokens, before = given
                out, cache = self._piece(parameters, tokens, before, span)
                return [out, *cache.own]

            new, of_tokens, of_known = gradients_of(piece, given, [d_out[:, slice(*span)], *d_own])
            for place, gradient in enumerate(of_known):
                total = d_known[place][:, :, :first] + gradient.astype(d_known[place].dtype)
                d_known[place] = mx.concatenate([total, d_known[place][:, :, first:]], axis=2)
            d_parameters = new if d_parameters is None else tree_map(mx.add, d_parameters, new)
            d_hidden.insert(0, of_tokens)
            _later(self.stages, [of_tokens, *d_known, d_parameters])
        d_state = [_summed_to(d[:, :, : self.offset], like) for d, like in zip(d_known, state, strict=False)]
        return d_parameters, mx.concatenate(d_hidden, axis=1), d_state

    def _keys_and_values(self, parameters: Any, hidden: mx.array, state: list[mx.array]) -> list[mx.array]:
        """[B, K, P + T, width] each. What else a piece computes nobody asks for, so it is not computed."""
        known = [[array] for array in _for_all_rows(state, hidden)] or [[], []]
        for span in self.spans:
            _, cache = self._piece(parameters, hidden[:, slice(*span)], [], span)
            for pieces, new in zip(known, cache.own, strict=True):
                pieces.append(new)
        return [mx.concatenate(pieces, axis=2) for pieces in known]

    def _piece(self, parameters: Any, tokens: mx.array, known: list[mx.array], span: Span) -> tuple[mx.array, _Piece]:
        """(the block's result of one piece, its cache). known: keys and values of all tokens before it, or []."""
        cache = _Piece(known, self.offset + span[0])
        given = copy(self.arguments)
        given.arguments = given.arguments.copy()
        before_piece = known[0].shape[2] if known else 0
        given.arguments.update({_hidden_name(given): tokens, "mask": self._mask(span, before_piece), "cache": cache})
        before = self.block.trainable_parameters()
        self.block.update(parameters)
        try:
            out = self.function(*given.args, **given.kwargs)
        finally:
            self.block.update(before)
        if not isinstance(out, mx.array) or len(cache.own) != 2:
            raise TypeError("its blocks hand on more than hidden states, keys and values")
        return out, cache

    def _mask(self, span: Span, before: int) -> Any:
        """Of the queries of a piece, over `before` keys and their own."""
        first, end = span
        if isinstance(self.mask, str):
            return self.mask
        queries = self.spans[-1][1]
        reach = self.masks.reach(self.mask, queries, self.offset + queries)
        if reach is not None:
            return self.masks.make(end - first, before, window_size=reach.window)
        keys_end = self.offset + end
        return self.mask[..., first:end, keys_end - before - (end - first) : keys_end]


def _in_pieces(
    block: nn.Module, kind: type, args: Any, kwargs: Any, memory: _Memory
) -> tuple[_Pieces, mx.array] | None:
    """(the call in pieces, its hidden states [B, T, D]); None where that cannot be: the block is given more than what
    is known to go token by token.
    """
    signature = _signature(kind)
    if signature is None:
        return None
    given = signature.bind(block, *args, **kwargs)
    given.apply_defaults()
    others = dict(given.arguments)
    hidden, mask, cache = others.pop(_hidden_name(given)), others.pop("mask"), others.pop("cache")
    if not flows(hidden) or hidden.ndim != 3:
        return None
    if not (mask == "causal" if isinstance(mask, str) else _is_booleans(mask)):
        return None
    if cache is not None and type(cache) is not PrefixCache:
        return None
    others.pop(next(iter(given.arguments)))  # the block itself
    found: list[Any] = []
    tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, (mx.array, PrefixCache)) else None, others)
    if found:
        return None
    rows, width, _ = hidden.shape
    spans = spans_of(memory.tokens, rows, width)
    given.arguments[_hidden_name(given)] = None  # else it would be kept with the call
    return _Pieces(block, kind.__call__, given, mask, cache, spans, memory.masks, memory.stages), hidden


def _signature(kind: type) -> inspect.Signature | None:
    """What the block's own `__call__` is given by name; None where it takes no mask or no cache. Classes that were put
    around it hand on whatever they get.
    """
    for each in kind.__mro__:
        if "__call__" in vars(each):
            signature = inspect.signature(vars(each)["__call__"])
            if {"mask", "cache"} <= signature.parameters.keys():
                return signature
    return None


def _hidden_name(given: inspect.BoundArguments) -> str:
    """The argument behind the block itself."""
    return list(given.arguments)[1]


def _is_booleans(mask: Any) -> bool:
    return isinstance(mask, mx.array) and mask.dtype == mx.bool_ and mask.shape[-2] > 1


def _for_all_rows(state: list[mx.array], hidden: mx.array) -> list[mx.array]:
    """Keys and values [1, K, P, width] of a prefix, repeated for the rows."""
    return [mx.broadcast_to(array, (hidden.shape[0], *array.shape[1:])) for array in state]


def _later(stages: Stages | None, arrays: Any) -> None:
    """Have arrays computed after those before."""
    if stages is not None:
        stages.append(arrays)


def _summed_to(gradient: mx.array, like: mx.array) -> mx.array:
    """The gradient of what was repeated for the rows."""
    if like.shape[0] != gradient.shape[0]:
        gradient = gradient.sum(axis=0, keepdims=True)
    return gradient.astype(like.dtype)
