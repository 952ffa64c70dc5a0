"""The two GGUF forms, and what they need of MLX: the merged weights as a stream.

The files themselves are written by `mlxtune_convert.gguf`, which knows no MLX.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlxtune_convert.adapters import FACTORS
from mlxtune_convert.gguf import adapter_file, container, ggml, metadata
from mlxtune_convert.gguf.architectures import by_model_type
from mlxtune_convert.gguf.container import Field
from mlxtune_convert.gguf.family import GgufFamily
from mlxtune_convert.gguf.model_write import GgufPlan, Value, with_tokenizer_changes
from mlxtune_convert.gguf.quant_blocks import Codes
from mlxtune_convert.gguf.tensor_types import KEEP, TYPES
from mlxtune_convert.hf import families
from mlxtune_convert.peft.adapter_folder import Update

from mlxtune.adapter import attach
from mlxtune.compute.fit_memory import window_of
from mlxtune.data.chat.masking import Example
from mlxtune.data.template.tokenizer import tokenizer_json
from mlxtune.data.template.tokenizer_changes import Changes, tokenizer_of
from mlxtune.errors import UserError, did_you_mean
from mlxtune.model.arrays import to_numpy
from mlxtune.model.dense import QUANTIZED
from mlxtune.ship import differences, llama_cpp, modelfile, verify
from mlxtune.ship.artefacts import Artefact
from mlxtune.ship.differences import Trained
from mlxtune.ship.merge import Merged, Progress
from mlxtune.ship.request import MergedModel
from mlxtune.ship.runners import Candidate, Runner

GGUF_FILE = "model.gguf"  # under its temporary name
TYPES_OF_FLOATS = {mx.float32: "f32", mx.bfloat16: "bf16"}  # what a merged model is stored in; else f16


@dataclass(frozen=True)
class Gguf(Artefact):
    """A merged model as one GGUF file, for llama.cpp and what is built on it."""

    type: str | None = None  # of tensor_types.TYPES; None: `_default_type`
    ollama: bool = False  # with a Modelfile beside it
    file = GGUF_FILE

    def refuse(self, model: MergedModel) -> None:
        if self.type is not None and self.type not in TYPES:
            raise UserError(f"--type {self.type} is not known", did_you_mean(self.type, TYPES))
        if self.ollama:
            modelfile.check_name(model.request.out.name)
        _refuse_other_programs_model(model)
        if self.type == KEEP and model.request.adapter is not None:
            raise UserError(
                "--type keep cannot take an adapter: merging changes the weights, and their codes with them",
                "Ship the adapter beside the kept base (--to gguf-lora), or merge with --type f16 or q8_0.",
            )

    def _type(self, model: MergedModel) -> str:
        return self.type or _default_type(model)

    def not_installed(self) -> str:
        return "" if llama_cpp.installed() else ggml.PACKAGE

    def write(self, model: MergedModel, work: Path, progress: Progress | None) -> list[str]:
        plan = plan_of(model, self._type(model))
        plan = replace(plan, fields=_fields_of_run(plan.fields, model))
        plan.write(merged_tensors(model.to_read(mx.float32)), work / GGUF_FILE, progress)
        notes = _notes_of(plan)
        if self.ollama:
            notes += modelfile.write(model.request, work, GGUF_FILE, adapter=False)
        return notes

    def storage(self, model: MergedModel) -> str:
        return _storage_of(self._type(model), _family(model))

    @contextmanager
    def run(self, model: MergedModel, work: Path) -> Iterator[Candidate]:
        with llama_cpp.runner(work / GGUF_FILE) as run:
            request = model.request
            notes = _differing_tokens(run, model.folder, request.adapter, request.examples or ())
            yield Candidate(run, f"llama.cpp, {self._type(model)}", notes)

    def read_back(self, model: MergedModel, work: Path) -> int:
        plan = plan_of(model, self._type(model))
        values = merged_tensors(model.to_read(mx.float32))
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
        _refuse_other_programs_model(model)
        if model.request.adapter is None:
            raise UserError("--to gguf-lora exports an adapter", "Name the run: --adapter RUN")
        _family(model)
        _refuse_more_than_lora(model.unread().model)

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
        for path, layer in attach.adapted_layers(model.unread().model).items():
            updates[path] = Update(to_numpy(layer.lora_a), to_numpy(layer.lora_b), layer.scale)
        return updates

    def storage(self, model: MergedModel) -> str:
        return _storage_of("f32", _family(model))

    @contextmanager
    def run(self, model: MergedModel, work: Path) -> Iterator[Candidate]:
        """On a float32 GGUF of the base, which is made for it and removed again."""
        base = MergedModel(replace(model.request, adapter=None, base_name="base"))
        with tempfile.TemporaryDirectory(dir=work.parent, prefix=".base-") as folder:
            file = Path(folder) / "base.gguf"
            plan_of(base, "f32").write(merged_tensors(base.to_read(mx.float32)), file)
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
        return f"gguf-lora of {len(attach.adapted_layers(model.unread().model))} modules"


def _family(model: MergedModel) -> GgufFamily:
    """What llama.cpp knows of the architecture. Raises UserError for one that it does not know."""
    return by_model_type(metadata.text_of(model.facts.config)["model_type"])


def _refuse_other_programs_model(model: MergedModel) -> None:
    """Raise UserError for a family that llama.cpp, which computes as transformers does, runs as another model."""
    why = families.differs(model.source["config"])
    if why:
        raise UserError(
            f"this model cannot be exported as GGUF: {why}",
            "`mlxtune fuse` makes a merged MLX model, which is what was trained.",
        )


def _refuse_more_than_lora(tuned: nn.Module) -> None:
    """Raise UserError for an adapter with more in it than pairs of factors."""
    more_than_pairs = set(FACTORS) - {"lora_a", "lora_b"}
    beyond = any(name in layer for layer in attach.adapted_layers(tuned).values() for name in more_than_pairs)
    if beyond or attach.layers_in_full(tuned):
        raise UserError(
            "a GGUF adapter holds LoRA and rsLoRA only: neither DoRA nor layers trained in full (lora.train_also)",
            "Export the merged model: --to gguf --type f16 or q8_0.",
        )


def _default_type(model: MergedModel) -> str:
    """`keep` where that is possible, else the floats that the model itself has."""
    if model.request.adapter is None and model.request.base is None:
        return KEEP
    return TYPES_OF_FLOATS.get(model.facts.dtype, "f16")


def plan_of(model: MergedModel, type_: str) -> GgufPlan:
    """What the file of a merged model will hold. Raises UserError for what llama.cpp cannot express."""
    name = model.hub_name or model.request.model.resolve().name
    folder = model.folder
    return GgufPlan.of(
        model.facts.config, model.facts.shapes, type_, folder, name.split("/")[-1], tokenizer_json(folder)
    )


def _fields_of_run(fields: dict[str, Field], model: MergedModel) -> dict[str, Field]:
    """A file's metadata with what the run changed in the model's tokenizer."""
    changes = Changes.read(model.request.adapter)
    if changes.empty:
        return fields
    tokenizer = tokenizer_of(model.folder, model.request.adapter)
    return with_tokenizer_changes(fields, changes, tokenizer.eos_token_id)


def _storage_of(type_: str, family: GgufFamily) -> str:
    """The name of an export's limits in `verify.LIMITS`."""
    if type_ == "f32":
        return "float32, tabled GELU" if family.tabled_gelu else "float32"
    return {"f16": "float16", "bf16": "bfloat16", KEEP: "kept codes"}.get(type_, type_)


