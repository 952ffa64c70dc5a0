"""What settings cost on one model: the predicted peak of its memory, and the work of an epoch, by count.

Both follow from shapes alone: the model is built from its config.json, or opened from its folder without reading a
weight, and rows are as long as they are and hold nothing. The prediction is the very one that `mlxtune train` makes
(`compute.fit_memory`), so a run with settings from here prints the same number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mlxtune.adapter import attach
from mlxtune.adapter.layers import EMBEDDING, LINEAR, SWITCH, dense_shape
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.compute import fast_ways, fit_memory
from mlxtune.compute.fit_memory import Given
from mlxtune.compute.memory.prediction import Memory, NotPredicted
from mlxtune.config import resolve
from mlxtune.config.resolve import Config
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import Plan
from mlxtune.data.dataset.measured import MeasuredExamples
from mlxtune.machine import backend
from mlxtune.machine.backend import Machine
from mlxtune.model import unread
from mlxtune.model.arrays import named
from mlxtune.model.convert import Quantization, quantized_model
from mlxtune.model.linux_cpu import multiply_densely
from mlxtune.model.load import cast, model_dtype, open_model
from mlxtune.presets.wanted import Wanted

# In passes through the matrices of the blocks. They are frozen, so a token costs one forward and one back to the input;
# a block that is computed again costs a forward more. In pieces, keys and values are computed once more, and the
# matrix products are thinner; nested, there is one more forward (`compute.pieces`).
PASSES: dict[str | int, float] = {"none": 2.0, 2: 2.5, "all": 3.0, "pieces": 3.2, "nested": 4.2}
# A micro-batch costs as much as so many tokens more: the rows of a matrix product are filled up to the GPU's tile of 64
# (32 on average), and the weights are read once more, in about the time in which 30 tokens are computed (an estimate:
# half a byte a weight at 100 to 800 GB/s, against 4 operations at 3 to 25 TFLOPS).
OF_A_BATCH = 64
MOST_ROWS = 4_000  # whose lengths are looked at; of more, as many that stand for them


@dataclass(frozen=True)
class Settings:
    """One point of the search."""

    bits: int | None  # of the weights; None: as the model is
    rank: int  # lora.rank
    max_tokens: int  # data.max_tokens
    batch_rows: int  # train.batch_rows
    step_rows: int  # rows of an optimizer step: batch_rows x train.accumulate
    checkpoint: str | int  # train.checkpoint_layers, as `passes` takes it

    @property
    def accumulate(self) -> int:
        """train.accumulate."""
        return self.step_rows // self.batch_rows


def passes(checkpoint: str | int) -> float:
    """Of every n-th block computed again too, a forward pass of so many of them: 2 and a third for 3."""
    return PASSES["none"] + 1 / checkpoint if isinstance(checkpoint, int) else PASSES[checkpoint]


class Lengths(MeasuredExamples):
    """Examples of which only the lengths are known, each a row of its own."""

    def __init__(self, lengths: Sequence[int], supervised: float) -> None:
        """supervised: share of the tokens."""
        self._lengths = np.array(lengths)
        self._supervised = supervised

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: Any) -> Any:
        length, targets = int(self._lengths[index]), int(self.targets[index])
        return Example([0] * length, [0] * (length - targets) + [1] * targets)

    @property
    def lengths(self) -> np.ndarray:
        """[N]"""
        return self._lengths

    @property
    def targets(self) -> np.ndarray:
        """[N]"""
        return np.ceil((self._lengths - 1) * self._supervised).astype(int)

    @property
    def row_of(self) -> np.ndarray:
        """[N]"""
        return np.arange(len(self))

    @property
    def sides(self) -> np.ndarray:
        """[N] none has one."""
        return np.zeros(len(self), np.uint8)

    def epoch(self, draw: np.random.Generator) -> np.ndarray:
        """[N] any order."""
        return draw.permutation(len(self))


class Peaks:
    """The peaks and the work of settings on one model, each computed once."""

    def __init__(
        self,
        source: Path | Mapping[str, Any],
        kind: str,
        wanted: Wanted,
        name: str = "the model",
        own: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """source: the model's folder, or its config.json; kind: of the device, as backend.kind() says it; name: of the
        model, for messages; own: section.key -> value of what was set by hand.
        """
        self.own = own
        self.source = source
        self.kind = kind
        self.wanted = wanted
        self.name = name
        self._opened: dict[tuple[int | None, int], Given] = {}
        self._plans: dict[tuple[int, int], Plan] = {}
        self._work: dict[tuple[int, int], float] = {}
        self._found: dict[Settings, Memory | NotPredicted] = {}
        self._parameters = 0

    def context(self) -> int | None:
        """Tokens of the longest row that the model was made for; None: its config.json does not say."""
        config = self.given(None, 1).model_config
        found = {**config, **config.get("text_config", {})}.get("max_position_embeddings")
        return found if isinstance(found, int) and found > 0 else None

    def parameters(self) -> int:
        """Numbers in its matrices: of a mixture of experts in all of them."""
        if not self._parameters:
            for _, layer in self.given(None, 1).model.named_modules():
                if isinstance(layer, LINEAR + SWITCH + EMBEDDING):
                    self._parameters += int(np.prod(dense_shape(layer)))
        return self._parameters

    def quantized(self) -> bool:
        """Whether the model's weights are quantized as they are."""
        return bool(self.given(None, 1).model_config.get("quantization"))

    def weights(self, bits: int | None) -> int:
        """Bytes of the weights in so many bits, which no settings can go below."""
        given = self.given(bits, 1)
        return sum(array.nbytes for array in named(given.model.parameters()).values())

    def memory(self, settings: Settings) -> Memory | NotPredicted:
        """The predicted peak of a run with these settings."""
        if settings not in self._found:
            given = self.given(settings.bits, settings.rank)
            config = self._config(settings)
            plan = self.plan(settings.max_tokens, settings.batch_rows)
            with backend.planned_for(self._machine()):
                way = fast_ways.expected_way(given.model, plan.examples, config)
                self._found[settings] = fit_memory.fit(given, way, config, plan).memory
        return self._found[settings]

    def work(self, settings: Settings) -> float:
        """Of an epoch, in tokens that go once through the blocks."""
        batches = settings.max_tokens, settings.batch_rows
        if batches not in self._work:
            shapes = self.plan(*batches).shapes()
            self._work[batches] = sum(count * width + OF_A_BATCH for count, width, _ in shapes)
        return self._work[batches] * passes(settings.checkpoint)

    def plan(self, max_tokens: int, batch_rows: int) -> Plan:
        """The batches of the rows, none longer than so many tokens."""
        if (max_tokens, batch_rows) not in self._plans:
            lengths = sorted(min(length, max_tokens) for length in self.wanted.lengths)
            if len(lengths) > MOST_ROWS:
                places = np.linspace(0, len(lengths) - 1, MOST_ROWS).round().astype(int)
                lengths = [lengths[place] for place in places]
            section = resolve.load(None, (), {**self._own("train"), **self._rows(batch_rows)}).train
            self._plans[max_tokens, batch_rows] = Plan(Lengths(lengths, self.wanted.supervised), section)
        return self._plans[max_tokens, batch_rows]

    def given(self, bits: int | None, rank: int) -> Given:
        """The model in so many bits with an adapter of this rank, as it would train on the device."""
        if (bits, rank) not in self._opened:
            backend.prepare()
            self._opened[bits, rank] = self._open(bits, rank)
        return self._opened[bits, rank]

    def _open(self, bits: int | None, rank: int) -> Given:
        if isinstance(self.source, Path):
            model, config = open_model(self.source)
        else:
            model, config = unread.built(self.source, self.name)
        wanted = self._quantization(bits)
        if wanted is not None:
            model, config = quantized_model(model, config, wanted, [])
        with backend.planned_for(self._machine()):
            dtype = backend.dtype_for(self.own.get("train.dtype", "auto"), model_dtype(model), "quantization" in config)
        if dtype != model_dtype(model):
            cast(model, dtype)
        if self.kind == "cpu":
            multiply_densely(model)
        attach.attach(
            model, AdapterPlan.of(model, resolve.load(None, (), {**self._own("lora"), "lora.rank": rank}).lora)
        )
        return Given(model, config, dtype)

    def _quantization(self, bits: int | None) -> Quantization | None:
        """What the dense model becomes; None: it stays dense, or its folder is quantized already."""
        if bits is not None:
            return Quantization.of(bits, None, None)
        stored = None if isinstance(self.source, Path) else self.source.get("quantization")
        return Quantization.of(stored["bits"], stored["group_size"], stored.get("mode")) if stored else None

    def _machine(self) -> Machine:
        """A machine of this kind whose memory does not matter: what is predicted is compared with it elsewhere."""
        return Machine(self.kind, backend.GIB, backend.GIB)

    def _config(self, settings: Settings) -> Config:
        """What of the settings decides the peak. Rows are taken to share nothing: what they do share needs less."""
        return resolve.load(
            None,
            (),
            {
                **self._own("lora", "train", "fast"),
                "data.max_tokens": settings.max_tokens,
                "lora.rank": settings.rank,
                **self._rows(settings.batch_rows),
                "train.accumulate": settings.accumulate,
                "train.checkpoint_layers": settings.checkpoint,
                "fast.prefix": "off",
            },
        )

    def _own(self, *sections: str) -> dict[str, Any]:
        """What was set by hand in some sections."""
        return {key: value for key, value in self.own.items() if key.partition(".")[0] in sections}

    def _rows(self, batch_rows: int) -> dict[str, Any]:
        """The batches, and an epoch of them, but for what was set by hand instead."""
        rows = {} if "train.batch_tokens" in self.own else {"train.batch_rows": batch_rows}
        return rows if "train.steps" in self.own else {"train.epochs": 1, **rows}
