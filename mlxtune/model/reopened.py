"""What was written is opened again, by the functions that train and generate use, before it gets its name.

A few tokens go through the whole model. Its weights are read when they are needed and forgotten at once, so this takes
less memory than the model does (measured: 173 MB for one of 270 MB in 16 bits, which is its embedding twice).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlxtune.errors import UserError
from mlxtune.machine.gpu_errors import recognise
from mlxtune.model.arrays import dtype_name, to_numpy
from mlxtune.model.load import Loaded, load

TEXT, TOKENS = "The quick brown fox jumps", 4
ROUNDINGS = 16  # that two computations of the same logits may be apart, in units of the type's own


def few_ids(tokenizer: Any) -> list[int]:
    """The first tokens of a short text; where they are too few, they are repeated."""
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"] or [0]
    return [int(ids[place % len(ids)]) for place in range(TOKENS)]


def logits(loaded: Loaded) -> np.ndarray:
    """float32 [TOKENS, vocabulary] of a model whose weights are not yet read; it cannot be used afterwards.

    Raises UserError when the model cannot compute them.
    """
    ids = few_ids(loaded.tokenizer)
    loaded.check_ids([ids])
    try:
        out = loaded.model(mx.array([ids]))[0].astype(mx.float32)
        loaded.model.update(tree_map(lambda _: mx.array([]), loaded.model.parameters()))
        return to_numpy(out)
    except Exception as error:  # a family's own code raises whatever its parts raise
        if recognise(error):
            raise
        raise UserError(
            f"{loaded.path}: the model cannot compute {TOKENS} tokens ({type(error).__name__}: {error})",
            "A number in config.json is not the one that the weights were made with, or mlx-lm cannot run this kind.",
        ) from error


def check(folder: Path, source: Path | None = None) -> None:
    """Open a model folder and run it. source: a folder whose logits must be the same, to rounding.

    Raises UserError saying what fails.
    """
    loaded = load(str(folder), read=False)
    made = logits(loaded)
    # A few families rule out tokens by minus infinity.
    if np.isnan(made).any() or np.isposinf(made).any() or not np.isfinite(made).any(axis=-1).all():
        raise UserError(
            f"{folder}: the logits of {TOKENS} tokens are not finite",
            "The source's weights or config.json are damaged, "
            f"or {dtype_name(loaded.dtype)} is too small for its numbers.",
        )
    if source is None:
        return
    before = logits(load(str(source), read=False))
    allowed = (
        ROUNDINGS * float(mx.finfo(loaded.dtype).eps) * float(np.abs(before[np.isfinite(before)]).max(initial=0.0))
    )
    apart = np.abs(np.where(made == before, 0.0, made - before)).max()
    if not apart <= allowed:
        raise UserError(
            f"{folder} computes other logits than {source} (up to {apart:.2g} apart, {allowed:.2g} is rounding)",
            "Its config.json is read in another way the second time.",
        )
