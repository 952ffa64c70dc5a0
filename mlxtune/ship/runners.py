"""Who runs what a proof compares: each runner gives the logits of one program at a batch's supervised positions.

    MlxRunner         mlx-lm's model: the trained model itself, and MLX folders
    TorchRunner       transformers on a Hugging Face folder, or PEFT on the dense base
    llama_cpp.Runner  llama.cpp on a GGUF file, in a process of its own

The optional programs are imported inside the functions. Legend: T tokens of a row, N supervised positions of a batch,
V vocabulary.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlxtune_convert.files import read_json
from mlxtune_convert.hf import families, mtp
from mlxtune_convert.hf.configs import unquantized
from mlxtune_convert.peft.tensors import PREFIX, WEIGHTS_FILE
from mlxtune_convert.sizes import size
from mlxtune_convert.tensors import read_header

from mlxtune.compute.loss import inputs_of, supervised_outputs
from mlxtune.data.dataset.batches import Batch
from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.model.arrays import to_numpy
from mlxtune.model.load import load, source_of
from mlxtune.ship.merge import open_merged

Runner = Callable[[Batch], np.ndarray]  # the logits [N, V] float32 at a batch's supervised positions
IN_MLX = "MLX, float32"
IN_PEFT = "PEFT on the dense base, float32"


@dataclass(frozen=True)
class Candidate:
    """An artefact in the hands of the program that will use it."""

    run: Runner  # its logits
    program: str  # for reports: "transformers, float32"
    notes: list[str] = field(default_factory=list)  # what a person must know of how the program reads it


@dataclass(frozen=True)
class MlxRunner:
    """Logits at a batch's supervised positions, by mlx-lm's model."""

    model: nn.Module  # mlx-lm's

    def __call__(self, batch: Batch) -> np.ndarray:
        """[N, V] float32."""
        return to_numpy(supervised_outputs(self.model, None, inputs_of(batch, None)).astype(mx.float32))


@dataclass(frozen=True)
class TorchRunner:
    """The same by a model of transformers, or PEFT's around one."""

    model: Any  # of transformers, or PEFT's

    def __call__(self, batch: Batch) -> np.ndarray:
        """[N, V] float32."""
        import torch

        positions, _ = batch.supervised()
        ids = torch.from_numpy(batch.ids[:, :-1].astype(np.int64))
        with torch.no_grad():
            logits = text_part(self.model)(ids).logits
        rows = logits.reshape(-1, logits.shape[-1])[torch.from_numpy(positions.astype(np.int64))]
        return rows.float().numpy()


def mlx_folder(folder: Path) -> Candidate:
    """An MLX folder, run by MLX in float32."""
    return Candidate(MlxRunner(load(str(folder), "float32").model), IN_MLX)


def hf_folder(folder: Path) -> Candidate:
    """A Hugging Face folder, run by transformers; where that is not possible by MLX, and the report says why.

    Raises UserError for missing or unexpected tensors.
    """
    if not has_transformers():
        why = "transformers is not installed"
    else:
        try:
            return Candidate(transformers_runner(folder), "transformers, float32")
        except ImportError as error:  # a tower in another library, as Gemma 3n's in timm
            why = f"transformers needs more for it: {shorten(str(error), 100, placeholder=' ...')}"
    return Candidate(mlx_folder(folder).run, f"{IN_MLX} ({why})")


def peft_folder(model: Path, folder: Path) -> Candidate:
    """A PEFT adapter folder on the dense form of the base that it was trained on. model: the base's MLX folder.

    Raises UserError when the base is too large to be compared here, or does not fit transformers' model.
    """
    config = source_of(model)["config"]
    base = open_merged(model, None, mx.float32)
    require_memory(base.count())
    arrays = ((name, to_numpy(array)) for name, array in base.tensors())
    state = dict(families.by_model_type(config).to_hf(arrays, np))
    return Candidate(peft_runner(state, unquantized(config), folder), IN_PEFT)


def require_memory(parameters: int) -> None:
    """Raise UserError when a proof in float32 would not fit this machine's memory: it would page, not fail."""
    needed, have = 4 * parameters, backend.memory_bytes()
    if needed > 0.8 * have:
        raise UserError(
            f"comparing in float32 needs {size(needed)}, this machine has {size(have)}",
            "Leave the comparison out (--no-verify), or run it on a larger machine.",
        )


def has_transformers() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def has_peft() -> bool:
    return has_transformers() and importlib.util.find_spec("peft") is not None


def transformers_version() -> str:
    return importlib.metadata.version("transformers")


