"""mlx-lm's classes of a family: found, made to read what they refuse for no reason, and refused in one line.

mlx-lm has a module for each `model_type`, with a class of the model and one of its arguments. Whatever these raise over
a strange folder becomes one line here that names the folder.
"""

from __future__ import annotations

import contextlib
import io
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlxtune_convert.hf import families, mtp, unheeded
from mlxtune_convert.hf.configs import normalise

from mlxtune.errors import STOPPED, UserError
from mlxtune.machine.gpu_errors import recognise
from mlxtune.model.corrections.corrected import readable
from mlxtune.model.corrections.shared_keys import with_unused

MODEL_TYPE = re.compile(r"[\w-]+")


def require_known(path: Path, config: dict[str, Any]) -> None:
    """Raise UserError when mlx-lm has no model of the type that a config.json names, or it names none."""
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{path}/config.json names no type of model (model_type)")
    with refusals(path):
        known = normalise(config)
    _family(path, known)


@contextlib.contextmanager
def refusals(path: Path, config: dict[str, Any] | None = None) -> Iterator[None]:
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
                f"{path}: the weights do not fit config.json ({_text(error)})",
                "They are of different models, or one of them is damaged: copy or download the folder again.",
            ) from error
        raise UserError(f"{path}/config.json does not describe a model that mlx-lm knows ({_text(error)})") from error


def _is_a_signal(error: BaseException) -> bool:
    """Whether the user stops the command, and not a family's module itself."""
    return isinstance(error, SystemExit) and error.code in STOPPED


def _over_weights(error: BaseException) -> bool:
    """Whether an error came up while weights were put into a model that was already built."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return nn.Module.load_weights.__code__ in codes or any(code.co_name == "sanitize" for code in codes)


def _text(error: BaseException) -> str:
    """An error in a few words. A ValueError of mlx-lm's is written for people; other kinds are named."""
    text = str(error)
    if not isinstance(error, ValueError):
        text = f"{type(error).__name__}: {error}"
    return shorten(text, 300, placeholder=" ...")


@dataclass(frozen=True)
class Readable:
    """mlx-lm's class of a model's arguments, made from what that class can read of a configuration."""

    # The class; mlx-lm calls its `from_dict`.
    arguments: Any

    def from_dict(self, config: dict[str, Any]) -> Any:
        return self.arguments.from_dict(readable(config))


def model_classes(path: Path, config: dict[str, Any], original: dict[str, Any], behind: set[int]) -> tuple[type, type]:
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
