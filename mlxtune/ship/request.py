"""What is to be shipped, and what is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtune.data.chat.masking import Example
from mlxtune.model.load import source_of
from mlxtune.ship.merge import Merged, open_merged


@dataclass(frozen=True)
class Request:
    """What to ship, and where to."""

    model: Path  # the folder that was trained on
    adapter: Path | None  # the run's folder; None: the model as it is
    out: Path  # the artefact's folder, or its file
    base: Path | None = None  # the original 16-bit model, to merge into; None: `model`
    base_name: str = ""  # the original model's id on the hub, where the user names it
    examples: Sequence[Example] | None = None  # rows for the proof; None: without one
    force: bool = False  # replace what is at `out`

    @property
    def sources(self) -> list[Path]:
        """What is read, so that none of it is ever replaced."""
        return [path for path in (self.model, self.adapter, self.base) if path is not None]


@dataclass(frozen=True)
class Facts:
    """What is known of a merged model before a weight is read."""

    config: dict[str, Any]  # config.json as mlx-lm reads it, with what describes a quantization
    dtype: mx.Dtype  # the floating type that most of its numbers have
    shapes: dict[str, tuple[int, ...]]  # of every tensor when dense, by MLX's names
    count: int  # parameters when dense


class MergedModel:
    """The model of a request with its adapter folded in: what is known of it, and its weights.

    It is opened when it is first asked for, once for all that is to be known and for the first reading of the weights.
    What was read is released (`Merged`), so that each further reading opens it again: to compare the files with it, or
    to find out why they differ.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._unread: Merged | None = None
        self._base_is_compared = request.base is None  # else with the model that was trained on, at the first opening

    @property
    def folder(self) -> Path:
        """Where the weights, the tokenizer and the original config.json are."""
        return self.request.base or self.request.model

    @cached_property
    def source(self) -> dict[str, Any]:
        """What the folder was converted from: kind, name, config (see `source_of`)."""
        return source_of(self.folder)

    @cached_property
    def copies_code(self) -> bool:
        """Whether the .py files that belong to the model may be copied: `convert` was asked to."""
        return bool(source_of(self.request.model).get("code"))

    @property
    def hub_name(self) -> str:
        """The original model on the hub, or "" when unknown. A repository of MLX-quantized weights is none."""
        if self.request.base_name:
            return self.request.base_name
        return str(self.source["name"]) if self.source["kind"] == "hf" else ""

    @cached_property
    def facts(self) -> Facts:
        """Raises UserError when the model cannot be opened, the adapter is not for it, or `base` is another model."""
        merged = self.unread()
        return Facts(merged.config, merged.dtype, merged.shapes(), merged.count())

    def dtype(self, asked: str | None) -> mx.Dtype:
        """The type of the dense tensors: the one asked for ("float16", ...), else the model's own."""
        return self.facts.dtype if asked is None else getattr(mx, asked)

    def unread(self) -> Merged:
        """To look at, not to read."""
        if self._unread is None:
            original_of = None if self._base_is_compared else self.request.model
            self._unread = open_merged(self.folder, self.request.adapter, original_of=original_of)
            self._base_is_compared = True
        return self._unread

    def to_read(self, dtype: mx.Dtype) -> Merged:
        """To be read, once. dtype: of its dense tensors."""
        merged = self.unread()
        self._unread = None
        return replace(merged, dtype=dtype)
