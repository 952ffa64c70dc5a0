"""A GGUF model out of an MLX model, with or without an adapter; and the proof by llama.cpp."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlxtune_convert.files import new_artefact, require_space
from mlxtune_convert.gguf import adapter_file, container, ggml, metadata, tokenizer_write
from mlxtune_convert.gguf.architectures import by_model_type
from mlxtune_convert.gguf.container import Field, File, Writer
from mlxtune_convert.gguf.family import Family
from mlxtune_convert.gguf.model_read import HEADER_FILE
from mlxtune_convert.gguf.quant_blocks import Codes
from mlxtune_convert.gguf.tensor_types import KEEP, TYPES, Choice, columns_moved, gguf_shape
from mlxtune_convert.gguf.tokenizer_read import CONTROL
from mlxtune_convert.hf import chat_templates, families
from mlxtune_convert.peft.adapter_folder import Update

from mlxtune.adapter import attach
from mlxtune.compute.fit_memory import window_of
from mlxtune.data.chat.masking import Example
from mlxtune.data.template.tokenizer import tokenizer_json
from mlxtune.data.template.tokenizer_changes import Changes, tokenizer_of
from mlxtune.errors import UserError, did_you_mean
from mlxtune.model.arrays import to_numpy
from mlxtune.model.dense import QUANTIZED
from mlxtune.model.load import source_of
from mlxtune.ship import differences, llama_cpp, modelfile, verify
from mlxtune.ship.export import ReadBack, Request, base_name, judged, merged_of, save_proof
from mlxtune.ship.merge import Merged, open_merged
from mlxtune.ship.verify import Report

MODEL_FILE = "model.gguf"
Progress = Callable[[int, int], None]  # weights done, weights in all


@dataclass(frozen=True)
class Exported:
    """proof: None when it was refused; notes: lines a person must read."""

    what: str
    proof: Report | ReadBack | None
    notes: list[str]
    bytes: int = 0


def default_type(request: Request) -> str:
    """`keep` where that is possible, else the floats that the model itself has."""
    if request.adapter is None and request.base is None:
        return KEEP
    return {mx.float32: "f32", mx.bfloat16: "bf16"}.get(merged_of(request).dtype, "f16")


def ship(request: Request, target: str, kind: str | None, ollama: bool, progress: Progress | None = None) -> Exported:
    """Export to `request.out`, a .gguf file or a folder. target: gguf or gguf-lora.

    Raises UserError for anything wrong with the request, and when the proof fails; nothing is kept then.
    """
    if kind is not None and kind not in TYPES:
        raise UserError(
            f"--type {kind} is not known",
            did_you_mean(kind, TYPES),
        )
    why = families.differs(source_of(request.base or request.model)["config"])
    if why:  # llama.cpp computes as transformers does
        raise UserError(
            f"this model cannot be exported as GGUF: {why}",
            "`mlxtune fuse` makes a merged MLX model, which is what was trained.",
        )
    with new_artefact(request.out, MODEL_FILE, request.force, request.sources) as work:
        if target == "gguf-lora":
            done = to_lora(request, work)
        else:
            done = to_gguf(request, kind or default_type(request), work, progress)
        if ollama:
            done.notes.extend(modelfile.write(request, work, MODEL_FILE, target == "gguf-lora"))
        return replace(done, bytes=(work / MODEL_FILE).stat().st_size)


def to_lora(request: Request, work: Path) -> Exported:
    """Write the adapter alone, to be used beside a GGUF of the base it was trained on. Raises UserError when llama.cpp
    cannot apply it, or the proof on a float32 GGUF of the base fails.
    """
    if request.adapter is None:
        raise UserError("--to gguf-lora exports an adapter", "Name the run: --adapter RUN")
    tuned = open_merged(request.model, request.adapter)
    config = metadata.text_of(tuned.config)
    family = by_model_type(config["model_type"])
    if attach.layers_in_full(tuned.model) or any("m" in layer for layer in attach.adapted_layers(tuned.model).values()):
        raise UserError(
            "a GGUF adapter holds LoRA and rsLoRA only: neither DoRA nor layers trained in full (lora.train_also)",
            "Export the merged model: --to gguf --type f16 or q8_0.",
        )
    layers = attach.adapted_layers(tuned.model).items()
    updates = {path: Update(to_numpy(layer.lora_a), to_numpy(layer.lora_b), layer.scale) for path, layer in layers}
    path = work / MODEL_FILE
    adapter_file.write_adapter(path, family, config, updates, base_name(request, source_of(request.model)))
    what = f"gguf-lora of {len(updates)} modules"
    if request.examples is None:
        return Exported(what, None, [])

    def back() -> int:
        tensors = adapter_file.adapter_tensors(family, config, updates)
        return container.read_back(path, ((name, "F32", array) for name, array in tensors.items()))

    if not llama_cpp.installed():
        return Exported(what, save_proof(work, ReadBack(back(), missing=ggml.PACKAGE)), [])
    base = open_merged(request.model, None, mx.float32)
    verify.require_memory(base.count())
    ref = verify.reference(str(request.model), request.adapter, request.examples)
    with tempfile.TemporaryDirectory(dir=work.parent, prefix=".base-") as folder:
        whole = Path(folder) / "base.gguf"
        Plan.of(base, "f32", request.model, "base").write(base, whole)
        with llama_cpp.runner(whole, path) as run:
            trained = differences.Trained(str(request.model), request.adapter, ref)
            why = partial(differences.of_gguf, "f32", back, trained, run)
            proof = judged(work, ref, run, "llama.cpp on the float32 base", _storage("f32", family), request, why)
    return Exported(what, proof, [])


def compare_tokens(run: llama_cpp.Runner, tokenizer: Any, examples: Sequence[Example]) -> list[str]:
    """A line when llama.cpp splits held-out text into other tokens than the model's own tokenizer does."""
    texts = [tokenizer.decode(example.ids) for example in examples[: verify.MAX_ROWS]]
    differing = [text for text in texts if run.tokenize(text) != tokenizer(text, add_special_tokens=False)["input_ids"]]
    if not differing:
        return []
    return [
        f"llama.cpp splits {len(differing)} of {len(texts)} held-out rows into other tokens than the model's tokenizer"
    ]


