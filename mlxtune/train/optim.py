"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with bias correction, its schedule, and gradient clipping."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
from mlx.utils import tree_map

from mlxtune.model.arrays import named
from mlxtune.sections import TrainSection


def learning_rate(section: TrainSection, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 1) of `steps`.

    Warmup climbs linearly and is never zero; the decay then starts at the peak and would reach zero one step after
    the last.
    """
    warmup = min(section.warmup_steps, steps - 1)
    if step <= warmup:
        return section.lr * step / (warmup + 1)
    progress = (step - 1 - warmup) / (steps - warmup)
    shapes = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return section.lr * shapes[section.schedule]


def build(section: TrainSection, parameters: Any) -> optimizers.AdamW:
    """The optimizer with its state made now: made lazily, it would raise the first step's peak memory."""
    optimizer = optimizers.AdamW(section.lr, weight_decay=section.weight_decay, bias_correction=True)
    optimizer.init(parameters)
    mx.eval(optimizer.state)
    return optimizer


def clip(gradients: Any, limit: float) -> tuple[Any, mx.array]:
    """(gradients scaled so that their global L2 norm is at most `limit`, the norm before). limit 0: unscaled."""
    norm = mx.sqrt(sum((mx.square(g).sum() for g in named(gradients).values()), mx.array(0.0)))
    if limit == 0:
        return gradients, norm
    factor = mx.minimum(limit / (norm + 1e-6), 1.0)
    return tree_map(lambda g: g * factor, gradients), norm