def transformers_runner(folder: Path) -> TorchRunner:
    """An exported folder, run by transformers in float32. Raises UserError for missing or unexpected tensors."""
    return TorchRunner(transformers_model(folder).eval())


def transformers_model(folder: Path) -> Any:
    """Load an exported folder with transformers, in float32. Raises UserError for missing or unexpected tensors."""
    _quiet()
    import torch
    from transformers import AutoConfig

    try:
        # Without trust_remote_code=False the library would ask the user whether to run code that lies in the folder.
        kind = model_class(AutoConfig.from_pretrained(str(folder), trust_remote_code=False))
        model, info = kind.from_pretrained(
            str(folder), dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except ImportError:  # a part of it is in a library that is not installed
        raise
    except Exception as error:
        raise _not_loaded("transformers", folder, error) from error
    wrong: dict[str, list[Any]] = {}
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(info[key])
        if key == "unexpected_keys":
            names = _really_unexpected(names, folder)
        if names:
            wrong[key.removesuffix("_keys")] = names
    if wrong:
        listed = "; ".join(f"{how}: {_first_names(names)}" for how, names in wrong.items())
        raise UserError(
            f"{folder} does not load whole in transformers {transformers_version()} ({listed})",
            "Either it is not as it was written, or this version names the family's tensors otherwise than mlxtune "
            "does (a bug, then: please report it). --no-verify exports without running it.",
        )
    return model


def _really_unexpected(names: list[str], folder: Path) -> list[str]:
    """Without the tensors of blocks that predict further tokens: transformers leaves these out too, but it knows them
    by the block numbers of some checkpoints alone.
    """
    settings = read_json(folder / "config.json", "a model folder")
    return [name for name in names if not mtp.belongs(name, settings)]


def _first_names(names: list[Any]) -> str:
    return ", ".join(str(name) for name in names[:3])


def peft_runner(base: dict[str, np.ndarray], config: dict[str, Any], folder: Path) -> TorchRunner:
    """The exported adapter on the dense float32 form of the base it was trained on, through transformers and PEFT.

    base: tensors by Hugging Face's names, in the shapes that transformers has; handed over in memory and taken out of
    the dict one by one, nothing is written. config: of the base, without quantization. Raises UserError where they do
    not fit transformers' model.
    """
    _quiet()
    import torch
    from peft import PeftModel
    from transformers import AutoConfig

    built = AutoConfig.for_model(**config)
    state = {name: torch.from_numpy(np.array(base.pop(name))) for name in list(base)}
    model, info = model_class(built).from_pretrained(
        None, config=built, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    # Missing keys are none of ours: what MLX never had (a vision tower) is not what the adapter is on.
    wrong = [*info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise UserError(
            f"the base does not fit the model of transformers {transformers_version()} ({_first_names(wrong)})",
            "This version names the family's tensors otherwise than mlxtune does, which is a bug: please report it.",
        )
    rows = _rows_of_saved_embedding(model, folder)
    if rows > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:
        raise _not_loaded("PEFT", folder, error) from error
    return TorchRunner(adapted.eval())


def _rows_of_saved_embedding(model: Any, folder: Path) -> int:
    """How many rows the embedding in an adapter's file has (more than the base's, when tokens were added); 0 where the
    file holds none.
    """
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    saved = read_header(folder / WEIGHTS_FILE).get(f"{PREFIX}{name}.weight")
    return int(saved["shape"][0]) if saved else 0


def model_class(config: Any) -> Any:
    """transformers' class of a configuration: the one that its checkpoint names."""
    import transformers

    name = next(iter(config.architectures or []), "")
    found = getattr(transformers, str(name), None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    return transformers.AutoModelForCausalLM


def _not_loaded(library: str, folder: Path, error: Exception) -> UserError:
    """For an error of a library that reads a folder: it raises whatever its parts raise."""
    reason = shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
    return UserError(
        f"{library} {importlib.metadata.version(library)} does not load {folder} ({reason})",
        "Either it is not as it was written, or this version wants something else (a bug, then: please report it).",
    )


def text_part(model: Any) -> Any:
    """What answers on text alone: the model itself, but for Llama 4, whose wrapper wants an image (transformers 5)."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    return whole.language_model if whole.config.model_type == "llama4" else model


def _quiet() -> None:
    """Before PyTorch is loaded. The other library's progress bars and its notes on its own future would only confuse
    here. And PyTorch makes a folder for what it compiles, among the temporary files, and leaves it there; nothing is
    compiled here, and no folder needs to be made where it is one that is there.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
