"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with bias correction, its schedule, and gradient clipping."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
from mlx.utils import tree_map

from mlxtune.config.schema import TrainSection
from mlxtune.machine import backend


def learning_rate(section: TrainSection, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 1) of `steps`.

    Warmup climbs linearly and is never zero; the decay then starts at the peak and would reach zero one step after
    the last.
    """
    warmup = min(section.warmup_steps, steps - 1)
    if step <= warmup:
        return section.lr * step / (warmup + 1)
    progress = (step - 1 - warmup) / (steps - warmup)
    share = 1.0
    if section.schedule == "linear":
        share = 1.0 - progress
    elif section.schedule == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.lr * share


def build(section: TrainSection, parameters: Any) -> optimizers.AdamW:
    """The optimizer with its state made now: made lazily, it would raise the first step's peak memory."""
    optimizer = optimizers.AdamW(section.lr, weight_decay=section.weight_decay, bias_correction=True)
    optimizer.init(parameters)
    mx.eval(optimizer.state)
    return optimizer


def clip(gradients: Any, limit: float) -> tuple[Any, mx.array]:
    """(gradients scaled so that their global L2 norm is at most `limit`, the norm before: a scalar). limit 0: unscaled.

    Meant for float32, as all that is trained is: squares of bfloat16 would be summed up in bfloat16.
    """
    clipped, norm = optimizers.clip_grad_norm(gradients, limit)
    return (clipped if limit else gradients), norm


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays as one compiled function, where the device gains by that."""
    return mx.compile(function) if backend.policy().compiled else function


class Update:
    """What an optimizer step does with its summed gradients, one function of arrays: divided by the number of targets,
    clipped, taken by AdamW. Tensor by tensor these are 40 small operations each, and a model has a thousand tensors.

    Nothing is changed in place: parameters and state of the step before stay whole until whoever called takes the new
    ones. Number of targets and rate are arrays, so that the function is compiled once for the run.
    """

    def __init__(self, optimizer: optimizers.AdamW, clip_norm: float) -> None:
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self._function = compiled(self._updated)

    def __call__(self, gradients: Any, parameters: Any, targets: int, rate: float) -> tuple[Any, Any, mx.array]:
        """(new parameters, new optimizer state, norm of the gradient before clipping: a scalar), not computed yet.

        targets: how many tokens the gradients are summed over; rate: of learning.
        """
        self.optimizer.init(parameters)  # a restored state lacks what is empty, and would be compiled for apart
        count, learning_rate = mx.array(float(targets)), mx.array(rate)
        parameters, state, norm = self._function(gradients, parameters, self.optimizer.state, count, learning_rate)
        return parameters, state, norm

    def _updated(
        self, gradients: Any, parameters: Any, state: Any, targets: mx.array, rate: mx.array
    ) -> tuple[Any, Any, mx.array]:
        """targets, rate: scalars."""
        gradients = tree_map(lambda g: g / targets.astype(g.dtype), gradients)
        gradients, norm = clip(gradients, self.clip_norm)
        optimizer = copy.copy(self.optimizer)
        optimizer.state = {**tree_map(lambda array: array, state), "learning_rate": rate}  # AdamW writes into its state
        return optimizer.apply_gradients(gradients, parameters), optimizer.state, norm
