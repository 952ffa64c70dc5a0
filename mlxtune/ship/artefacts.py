"""The forms in which a trained model leaves, and those that are folders (`gguf` has the others). `export.ship` makes
them.

To add a form:
1. Here, or in a module beside this one: a frozen dataclass below `Artefact`, with the options of this form as fields,
   that says what it cannot hold (`refuse`), writes its files (`write`), names its limits among `verify.LIMITS`
   (`storage`), and runs the result with the program of its users (`run`; where that may be missing: `not_installed`
   and `read_back`). `why_different` calls what fits of `differences`.
2. Its word for `--to`, in api/exporting.py (`Form`, `artefact`) and, of mlxtune.yaml, in `config.schema.ExportSection`;
   its options in cli/ship.py, each with `needs=`.
3. A test beside those of tests/test_ship.py: its files, read by another library, compute what was trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlxtune_convert.adapters import AdapterConfig
from mlxtune_convert.files import require_space
from mlxtune_convert.hf import families, model_folder
from mlxtune_convert.hf.configs import SOURCE_FILE, unquantized
from mlxtune_convert.hf.model_folder import vocabulary
from mlxtune_convert.peft import adapter_folder
from mlxtune_convert.peft.settings import Settings
from mlxtune_convert.peft.tensors import WEIGHTS_FILE

from mlxtune.adapter.peft import from_model
from mlxtune.data.chat.masking import Example
from mlxtune.data.template.tokenizer_changes import Changes
from mlxtune.errors import UserError
from mlxtune.model import reopened
from mlxtune.model.arrays import dtype_name, to_numpy
from mlxtune.model.convert import UNQUANTIZED_BITS, copy_tokenizer
from mlxtune.model.load import model_dtype, open_model, source_of
from mlxtune.ship import card, differences, runners
from mlxtune.ship.differences import Trained, Wanted
from mlxtune.ship.gptq import Calibration
from mlxtune.ship.merge import CALIBRATED_BELOW, Merged, Progress, Told, fuse
from mlxtune.ship.request import MergedModel
from mlxtune.ship.runners import Candidate, Runner, TorchRunner


class Artefact(ABC):
    """One form, with its options. `ship` calls the methods in the order in which they stand here."""

    file = ""  # the name of its file, where it is one file; "": it is a folder

    def refuse(self, model: MergedModel) -> None:
        """Raise UserError for what this form cannot hold, before anything is written."""
        return

    def not_installed(self) -> str:
        """The package that runs this form, where it is missing: `read_back` is the proof then."""
        return ""

    def is_run_dense(self) -> bool:
        """Whether the program that runs it holds all its weights in float32."""
        return True

    @abstractmethod
    def write(self, model: MergedModel, work: Path, progress: Progress | None) -> list[str]:
        """Write it into the folder `work`; return what a person must know."""

    @abstractmethod
    def storage(self, model: MergedModel) -> str:
        """The name of its limits in `verify.LIMITS`."""

    @abstractmethod
    def run(self, model: MergedModel, work: Path) -> AbstractContextManager[Candidate]:
        """Have it run by the program that its users have."""

    def read_back(self, model: MergedModel, work: Path) -> int:
        """Compare every tensor in the files with what it must be; return how many. Raises UserError."""
        raise NotImplementedError

    @abstractmethod
    def why_different(self, model: MergedModel, work: Path, trained: Trained, run: Runner) -> str:
        """Why it is not the trained model, in a sentence. run: what ran it."""

    @abstractmethod
    def label(self, model: MergedModel) -> str:
        """Its form, for people."""


@dataclass(frozen=True)
class FusedMlx(Artefact):
    """One MLX folder that needs no adapter."""

    bits: int = UNQUANTIZED_BITS  # of a weight; UNQUANTIZED_BITS: dense
    group: int | None = None  # weights that share a scale; None: as many as in the base
    dtype: str | None = None  # of dense tensors; None: the base's own
    calibration: Sequence[Example] = ()  # training rows to choose codes by; (): rounded to the nearest

    def is_run_dense(self) -> bool:
        return self.bits == UNQUANTIZED_BITS

    def write(self, model: MergedModel, work: Path, progress: Progress | None) -> list[str]:
        request = model.request
        assert request.adapter is not None
        calibration = None
        if self.bits < CALIBRATED_BELOW and self.calibration:
            calibration = Calibration(str(request.model), request.adapter, self.calibration)
        config = model.facts.config
        merged = model.to_read(model.dtype(self.dtype))
        notes = fuse(merged, model.folder, work, self.bits, self.group, calibration, model.copies_code, progress)
        Changes.read(request.adapter).write(work)
        card.write_generation_config(work, config)
        if request.examples is None:
            reopened.check(work)  # no proof will run it
        return notes

    def storage(self, model: MergedModel) -> str:
        return dtype_name(model.dtype(self.dtype)) if self.is_run_dense() else f"{self.bits} bits"

    def run(self, model: MergedModel, work: Path) -> AbstractContextManager[Candidate]:
        return nullcontext(runners.mlx_folder(work))

    def why_different(self, model: MergedModel, work: Path, trained: Trained, run: Runner) -> str:
        wanted = None
        if self.is_run_dense():
            wanted = Wanted(
                lambda dtype: _arrays(model.to_read(dtype)),
                lambda: model.to_read(mx.float32).tensors(),
                unquantized(model.facts.config),
                "A base in bfloat16 or float32 holds them (--base), and so does "
                "`mlxtune export --to hf --dtype float32`.",
            )
        return differences.of_folder(work, wanted, trained, run, self.storage(model))

    def label(self, model: MergedModel) -> str:
        return f"{self.bits} bits"


@dataclass(frozen=True)
class HuggingFace(Artefact):
    """A merged model folder that transformers loads."""

    dtype: str | None = None  # how weights are stored; None: as the base's own

    def refuse(self, model: MergedModel) -> None:
        families.by_model_type(model.source["config"])

    def write(self, model: MergedModel, work: Path, progress: Progress | None) -> list[str]:
        request, original = model.request, model.source["config"]
        layout = families.by_model_type(original)
        dropped = model_folder.dropped_tensors(layout, model.folder, original)
        dtype = model.dtype(self.dtype)
        require_space(work, model.facts.count * dtype.size)
        rows = vocabulary(model.facts.config)
        tensors = _arrays(model.to_read(dtype), progress)
        config = model_folder.write(
            work, layout, tensors, dropped, original, rows, dtype_name(dtype), model.copies_code
        )
        notes = copy_tokenizer(model.folder, work, model.copies_code)
        Changes.read(request.adapter).write(work)
        card.write_generation_config(work, config)
        card.write(work, "transformers", model.hub_name, card.licence_of(model.folder), request.adapter)
        return notes

    def storage(self, model: MergedModel) -> str:
        return dtype_name(model.dtype(self.dtype))

    def run(self, model: MergedModel, work: Path) -> AbstractContextManager[Candidate]:
        return nullcontext(runners.hf_folder(work))

    def why_different(self, model: MergedModel, work: Path, trained: Trained, run: Runner) -> str:
        config = model.source["config"]
        layout = families.by_model_type(config)
        wider = "float32" if self.dtype == "bfloat16" else "bfloat16 or float32"
        wanted = Wanted(
            lambda dtype: layout.to_hf(_arrays(model.to_read(dtype)), np),
            lambda: model.to_read(mx.float32).tensors(),
            unquantized(config),
            f"--dtype {wider} holds them.",
        )
        return differences.of_folder(work, wanted, trained, run, self.storage(model))

    def label(self, model: MergedModel) -> str:
        return "hf"


@dataclass(frozen=True)
class Peft(Artefact):
    """A PEFT adapter folder. Its base is the model that was trained on, so a request has no other (`base`)."""

    def refuse(self, model: MergedModel) -> None:
        if model.request.adapter is None:
            raise UserError("--to peft exports an adapter", "Name the run: --adapter RUN")
        families.by_model_type(model.source["config"])

    def not_installed(self) -> str:
        return "" if runners.has_peft() else "PEFT"

    def write(self, model: MergedModel, work: Path, progress: Progress | None) -> list[str]:
        request = model.request
        adapter = self._adapter(model)
        adapter_folder.write_adapter(work, adapter)
        changes = Changes.read(request.adapter)
        notes: list[str] = []
        for_readme = ""
        if not changes.empty:
            notes += copy_tokenizer(request.model, work, model.copies_code)
            changes.write(work)
            for_readme = "Its tokenizer is here; answers end at `generate(..., eos_token_id=tokenizer.eos_token_id)`."
        rows = vocabulary(model.facts.config)
        if rows != vocabulary(model.source["config"]):
            for_readme += (
                f" Before PEFT loads it, the base needs rows for new tokens: `base.resize_token_embeddings({rows})`."
            )
        card.write(work, "peft", adapter.base, card.licence_of(request.model), request.adapter, for_readme)
        adapter_folder.check_adapter(work, adapter)
        if not adapter.base:
            notes.append("the adapter names no base model (unknown here); --base-name OWNER/NAME writes it")
        return notes

    def _adapter(self, model: MergedModel) -> adapter_folder.Adapter:
        run = model.request.adapter
        if run is None:
            raise UserError("there is no run to compare them with: --adapter RUN")
        saved = AdapterConfig.read(run)
        return from_model(model.unread().model, saved, model.source["config"], model.hub_name or saved.base)

    def storage(self, model: MergedModel) -> str:
        return "float32"

    def run(self, model: MergedModel, work: Path) -> AbstractContextManager[Candidate]:
        if not runners.has_peft():
            raise UserError("PEFT adapters are run by PEFT, which is not installed", "pip install torch peft")
        return nullcontext(runners.peft_folder(model.request.model, work))

    def read_back(self, model: MergedModel, work: Path) -> int:
        return adapter_folder.check_adapter(work, self._adapter(model))

    def why_different(self, model: MergedModel, work: Path, trained: Trained, run: Runner) -> str:
        assert isinstance(run, TorchRunner)
        return differences.of_peft(trained, run, lambda: self.read_back(model, work))

    def label(self, model: MergedModel) -> str:
        return "peft"


def _arrays(merged: Merged, progress: Progress | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """(MLX's name, dense array) of every tensor, in the merged model's type."""
    told = Told(merged.count(), progress)
    for name, array in merged.tensors():
        yield name, to_numpy(array)
        told.add(array.size)


def of_folder(folder: Path) -> Artefact:
    """The form of an artefact that is already there. Raises UserError for a folder that is no export, or is too large
    to be compared here.
    """
    if (folder / WEIGHTS_FILE).is_file():
        Settings.read(folder)  # PEFT is given no key that we do not know: some name modules that it would import
        return Peft()
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is neither a model folder nor a PEFT adapter", "Name what fuse or export wrote.")
    opened, config = open_model(folder)
    runners.require_memory(Merged(opened, config, mx.float32).count())
    quantization = config.get("quantization")
    if quantization:
        return FusedMlx(quantization["bits"])
    dtype = dtype_name(model_dtype(opened))
    is_hf = source_of(folder)["kind"] == "hf" and not (folder / SOURCE_FILE).is_file()
    return HuggingFace(dtype) if is_hf else FusedMlx(dtype=dtype)
