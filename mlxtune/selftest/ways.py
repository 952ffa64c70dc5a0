"""Every way to compute loss and gradients that a run may choose, against the plain way in float32 on the CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.compute import fast_ways, parts, prefix, proof
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.compute.proof import Sums
from mlxtune.data.dataset.batches import Batch
from mlxtune.data.rows.sides import Side
from mlxtune.machine import backend
from mlxtune.model import linux_cpu
from mlxtune.model.arrays import dtype_name
from mlxtune.selftest.model import batch, computing_on_cpu, with_adapter
from mlxtune.selftest.outcome import Check, Found, NotHere, Workshop

GROUP = "Loss and gradients, against the plain way in float32 on the CPU"
PLAIN = "plain way"
HEAD = "head on targets only"
PREFIX = "shared prefix once"
CHECKPOINTED = "blocks checkpointed"
PIECES = "blocks in pieces of rows"
POWERS = "powers of two"
COMPILED = "compiled"
ANSWERS = "answers of a pair apart, every way, float32"
TOGETHER = "all of these combined"
WAYS = (PLAIN, HEAD, PREFIX, CHECKPOINTED, PIECES, POWERS, COMPILED, TOGETHER)
# Of the loss and of the gradient that differs most, relative. A wrong mask or position shows as 0.1 and more; rounding
# alone makes 2e-6, 5e-3 and 4e-2.
LIMITS = {mx.float32: (1e-5, 1e-3), mx.float16: (1e-2, 2e-2), mx.bfloat16: (1e-2, 0.1)}
# The types of the scales that are run in these types.
BASES = {mx.float32: mx.bfloat16, mx.float16: mx.float16, mx.bfloat16: mx.bfloat16}


def checks() -> list[Check]:
    found = []
    for dtype in LIMITS:
        for way in WAYS:
            found.append(Check(GROUP, f"{way}, {dtype_name(dtype)}", partial(_check, "llama", dtype, (), way)))
    for name, kind, train_also in (
        ("a trained head", "llama", ("head",)),
        ("attention in windows", "gemma3_text", ()),
        ("experts", "mixtral", ()),
    ):
        found.append(Check(GROUP, f"{name}, every way, float32", partial(_check, kind, mx.float32, train_also, "")))
    found.append(Check(GROUP, ANSWERS, _check_answers))
    return found


def _check(kind: str, dtype: mx.Dtype, train_also: tuple[str, ...], way: str, shop: Workshop) -> Found:
    """way: one of WAYS, or "" for every one."""
    base, rows = BASES[dtype], batch()
    if way == PLAIN and dtype == mx.float32 and backend.kind() == "cpu":
        raise NotHere("this device is that CPU")

    def plain() -> Sums:
        with computing_on_cpu():
            return proof.plain_sums(with_adapter(kind, base, mx.float32, train_also), rows)

    wanted = shop.once(("plain", kind, base, train_also), plain)
    model = shop.once(("model", kind, dtype, train_also), lambda: with_adapter(kind, base, dtype, train_also))
    ways = shop.once(("ways", kind, dtype, train_also), lambda: by_name(model, rows, dtype))
    if way and not ways[way]:
        raise NotHere(_why_not(way, dtype))
    chosen = ways[way] if way else [each for group in ways.values() for each in group]
    return judged({fast_ways.describe(each): proof.sums_of(model, each, rows) for each in chosen}, wanted, dtype)


def _check_answers(shop: Workshop) -> Found:
    """The rows as a pair whose chosen answer has two of them: each answer is summed by itself, and weighs otherwise."""
    rows = batch()
    sides = np.array([Side.CHOSEN, Side.CHOSEN, Side.REJECTED], np.uint8)
    rows = replace(rows, sides=sides, answer_of=np.array([0, 0, 1], np.int32))
    with computing_on_cpu():
        wanted = proof.plain_sums(with_adapter("llama", BASES[mx.float32], mx.float32, ()), rows)
    model = with_adapter("llama", BASES[mx.float32], mx.float32, ())
    found = {}
    for group in by_name(model, rows, mx.float32).values():
        for way in group:
            if not way.compiled:  # which the loss of answers never is
                found[fast_ways.describe(way)] = proof.sums_of(model, way, rows)
    return judged(found, wanted, mx.float32)


def judged(found: dict[str, Sums], wanted: Sums, dtype: mx.Dtype) -> Found:
    """The worst of what was found, by the way it was computed."""
    of_loss, of_gradient = LIMITS[dtype]
    worst, said, wrong = 0.0, "", ""
    for name, sums in found.items():
        off = proof.difference(sums, wanted)
        if off.gradient > worst:
            worst, said = off.gradient, f"gradient of {off.name} ({name})"
        if off.loss > of_loss:
            wrong = f"the loss is off by {off.loss:.1e}, at most {of_loss:.0e} is allowed ({name})"
    return Found(worst, of_gradient, said=said, wrong=wrong)


def by_name(model: nn.Module, rows: Batch, dtype: mx.Dtype) -> dict[str, list[Way]]:
    """The ways that a run on this device may take, under WAYS: each thing alone, then all combinations, with
    all parts of the model that may be computed otherwise.
    """
    ids = mx.array(rows.ids)
    split = Split.of(model, ids)
    if split is None:
        raise RuntimeError("the head cannot be run apart from the trunk")
    length = prefix.length_for_batch(rows, prefix.shared_by_batch(rows))
    plain = Way(head_trained=split.head_is_trained(model, split.hidden(ids)[0, -1:]))
    head, shared = replace(plain, split=split), replace(plain, prefix=length)
    alone = {
        PLAIN: [plain],
        HEAD: [head],
        PREFIX: [shared],
        CHECKPOINTED: [replace(plain, recompute=1), replace(plain, recompute=2)],
        PIECES: _in_pieces(model, plain, rows),
        POWERS: [replace(head, powers=True)] if linux_cpu.worth_it() and dtype == mx.float32 else [],
        COMPILED: [replace(head, compiled=True)] if backend.policy().compiled else [],
    }
    powers = [False, True] if alone[POWERS] else [False]
    compiled = [False, True] if alone[COMPILED] else [False]
    known = [way for group in alone.values() for way in group]
    # Also those that a run has only when asked for: here is where a device shows whether they are right on it.
    computed_otherwise = tuple(name for name, part in parts.PARTS.items() if part.is_for(model))
    together = []
    for apart, once, blocks, of_two, as_one in product([None, split], [None, length], [0, 1], powers, compiled):
        way = replace(plain, split=apart, prefix=once, recompute=blocks, powers=of_two, compiled=as_one)
        if apart is not None or once is not None:  # as a run has them
            way = replace(way, parts=computed_otherwise)
        if way not in known and _in_a_run(way):
            together.append(way)
    return {**alone, TOGETHER: together}


def _in_pieces(model: nn.Module, plain: Way, rows: Batch) -> list[Way]:
    """With pieces and chunks of queries that are shorter than the rows, where the model's blocks allow pieces."""
    count, width = rows.ids.shape
    if not prefix.keeps_keys_alone(model) or width < 4:
        return []
    return [replace(plain, recompute=1, tokens=count * width // 2, nested=2, queries=width // 4)]


def _in_a_run(way: Way) -> bool:
    """Whether a run may take a way: compiled with the head apart, powers of two with a fast way."""
    if way.compiled and way.split is None:
        return False
    return way.split is not None or way.prefix is not None or not way.powers


def _why_not(way: str, dtype: mx.Dtype) -> str:
    if way == COMPILED:
        return "steps are compiled on a GPU" if backend.kind() == "cpu" else "MLX_DISABLE_COMPILE is set"
    return "only in float32" if linux_cpu.worth_it() else "only on Linux's CPU"