def _storage(kind: str, family: Family) -> str:
    """The name of an export's limits in `verify.LIMITS`."""
    float32 = "float32, tabled GELU" if family.tabled_gelu else "float32"
    return {"f32": float32, "f16": "float16", "bf16": "bfloat16", KEEP: "kept codes"}.get(kind, kind)


def to_gguf(request: Request, kind: str, work: Path, progress: Progress | None = None) -> Exported:
    """Write `work`/model.gguf. kind: of gguf_export.TYPES. Raises UserError when llama.cpp does not know the model, or
    the proof fails.
    """
    if kind == KEEP and request.adapter is not None:
        raise UserError(
            "--type keep cannot take an adapter: merging changes the weights, and their codes with them",
            "Ship the adapter beside the kept base (--to gguf-lora), or merge with --type f16 or q8_0.",
        )
    merged = replace(merged_of(request), dtype=mx.float32)
    name = base_name(request, source_of(request.base or request.model)) or request.model.resolve().name
    plan = Plan.of(merged, kind, request.base or request.model, name.split("/")[-1])
    tokenizer, changes = tokenizer_of(request.base or request.model, request.adapter), Changes.read(request.adapter)
    if changes.chat_template:
        for key in [key for key in plan.fields if key.startswith(chat_templates.GGUF_KEY)]:
            del plan.fields[key]
        plan.fields.update(chat_templates.fields(chat_templates.by_name(changes.chat_template)))
    if changes.eos_token:
        plan.fields["tokenizer.ggml.eos_token_id"] = Field.of(tokenizer.eos_token_id)
    tokens, types = (plan.fields[f"tokenizer.ggml.{key}"].value for key in ("tokens", "token_type"))
    for token, index in changes.tokens.items():
        if tokens[index] != token:  # a row without a token so far
            tokens[index], types[index] = token, CONTROL
    plan.write(merged, work / MODEL_FILE, progress)
    inexact = plan.choice.inexact
    notes = []
    if inexact:
        tensor, (stored, error) = max(inexact.items(), key=lambda entry: entry[1][1])
        notes.append(
            f"{len(inexact)} tensors have no exact GGUF form; the largest relative error is {error:.1e} "
            f"({tensor} as {stored})"
        )
    notes += _of_context(plan.fields) + _of_windows(plan)
    if request.examples is None:
        return Exported(f"gguf {kind}", None, notes)

    def back() -> int:
        return container.read_back(work / MODEL_FILE, plan.tensors(replace(merged_of(request), dtype=mx.float32)))

    if not llama_cpp.installed():
        return Exported(f"gguf {kind}", save_proof(work, ReadBack(back(), missing=ggml.PACKAGE)), notes)
    verify.require_memory(merged_of(request).count())
    ref = verify.reference(str(request.model), request.adapter, request.examples)
    storage = _storage(kind, plan.family)
    with llama_cpp.runner(work / MODEL_FILE) as run:
        notes += compare_tokens(run, tokenizer, request.examples)
        trained = differences.Trained(str(request.model), request.adapter, ref)
        why = partial(differences.of_gguf, kind, back, trained, run)
        proof = judged(work, ref, run, f"llama.cpp, {kind}", storage, request, why)
        return Exported(f"gguf {kind}", proof, notes)


def _of_windows(plan: Plan) -> list[str]:
    """A line where layers have a window here, and llama.cpp's architecture has none."""
    window = window_of(plan.config)
    kinds = plan.config.get("layer_types") or ["sliding_attention"]
    if not window or "sliding_attention" not in kinds or any("sliding_window" in key for key in plan.fields):
        return []
    return [f"llama.cpp lets every layer see all of a text: beyond {window} tokens it computes another model"]


