"""The artefacts that leave: a fused MLX folder, a Hugging Face model folder, a PEFT adapter.

An export is built under a temporary name, compared with the trained model, and only then given its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlxtune_convert import peft
from mlxtune_convert.configs import unquantized
from mlxtune_convert.families import by_model_type
from mlxtune_convert.files import new_folder, require_space, write_json
from mlxtune_convert.tensors import ShardWriter

from mlxtune.data.chat import Example
from mlxtune.errors import UserError
from mlxtune.model import lora
from mlxtune.model.arrays import dtype_name, to_numpy
from mlxtune.model.convert import UNQUANTIZED_BITS, copy_tokenizer
from mlxtune.model.load import load, source_of
from mlxtune.ship import verify
from mlxtune.ship.merge import Merged, check_base, fuse, open_merged
from mlxtune.ship.verify import Reference, Report, Runner

REPORT_FILE = "verification.json"


@dataclass(frozen=True)
class Request:
    """What to export. model: the folder that was trained on; base: the original 16-bit model, or None to use `model`;
    dtype: of a Hugging Face export, or None for the base's own; base_name: hub id that a PEFT adapter names;
    examples: held-out rows for the proof, or None to go without it."""

    model: Path
    adapter: Path | None
    out: Path
    base: Path | None = None
    dtype: str | None = None
    base_name: str = ""
    examples: Sequence[Example] | None = None
    force: bool = False

    @property
    def sources(self) -> list[Path]:
        return [path for path in (self.model, self.adapter, self.base) if path is not None]


@dataclass(frozen=True)
class ReadBack:
    """The weaker proof where `missing` is not installed: every tensor in the files is bit for bit what it must be."""

    tensors: int
    missing: str = "PEFT"
    verdict: str = "read back"

    def line(self) -> str:
        return f"{self.verdict}: {self.tensors} tensors equal theirs bit for bit ({self.missing} is not installed)"


def to_mlx(request: Request, bits: int) -> Report | None:
    """Write a fused MLX folder; bits 16: dense, else quantized again.

    Raises UserError when what came out is no model (numbers too large for its type) or, at 16 bits, not the trained
    one; nothing is kept then.
    """
    assert request.adapter is not None
    merged = _merged(request)
    if request.examples is not None and bits == UNQUANTIZED_BITS:
        verify.require_memory(merged.count())
    storage = dtype_name(merged.dtype) if bits == UNQUANTIZED_BITS else f"{bits} bits"
    with new_folder(request.out, request.force, request.sources) as work:
        fuse(merged, request.base or request.model, work, bits)
        if request.examples is None:
            return None
        ref = verify.reference(str(request.model), request.adapter, request.examples)
        return _judged(work, ref, verify.mlx_runner(load(str(work), "float32")), "MLX, float32", storage, request)


def to_hf(request: Request) -> Report | None:
    """Write a merged model folder that transformers loads. Raises UserError when the proof fails; nothing is kept
    then.
    """
    source = source_of(request.base or request.model)
    by_model_type(source["config"]["model_type"])
    merged = _merged(request)
    storage = dtype_name(merged.dtype)
    parameters = merged.count()
    if request.examples is not None:
        verify.require_memory(parameters)
    with new_folder(request.out, request.force, request.sources) as work:
        require_space(work, parameters * merged.dtype.size)
        writer = ShardWriter(work, {"format": "pt"})
        for name, array in merged.tensors():
            writer.add(name, to_numpy(array))
        writer.close()
        config = unquantized(source["config"])
        config.pop("torch_dtype", None)
        write_json(work / "config.json", {**config, "dtype": storage})
        copy_tokenizer(request.base or request.model, work)
        _model_card(work, request, source)
        if request.examples is None:
            return None
        ref = verify.reference(str(request.model), request.adapter, request.examples)
        if verify.has_transformers():
            run, name = verify.transformers_runner(work), "transformers, float32"
        else:
            run, name = verify.mlx_runner(load(str(work), "float32")), "MLX, float32 (transformers is not installed)"
        return _judged(work, ref, run, name, storage, request)


def to_peft(request: Request) -> Report | ReadBack | None:
    """Write a PEFT adapter folder. Raises UserError when the proof fails; nothing is kept then."""
    if request.adapter is None:
        raise UserError("--to peft exports an adapter", "Name the run: --adapter RUN")
    source = source_of(request.base or request.model)
    by_model_type(source["config"]["model_type"])
    spec = lora.read_spec(request.adapter)
    tuned = open_merged(request.model, request.adapter)
    factors = {
        path: (to_numpy(layer.lora_a), to_numpy(layer.lora_b)) for path, layer in lora.adapters(tuned.model).items()
    }
    with new_folder(request.out, request.force, request.sources) as work:
        peft.write_adapter(work, factors, spec.scale, spec.dropout, base_name(request, source))
        if request.examples is None:
            return None
        if not verify.has_peft():
            count = peft.check_adapter(work, factors)
            return save_proof(work, ReadBack(count))
        base = open_merged(request.model, None, mx.float32)
        verify.require_memory(base.count())
        ref = verify.reference(str(request.model), request.adapter, request.examples)
        run = verify.peft_runner(base, unquantized(source["config"]), work)
        return _judged(work, ref, run, "PEFT on the dense base, float32", "float32", request)


def save_proof(work: Path, proof: ReadBack) -> ReadBack:
    write_json(work / REPORT_FILE, asdict(proof))
    return proof


def base_name(request: Request, source: dict[str, Any]) -> str:
    """The original model on the hub, or "" when unknown. A repository of MLX-quantized weights is none."""
    return request.base_name or (source["name"] if source["kind"] == "hf" else "")


def _merged(request: Request) -> Merged:
    if request.base is not None:
        check_base(request.base, request.model)
    dtype = getattr(mx, request.dtype) if request.dtype else None
    return open_merged(request.base or request.model, request.adapter, dtype)


def _judged(work: Path, ref: Reference, run: Runner, name: str, storage: str, request: Request) -> Report:
    """Measure, write the report beside the export, and refuse a failed one.

    On another base than the trained one (`--base`), the difference is that of the bases, so it is measured and not
    judged.
    """
    report = verify.measure(ref, run, name, storage if request.base is None else "another base")
    if report.verdict == "failed":
        raise UserError(
            f"the export is not the model that was trained, so it was not kept ({report.line()})",
            "Its type may be too small for its numbers. --no-verify keeps it all the same.",
        )
    write_json(work / REPORT_FILE, report.to_json())
    return report


def _model_card(work: Path, request: Request, source: dict[str, Any]) -> None:
    base = base_name(request, source)
    head = ["---", "library_name: transformers", "tags: [mlxtune]", *([f"base_model: {base}"] if base else []), "---"]
    body = f"A fine-tuned version of {base or 'its base model'}, merged and exported with mlxtune."
    (work / "README.md").write_text("\n".join([*head, "", body, ""]), encoding="utf-8")
