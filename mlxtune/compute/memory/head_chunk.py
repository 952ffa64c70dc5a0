"""What the head needs for one chunk of positions, beside what the blocks keep.

Of a chunk's logits [C, V] there are at once (float32, as `head_loss` makes them):

    3        the logits, the logits less the largest of each row, and the gradient
    + 1      where the gradient is multiplied: a compiled step gives its targets weights, a trained head is given a
             gradient, and without chunks MLX's own loss is computed
    + 1, 2   where the model multiplies its logits; where it caps them, for the cap's gradient needs what it was of

Of hidden rows [N, D] there are those gathered, the chunks' gradients, and these joined. A trained head has a gradient
from each chunk, and all of them wait to be added up. Tests hold the whole prediction against measured peaks.

Legend: N targets, C rows of a chunk, D width, V vocabulary; sizes in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

from mlxtune.compute.memory.step import FULL, RunOptions, StepSizes
from mlxtune.model.arrays import named

LOGITS_COPIES, SCALED_COPIES, HIDDEN_COPIES = 3, 1, 3
# With MLX's kernel for cross-entropy: logits and gradient as the head gives them, and one more where it scales them.
KERNEL_LOGITS_COPIES = 3
# Keys of config.json by which families of mlx-lm multiply their logits, and cap them.
FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier")
CAP = "final_logit_softcapping"
FACTOR_COPIES, CAP_COPIES = 1, 2


def needed(model: nn.Module, sizes: Mapping[str, Any], shape: StepSizes, options: RunOptions) -> int:
    """Bytes of a chunk's logits, of the hidden rows that go with them (without chunks those of all tokens but a
    trunk's), and of the gradients that wait. sizes: as `prediction.sizes_of` gives them.
    """
    width, vocabulary = sizes["hidden_size"], sizes["vocab_size"]
    if options.chunk:
        rows = min(options.chunk, shape.targets) or shape.tokens
        hidden_rows = shape.targets
    else:
        rows = hidden_rows = sum(each.computed for each in shape.passes.passes if not each.is_trunk)
    if options.chunk and "kernels" in options.device.parts:
        of_logit = KERNEL_LOGITS_COPIES * options.item
    else:
        of_logit = FULL * _copies(sizes, options)
    waiting = 0
    if options.chunk and options.head_trained:
        waiting = math.ceil(shape.targets / rows) * _trained_outside_blocks(model)
    return of_logit * rows * vocabulary + HIDDEN_COPIES * hidden_rows * width * options.item + waiting


def _copies(sizes: Mapping[str, Any], options: RunOptions) -> int:
    """Arrays as large as a chunk's logits that are there at once."""
    copies = LOGITS_COPIES
    if not options.chunk or options.head_trained or options.compiled:
        copies += SCALED_COPIES
    if sizes.get(CAP):
        copies += CAP_COPIES
    elif any(sizes.get(name, 1) != 1 for name in FACTORS):
        copies += FACTOR_COPIES
    return copies


def _trained_outside_blocks(model: nn.Module) -> int:
    """Bytes of what trains beside the blocks: the head, or what of it does."""
    inside = sum(array.nbytes for block in model.layers for array in named(block.trainable_parameters()).values())
    return sum(array.nbytes for array in named(model.trainable_parameters()).values()) - inside
