"""A model folder or hub id -> a model ready to run or to tune on this device."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlxtune_convert.files import read_json
from mlxtune_convert.foreign.method import of_folder
from mlxtune_convert.gguf.tokenizer_write import token_ids
from mlxtune_convert.hf import mtp, unheeded
from mlxtune_convert.hf.configs import normalise
from mlxtune_convert.hf.model_folder import vocabulary
from mlxtune_convert.mlx_folder import source_of
from mlxtune_convert.tensors import weights_of

from mlxtune.data.template.templates import Templates
from mlxtune.data.template.tokenizer import MODEL_FOLDER, load_tokenizer, require_config, require_folder
from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.model import config_check
from mlxtune.model.arrays import named
from mlxtune.model.corrections.corrected import correct
from mlxtune.model.corrections.reference import completed
from mlxtune.model.corrections.shared_keys import handed_on
from mlxtune.model.corrections.tying import by_files
from mlxtune.model.hub import resolve
from mlxtune.model.linux_cpu import multiply_densely
from mlxtune.model.mlx_lm_classes import Readable, model_classes, refusals

__all__ = ["Loaded", "cast", "load", "model_dtype", "open_model", "source_of"]

GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer."""

    # mlx-lm's, corrected (`corrections`).
    model: nn.Module
    # Hugging Face's own, not mlx-lm's wrapper.
    tokenizer: Any
    # config.json, normalised for mlx-lm.
    config: dict[str, Any]
    # The model's folder.
    path: Path
    # Of the activations.
    dtype: mx.Dtype
    # Of the weights as they are stored.
    own: mx.Dtype

    @cached_property
    def templates(self) -> Templates:
        """The tokenizer's chat templates, with what was learnt about them."""
        return Templates(self.tokenizer)

    @property
    def eos_ids(self) -> list[int]:
        """Every id that ends an answer: of the config, the generation config and the tokenizer."""
        return sorted({*token_ids(self.config.get("eos_token_id")), self.tokenizer.eos_token_id} - {None})

    def check_ids(self, rows: Iterable[Sequence[int]]) -> None:
        """Raise UserError for a token that the model has no embedding for: MLX would read whatever lies behind it."""
        known = vocabulary(self.config)
        highest = max((index for row in rows for index in row), default=0)
        if known is not None and highest >= known:
            raise UserError(
                f"{self.path}: the tokenizer makes the token {highest}, the model knows {known} tokens (from 0)",
                "The tokenizer is another model's, or tokens were added to it: take the model's own.",
            )


def load(source: str, dtype: str = "own", as_mlx_lm: bool = False, read: bool = True, tokenizer: Any = None) -> Loaded:
    """Load a model for running or training.

    source: MLX folder, 16-bit Hugging Face folder, or hub id; dtype: "own" to run it, `train.dtype` to train it;
    as_mlx_lm: with mlx-lm's own way to multiply on the CPU, to be compared with; read: its weights now, not when they
    are first used; tokenizer: as it is set up for a run, instead of the folder's own. Raises UserError for whatever is
    missing, torn or unknown.
    """
    backend.prepare()
    path = resolve(source)
    require_folder(path)
    model, config = open_model(path)
    if tokenizer is None:
        tokenizer = load_tokenizer(path)
    own = model_dtype(model)
    wanted = backend.dtype_for(dtype, own, "quantization" in config)
    if wanted != own:
        cast(model, wanted)
    if backend.kind() == "cpu" and not as_mlx_lm:
        multiply_densely(model)
    if read:
        mx.eval(model.parameters())
    return Loaded(model, tokenizer, config, path, wanted, own)


def open_model(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The mlx-lm model of a folder, its weights not yet read, and its normalised config.json.

    Raises UserError for a configuration that is none or has absurd values, a type that mlx-lm does not know, and
    weights that do not fit.
    """
    from mlx_lm.utils import load_config, load_model

    require_config(path)
    config_check.check(path, read_json(path / "config.json", MODEL_FOLDER), "config.json")
    weights = weights_of(path)
    if (path / GENERATION_FILE).is_file():
        read_json(path / GENERATION_FILE, "generation settings")
    with refusals(path):
        original = load_config(path)
    foreign = of_folder(path, original)
    if foreign is not None:
        raise foreign.not_here()
    with refusals(path):
        config = normalise(by_files(completed(original), weights.places))
    model_class, arguments = model_classes(path, config, original, mtp.behind(weights.names, config))
    config_check.check_arguments(path, config, arguments, weights.names)
    with refusals(path, config), _alone(path, weights.files) as view:
        model, config = load_model(
            view,
            lazy=True,
            model_config=config,
            get_model_classes=lambda config: (model_class, Readable(arguments)),
        )
    if why := unheeded.unable(config):
        raise UserError(f"{path}: mlx-lm has no such model of type {config.get('model_type')}: {why}")
    for _, module in model.named_modules():
        if not hasattr(module, "_no_grad"):  # some of mlx-lm's classes leave out the start that gives it to them
            module._no_grad = set()
    with refusals(path, config):
        correct(model, config)
        handed_on(model)
    return model, config


@contextlib.contextmanager
def _alone(path: Path, files: Sequence[Path]) -> Iterator[Path]:
    """A folder of links to a model's own files and no others: mlx-lm reads every model*.safetensors that it finds.

    Weights that are read later are read from files that were opened here, so the folder may go before that.
    """
    with tempfile.TemporaryDirectory(prefix="mlxtune-") as name:
        view = Path(name)
        for settings in ("config.json", GENERATION_FILE, "hf_quant_config.json"):
            if (path / settings).is_file():
                (view / settings).symlink_to((path / settings).absolute())
        for number, file in enumerate(files):
            (view / f"model-{number:05d}.safetensors").symlink_to(file.absolute())
        yield view


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Change the floating type of a model's parameters, except those that its family keeps in float32."""
    wanted = getattr(model, "cast_predicate", lambda name: True)

    def to(name: str, array: mx.array) -> mx.array:
        return array.astype(dtype) if wanted(name) and mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map_with_path(to, model.parameters()))


def model_dtype(model: nn.Module) -> mx.Dtype:
    """The floating type that most of the model's numbers have (scales stand for quantized weights)."""
    sizes: dict[mx.Dtype, int] = {}
    for array in named(model.parameters()).values():
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
    return max(sizes, key=lambda dtype: sizes[dtype])
