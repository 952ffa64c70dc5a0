"""The forms in which a trained model leaves; `export.ship` makes them.

To add a form:
1. Here: a frozen dataclass below `Artefact`, with the options of this form as fields, that says what it cannot hold
   (`refuse`), writes its files (`write`), names its limits among `verify.LIMITS` (`storage`), and runs the result with
   the program of its users (`run`; where that may be missing: `not_installed` and `read_back`). `why_different` calls
   what fits of `differences`.
2. In cli/ship.py: its word for `--to`, in FORMS and `_artefact`, and its options, each with `needs=`.
3. A test beside those of tests/test_ship.py: its files, read by another library, compute what was trained.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlxtune_convert.files import require_space
from mlxtune_convert.gguf import adapter_file, container, ggml, metadata
from mlxtune_convert.gguf.architectures import by_model_type
from mlxtune_convert.gguf.family import Family
from mlxtune_convert.gguf.tensor_types import KEEP, TYPES
from mlxtune_convert.hf import families, model_folder
from mlxtune_convert.hf.configs import SOURCE_FILE, unquantized
from mlxtune_convert.peft import adapter_folder
from mlxtune_convert.peft.adapter_folder import Update
from mlxtune_convert.peft.settings import Settings

from mlxtune.adapter import lora
from mlxtune.adapter.peft import from_model
from mlxtune.adapter.vocabulary import vocabulary
from mlxtune.data.chat.masking import Example
from mlxtune.data.template.tokenizer_changes import Changes
from mlxtune.errors import UserError, did_you_mean
from mlxtune.model import reopened
from mlxtune.model.arrays import dtype_name, to_numpy
from mlxtune.model.convert import UNQUANTIZED_BITS, copy_tokenizer
from mlxtune.model.load import model_dtype, open_model, source_of
from mlxtune.ship import card, differences, gguf, llama_cpp, modelfile, runners
from mlxtune.ship.differences import Trained, Wanted
from mlxtune.ship.gptq import Calibration
from mlxtune.ship.merge import CALIBRATED_BELOW, Merged, fuse
from mlxtune.ship.request import MergedModel
from mlxtune.ship.runners import Candidate, Runner, TorchRunner

GGUF_FILE = "model.gguf"
Progress = Callable[[int, int], None]  # (weights done, weights in all)


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
        notes = fuse(merged, model.folder, work, self.bits, self.group, calibration, model.copies_code)
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
        tensors = _arrays(model.to_read(dtype))
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
        spec = lora.read_spec(run)
        return from_model(model.unread().model, spec, model.source["config"], model.hub_name or spec.base)

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


@dataclass(frozen=True)
class Gguf(Artefact):
    """A merged model as one GGUF file, for llama.cpp and what is built on it."""

    type: str | None = None  # of tensor_types.TYPES; None: `gguf.default_type`
    ollama: bool = False  # with a Modelfile beside it
    file = GGUF_FILE

    def refuse(self, model: MergedModel) -> None:
        if self.type is not None and self.type not in TYPES:
            raise UserError(f"--type {self.type} is not known", did_you_mean(self.type, TYPES))
        if self.ollama:
            modelfile.check_name(model.request.out.name)
        gguf.refuse_other_programs_model(model)
        if self.type == KEEP and model.request.adapter is not None:
            raise UserError(
                "--type keep cannot take an adapter: merging changes the weights, and their codes with them",
                "Ship the adapter beside the kept base (--to gguf-lora), or merge with --type f16 or q8_0.",
            )

    def _type(self, model: MergedModel) -> str:
        return self.type or gguf.default_type(model)

    def not_installed(self) -> str:
        return "" if llama_cpp.installed() else ggml.PACKAGE

    def write(self, model: MergedModel, work: Path, progress: Progress | None) -> list[str]:
        plan = gguf.plan_of(model, self._type(model))
        plan = replace(plan, fields=gguf.fields_of_run(plan.fields, model))
        plan.write(gguf.merged_tensors(model.to_read(mx.float32)), work / GGUF_FILE, progress)
        notes = gguf.notes_of(plan)
        if self.ollama:
            notes += modelfile.write(model.request, work, GGUF_FILE, adapter=False)
        return notes

    def storage(self, model: MergedModel) -> str:
        return gguf.storage_of(self._type(model), _family(model))

    @contextmanager
    def run(self, model: MergedModel, work: Path) -> Iterator[Candidate]:
        with llama_cpp.runner(work / GGUF_FILE) as run:
            request = model.request
            notes = gguf.compare_tokens(run, model.folder, request.adapter, request.examples or ())
            yield Candidate(run, f"llama.cpp, {self._type(model)}", notes)

    def read_back(self, model: MergedModel, work: Path) -> int:
        plan = gguf.plan_of(model, self._type(model))
        values = gguf.merged_tensors(model.to_read(mx.float32))
        return container.read_back(work / GGUF_FILE, plan.tensors(values))

    def why_different(self, model: MergedModel, work: Path, trained: Trained, run: Runner) -> str:
        assert isinstance(run, llama_cpp.Runner)
        return differences.of_gguf(self._type(model), lambda: self.read_back(model, work), trained, run)

    def label(self, model: MergedModel) -> str:
        return f"gguf {self._type(model)}"


@dataclass(frozen=True)
class GgufAdapter(Artefact):
    """The adapter alone as a GGUF file, to be used beside a GGUF file of the base that it was trained on."""

    ollama: bool = False  # with a Modelfile beside it
    file = GGUF_FILE

    def refuse(self, model: MergedModel) -> None:
        if self.ollama:
            modelfile.check_name(model.request.out.name)
        gguf.refuse_other_programs_model(model)
        if model.request.adapter is None:
            raise UserError("--to gguf-lora exports an adapter", "Name the run: --adapter RUN")
        _family(model)
        gguf.refuse_more_than_lora(model.unread().model)

    def not_installed(self) -> str:
        return "" if llama_cpp.installed() else ggml.PACKAGE

    def write(self, model: MergedModel, work: Path, progress: Progress | None) -> list[str]:
        config = metadata.text_of(model.facts.config)
        adapter_file.write_adapter(work / GGUF_FILE, _family(model), config, self._updates(model), model.hub_name)
        if self.ollama:
            return modelfile.write(model.request, work, GGUF_FILE, adapter=True)
        return []

    def _updates(self, model: MergedModel) -> dict[str, Update]:
        """Its factors by module path, A [in, r] and B [r, out]."""
        updates = {}
        for path, layer in lora.adapters(model.unread().model).items():
            updates[path] = Update(to_numpy(layer.lora_a), to_numpy(layer.lora_b), layer.scale)
        return updates

    def storage(self, model: MergedModel) -> str:
        return gguf.storage_of("f32", _family(model))

    @contextmanager
    def run(self, model: MergedModel, work: Path) -> Iterator[Candidate]:
        """On a float32 GGUF of the base, which is made for it and removed again."""
        base = MergedModel(replace(model.request, adapter=None, base_name="base"))
        with tempfile.TemporaryDirectory(dir=work.parent, prefix=".base-") as folder:
            file = Path(folder) / "base.gguf"
            gguf.plan_of(base, "f32").write(gguf.merged_tensors(base.to_read(mx.float32)), file)
            with llama_cpp.runner(file, work / GGUF_FILE) as run:
                yield Candidate(run, "llama.cpp on the float32 base")

    def read_back(self, model: MergedModel, work: Path) -> int:
        config = metadata.text_of(model.facts.config)
        tensors = adapter_file.adapter_tensors(_family(model), config, self._updates(model))
        return container.read_back(work / GGUF_FILE, ((name, "F32", array) for name, array in tensors.items()))

    def why_different(self, model: MergedModel, work: Path, trained: Trained, run: Runner) -> str:
        assert isinstance(run, llama_cpp.Runner)
        return differences.of_gguf("f32", lambda: self.read_back(model, work), trained, run)

    def label(self, model: MergedModel) -> str:
        return f"gguf-lora of {len(lora.adapters(model.unread().model))} modules"


def _family(model: MergedModel) -> Family:
    """What llama.cpp knows of the architecture. Raises UserError for one that it does not know."""
    return by_model_type(metadata.text_of(model.facts.config)["model_type"])


def _arrays(merged: Merged) -> Iterator[tuple[str, np.ndarray]]:
    """(MLX's name, dense array) of every tensor, in the merged model's type."""
    for name, array in merged.tensors():
        yield name, to_numpy(array)


def of_folder(folder: Path) -> Artefact:
    """The form of an artefact that is already there. Raises UserError for a folder that is no export, or is too large
    to be compared here.
    """
    if (folder / adapter_folder.WEIGHTS_FILE).is_file():
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