def _of_context(fields: dict[str, Field]) -> list[str]:
    """A line where llama.cpp chooses how to rotate by its context: it has two lists of factors then."""
    original = next((field.value for key, field in fields.items() if key.endswith("rope.scaling.attn_factor")), None)
    known = next((field.value for key, field in fields.items() if key.endswith("original_context_length")), None)
    if original is None or known is None or any(key.endswith("rope.scaling.type") for key in fields):
        return []
    return [
        f"llama.cpp rotates by the context that it is given, not by the length of a text: run this model with "
        f"-c {known} or less for texts as short as that"
    ]


@dataclass(frozen=True)
class Plan:
    """What a GGUF file will hold: its family, types, metadata, and the shape of every tensor in order."""

    family: Family
    choice: Choice
    config: dict[str, Any]
    fields: dict[str, Field]
    shapes: dict[str, tuple[int, ...]]
    original: File | None

    @staticmethod
    def of(merged: Merged, kind: str, source: Path, name: str) -> Plan:
        """source: the folder of tokenizer and header. Raises UserError for what llama.cpp cannot express."""
        config = metadata.text_of(merged.config)
        family = by_model_type(config["model_type"])
        names = {family.gguf_name(mlx): shape for mlx, shape in merged.shapes().items()}
        shapes = {name: gguf_shape(name, shape) for name, shape in names.items()}
        shapes |= {name: table.shape for name, table in metadata.rope_tensors(config).items()}
        header = source / HEADER_FILE
        original = container.read(header, header_only=True) if header.is_file() else None
        choice = Choice.of(kind, config, "output.weight" not in shapes, original)
        fields = {
            "general.architecture": Field.of(family.gguf),
            "general.type": Field.of("model"),
            "general.name": Field.of(name),
            "general.file_type": Field.of(0),
            "general.quantization_version": Field.of(2),
            **metadata.metadata(family, config),
            **tokenizer_write.fields(source, shapes["token_embd.weight"][0], tokenizer_json(source)),
        }
        return Plan(family, choice, config, overlaid(original, fields) if original else fields, shapes, original)

    def tensors(self, merged: Merged) -> Iterator[tuple[str, str, np.ndarray]]:
        """(name, type, rows) of every tensor as the file holds it."""
        for name, table in metadata.rope_tensors(self.config).items():
            yield name, "F32", table
        for mlx, value in values(merged):
            name = self.family.gguf_name(mlx)
            if isinstance(value, np.ndarray):
                value = self.family.written(name, value).reshape(self.shapes[name])
            value = columns_moved(value, self.family.column_order(name, self.config))
            order = self.family.row_order(name, self.config, self.shapes[name][0])
            yield name, *self.choice.store(name, value, order, self.shapes[name])

    def write(self, merged: Merged, path: Path, progress: Progress | None = None) -> None:
        total = sum(math.prod(shape) for shape in self.shapes.values())
        require_space(
            path.parent, int(total * {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.1}.get(self.choice.type, 0.8))
        )
        done = 0
        with Writer(path, self.fields, self.shapes) as writer:
            for name, kind, rows in self.tensors(merged):
                writer.add(name, kind, rows)
                done += math.prod(self.shapes[name])
                if progress:
                    progress(done, total)
            kinds = {name: tensor.kind for name, tensor in writer.tensors.items()}
            if not self.original or kinds != {name: t.kind for name, t in self.original.tensors.items()}:
                self.fields["general.file_type"] = Field.of(self.choice.file_type)


def overlaid(original: File, fields: dict[str, Field]) -> dict[str, Field]:
    """The metadata of the GGUF file that a model came from, with the values that its folder now says otherwise."""
    out = dict(original.fields)
    same_tokens = out.get("tokenizer.ggml.tokens") == fields["tokenizer.ggml.tokens"]
    for key, field in fields.items():
        if key not in out:
            if key.startswith("tokenizer.") and key.endswith(("_token_id", "template")):
                out[key] = field
            continue
        kept = key.startswith("general.") or _same(out[key].value, field.value)
        # The file's own scores, types and rules' name, unless the vocabulary changed.
        kept |= same_tokens and key.endswith((".scores", ".token_type", ".pre", "add_space_prefix"))
        if not kept:
            out[key] = field._replace(kind=out[key].kind)
    return out


def _same(one: Any, other: Any) -> bool:
    return bool(np.float32(one) == np.float32(other)) if isinstance(one, float) else bool(one == other)


def values(merged: Merged) -> Iterator[tuple[str, Codes | np.ndarray]]:
    """(MLX name, codes of an untouched quantized matrix or the merged float32 array) for every tensor."""
    for path, module in merged.leaves():
        plain = isinstance(module, QUANTIZED) and module.get("global_scale") is None
        if plain:
            parts = [to_numpy(module[key]) for key in ("weight", "scales", "biases") if module.get(key) is not None]
            flat = [part.reshape(-1, part.shape[-1]) for part in parts]
            biases = flat[2] if len(flat) > 2 else None
            yield f"{path}.weight", Codes(flat[0], flat[1], biases, module.bits, module.group_size, module.mode)
        for name, array in merged.dense(path, module):
            if not (plain and name == f"{path}.weight"):
                yield name, to_numpy(array.astype(mx.float32))