def merged_tensors(merged: Merged) -> Iterator[tuple[str, Value]]:
    """(MLX name, codes of an untouched quantized matrix or the merged float32 array) for every tensor."""
    for path, module in merged.leaves():
        codes = _untouched_codes(module)
        if codes is not None:
            yield f"{path}.weight", codes
        for name, array in merged.dense(path, module):
            if codes is None or name != f"{path}.weight":
                yield name, to_numpy(array.astype(mx.float32))


def _untouched_codes(module: nn.Module) -> Codes | None:
    """The codes of a quantized layer without an adapter; None for all others, and where one number scales the whole
    tensor, for which GGUF's blocks have no place.
    """
    if not isinstance(module, QUANTIZED) or module.get("global_scale") is not None:
        return None
    weight = _as_matrix(module.weight)
    scales = _as_matrix(module.scales)
    biases = None if module.get("biases") is None else _as_matrix(module["biases"])
    return Codes(weight, scales, biases, module.bits, module.group_size, module.mode)


def _as_matrix(array: mx.array) -> np.ndarray:
    """[..., columns] -> [rows, columns]: the experts of a stacked layer one below the other."""
    rows = to_numpy(array)
    return rows.reshape(-1, rows.shape[-1])


def _notes_of(plan: GgufPlan) -> list[str]:
    """What a person must know of a file that was written."""
    return [*_of_inexact(plan), *_of_context(plan.fields), *_of_windows(plan)]


def _of_inexact(plan: GgufPlan) -> list[str]:
    inexact = plan.choice.inexact
    if not inexact:
        return []
    tensor, (stored, error) = max(inexact.items(), key=lambda entry: entry[1][1])
    return [
        f"{len(inexact)} tensors have no exact GGUF form; the largest relative error is {error:.1e} "
        f"({tensor} as {stored})"
    ]


def _of_context(fields: dict[str, Field]) -> list[str]:
    """A line where llama.cpp chooses how to rotate by its context: it has two lists of factors then."""
    factor = _ending(fields, "rope.scaling.attn_factor")
    original_context = _ending(fields, "original_context_length")
    if factor is None or original_context is None or _ending(fields, "rope.scaling.type") is not None:
        return []
    return [
        f"llama.cpp rotates by the context that it is given, not by the length of a text: run this model with "
        f"-c {original_context} or less for texts as short as that"
    ]


def _ending(fields: dict[str, Field], ending: str) -> Any:
    """The value of the first key that ends so; None where there is none."""
    for key, field in fields.items():
        if key.endswith(ending):
            return field.value
    return None


def _of_windows(plan: GgufPlan) -> list[str]:
    """A line where layers have a window here, and llama.cpp's architecture has none."""
    window = window_of(plan.config)
    kinds = plan.config.get("layer_types") or ["sliding_attention"]
    written = any("sliding_window" in key for key in plan.fields)
    if not window or written or "sliding_attention" not in kinds:
        return []
    return [f"llama.cpp lets every layer see all of a text: beyond {window} tokens it computes another model"]


def _differing_tokens(
    run: llama_cpp.Runner, folder: Path, adapter: Path | None, examples: Sequence[Example]
) -> list[str]:
    """A line when llama.cpp splits held-out text into other tokens than the model's own tokenizer does. folder: of the
    tokenizer; adapter: the run that may have changed it.
    """
    tokenizer = tokenizer_of(folder, adapter)
    texts = [tokenizer.decode(example.ids) for example in examples[: verify.MAX_ROWS]]
    count = 0
    for text in texts:
        if run.tokenize(text) != tokenizer(text, add_special_tokens=False)["input_ids"]:
            count += 1
    if not count:
        return []
    return [f"llama.cpp splits {count} of {len(texts)} held-out rows into other tokens than the model's tokenizer"]
