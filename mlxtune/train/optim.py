"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with bias correction, its schedule, and gradient clipping."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
from mlx.utils import tree_map, tree_map_with_path

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


class AdamW(optimizers.AdamW):
    """AdamW with a rate of its own for the factors B of an adapter: LoRA+ (Hayou, Ghosh and Yu 2024, arXiv:2402.12354).

    B starts at zero and A does not, so one rate for both moves A too much or B too little. With a rate of 1e-4 and
    b_rate 16 a step learns

        lora_b        at 1.6e-3, and decays by 1.6e-3 * weight_decay, as in a parameter group of its own
        all the rest  at 1e-4: lora_a, DoRA's lengths, layers that train in full (norms and embeddings too)
    """

    def __init__(self, section: TrainSection, b_rate: float) -> None:
        """b_rate: B's rate over the one of all the rest."""
        super().__init__(section.lr, weight_decay=section.weight_decay, bias_correction=True)
        self.b_rate = b_rate

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """The parameters after a step, a tree like `gradients`."""
        if not self._initialized:
            self.init(gradients)
        self.state["step"] = self.step + 1
        rate = self.state["learning_rate"]
        rate_of_b = rate * self.b_rate

        def updated(path: str, gradient: mx.array, parameter: mx.array, state: Any) -> mx.array:
            is_b = path.rpartition(".")[2] == "lora_b"
            self.state["learning_rate"] = rate_of_b if is_b else rate
            new: mx.array = self.apply_single(gradient, parameter, state)
            return new

        new = tree_map_with_path(updated, gradients, parameters, self.state)
        self.state["learning_rate"] = rate
        return new


def build(section: TrainSection, parameters: Any, b_rate: float = 1.0) -> AdamW:
    """The optimizer with its state made now: made lazily, it would raise the first step's peak memory.

    b_rate: as in `AdamW`.
    """
    optimizer = AdamW(section, b_rate)
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

    def __init__(self, optimizer: AdamW, clip_norm: float) -> None:
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
