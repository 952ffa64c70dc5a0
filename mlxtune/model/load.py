"""A model folder or hub id -> a model ready to run or to tune on this device."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlxtune_convert.files import read_json
from mlxtune_convert.foreign.method import of_folder
from mlxtune_convert.gguf.tokenizer_write import token_ids
from mlxtune_convert.hf import families, mtp, unheeded
from mlxtune_convert.hf.configs import normalise
from mlxtune_convert.mlx_folder import source_of
from mlxtune_convert.tensors import weights_of

from mlxtune.data.template.templates import Templates
from mlxtune.data.template.tokenizer import load_tokenizer, require_folder
from mlxtune.errors import STOPPED, UserError
from mlxtune.machine import backend
from mlxtune.machine.gpu_errors import recognise
from mlxtune.model import config_check
from mlxtune.model.arrays import named
from mlxtune.model.corrections.corrected import correct, readable
from mlxtune.model.corrections.reference import completed
from mlxtune.model.corrections.shared_keys import handed_on, with_unused
from mlxtune.model.corrections.tying import by_files
from mlxtune.model.hub import resolve
from mlxtune.model.linux_cpu import multiply_densely

__all__ = ["Loaded", "cast", "load", "model_dtype", "open_model", "source_of"]

GENERATION_FILE = "generation_config.json"
WHOLE = "a model folder: config.json, safetensors weights and a tokenizer"
MODEL_TYPE = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer. `tokenizer` is Hugging Face's own; `dtype` that of the activations, `own` that
    of the weights as they are stored."""

    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    path: Path
    dtype: mx.Dtype
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
        known = self.config.get("vocab_size") or self.config.get("text_config", {}).get("vocab_size")
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

    config_check.check(path, read_json(path / "config.json", WHOLE), "config.json")
    weights = weights_of(path)
    if (path / GENERATION_FILE).is_file():
        read_json(path / GENERATION_FILE, "generation settings")
    with _refusals(path):
        original = load_config(path)
    foreign = of_folder(path, original)
    if foreign is not None:
        raise foreign.not_here()
    with _refusals(path):
        config = normalise(by_files(completed(original), weights.places))
    classes = _classes(path, config, original, mtp.behind(weights.names, config))
    config_check.check_arguments(path, config, classes[1], weights.names)
    with _refusals(path, config), _alone(path, weights.files) as view:
        model, config = load_model(
            view,
            lazy=True,
            model_config=config,
            get_model_classes=lambda config: (classes[0], _Readable(classes[1])),
        )
    if why := unheeded.unable(config):
        raise UserError(f"{path}: mlx-lm has no such model of type {config.get('model_type')}: {why}")
    for _, module in model.named_modules():
        if not hasattr(module, "_no_grad"):  # some of mlx-lm's classes leave out the start that gives it to them
            module._no_grad = set()
    with _refusals(path, config):
        correct(model, config)
        handed_on(model)
    return model, config


def require_known(path: Path, config: dict[str, Any]) -> None:
    """Raise UserError when mlx-lm has no model of the type that a config.json names, or it names none."""
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{path}/config.json names no type of model (model_type)")
    with _refusals(path):
        known = normalise(config)
    _family(path, known)


@contextlib.contextmanager
def _refusals(path: Path, config: dict[str, Any] | None = None) -> Iterator[None]:
    """Turn what mlx-lm's own code raises over a folder's configuration and weights into one line. config: as it was
    handed to mlx-lm, which does not heed all of it.
    """
    try:
        yield
    except (UserError, OSError, MemoryError, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:  # a family's module raises whatever its parts raise
        if recognise(error) or _is_a_signal(error):
            raise
        why = unheeded.why(config) if config is not None and isinstance(error, ValueError) else ""
        if config is not None and why:
            raise UserError(f"{path}: mlx-lm has no such model of type {config.get('model_type')}: {why}") from error
        if _over_weights(error):
            raise UserError(
                f"{path}: the weights do not fit config.json ({_said(error)})",
                "They are of different models, or one of them is damaged: copy or download the folder again.",
            ) from error
        raise UserError(f"{path}/config.json does not describe a model that mlx-lm knows ({_said(error)})") from error


def _is_a_signal(error: BaseException) -> bool:
    """Whether the user stops the command, and not a family's module itself."""
    return isinstance(error, SystemExit) and error.code in STOPPED


def _over_weights(error: BaseException) -> bool:
    """Whether an error came up while weights were put into a model that was already built."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return nn.Module.load_weights.__code__ in codes or any(code.co_name == "sanitize" for code in codes)


def _said(error: BaseException) -> str:
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return shorten(text, 300, placeholder=" ...")


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


@dataclass(frozen=True)
class _Readable:
    """mlx-lm's class of a model's arguments, made from what that class can read of a configuration."""

    arguments: Any

    def from_dict(self, config: dict[str, Any]) -> Any:
        return self.arguments.from_dict(readable(config))


def _classes(path: Path, config: dict[str, Any], original: dict[str, Any], behind: set[int]) -> tuple[type, type]:
    """mlx-lm's classes; where it cannot read the names that transformers saves, our table puts them right first.

    behind: numbers of blocks that predict further tokens, which mlx-lm has no place for. Raises UserError for a type
    that mlx-lm has no module for, or whose module cannot be used here.
    """
    program = original.get("model_file")
    if program is not None:
        raise UserError(
            f"{path}/config.json wants the model's own program {str(program)[:80]!r} (model_file)",
            "Programs that come with a model are never run.",
        )
    model, arguments = _family(path, config)
    layout = families.of(original)
    if not layout.early and not layout.tower and not behind:
        return model, arguments

    class Renamed(model):  # type: ignore[misc, valid-type]
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            kept = ((name, array) for name, array in weights.items() if mtp.number(name) not in behind)
            early = dict(layout.for_mlx_lm(kept, mx, _width(config)))
            clean = super().sanitize(early) if hasattr(model, "sanitize") else early
            return with_unused(self, clean)

    return Renamed, arguments


def _width(config: dict[str, Any]) -> int:
    """The hidden size of a model's text part; 0 where it is not said."""
    return int((config.get("text_config") or config).get("hidden_size") or 0)


def _family(path: Path, config: dict[str, Any]) -> tuple[type, type]:
    """mlx-lm's classes of a configuration's type. What its module prints or does when it is imported stays here."""
    from mlx_lm.utils import _get_classes

    kind, printed = config.get("model_type"), io.StringIO()
    unknown = UserError(f"{path}: mlx-lm has no model of type {str(kind)[:80]!r}")
    if not isinstance(kind, str) or not MODEL_TYPE.fullmatch(kind):
        raise unknown
    try:
        with contextlib.redirect_stdout(printed):
            return _get_classes(config)
    except (Exception, SystemExit) as error:
        if _is_a_signal(error):
            raise
        cause = error.__cause__ or error
        absent = isinstance(cause, ModuleNotFoundError) and str(cause.name).startswith("mlx_lm.models")
        if absent or isinstance(cause, AttributeError):  # no such module, or one that holds no model
            raise unknown from error
        why = " ".join(printed.getvalue().split()) or f"{type(cause).__name__}: {cause}"
        raise UserError(f"{path}: mlx-lm's module for models of type {kind} does not work here ({why})") from error


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
