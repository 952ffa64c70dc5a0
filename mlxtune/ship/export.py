"""The artefacts that leave: a fused MLX folder, a Hugging Face model folder, a PEFT adapter.

An export is built under a temporary name, compared with the trained model, and only then given its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import mlx.core as mx
import numpy as np
from mlxtune_convert.adapters import AdapterConfig
from mlxtune_convert.files import explained, new_folder, read_json, require_space
from mlxtune_convert.hf import families, model_folder
from mlxtune_convert.hf.configs import SOURCE_FILE, unquantized
from mlxtune_convert.hf.model_folder import vocabulary
from mlxtune_convert.peft import adapter_folder
from mlxtune_convert.peft.settings import Settings

from mlxtune.adapter.peft import from_model
from mlxtune.data.chat.masking import Example
from mlxtune.data.template.tokenizer_changes import Changes
from mlxtune.errors import UserError
from mlxtune.model import reopened
from mlxtune.model.arrays import dtype_name, to_numpy
from mlxtune.model.convert import UNQUANTIZED_BITS, copy_tokenizer
from mlxtune.model.load import load, model_dtype, open_model, source_of
from mlxtune.ship import card, differences, verify
from mlxtune.ship.differences import Trained, Wanted
from mlxtune.ship.gptq import Calibration
from mlxtune.ship.merge import CALIBRATED_BELOW, Merged, check_base, fuse, open_merged
from mlxtune.ship.verify import Reference, Report, Runner, TorchRunner


@dataclass(frozen=True)
class Request:
    """What to export. model: the folder that was trained on; base: the original 16-bit model, or None to use `model`;
    dtype: of a Hugging Face export, or None for the base's own; base_name: hub id that a PEFT adapter names;
    examples: held-out rows for the proof, or None to go without it; calibration: training rows to choose codes by;
    notes: what a person must know of the result, added while it is made."""

    model: Path
    adapter: Path | None
    out: Path
    base: Path | None = None
    dtype: str | None = None
    base_name: str = ""
    examples: Sequence[Example] | None = None
    calibration: Sequence[Example] = ()
    force: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def code(self) -> bool:
        """Whether the .py files that belong to the model may be copied: `convert` was asked to."""
        return bool(source_of(self.model).get("code"))

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


def to_mlx(request: Request, bits: int, group: int | None = None) -> Report | None:
    """Write a fused MLX folder; bits 16: dense, else quantized again in groups of `group` (None: the base's).

    Raises UserError when what came out is no model (numbers too large for its type) or, at 16 bits, not the trained
    one; nothing is kept then.
    """
    assert request.adapter is not None
    merged = merged_of(request)
    if request.examples is not None and bits == UNQUANTIZED_BITS:
        verify.require_memory(merged.count())
    storage = dtype_name(merged.dtype) if bits == UNQUANTIZED_BITS else f"{bits} bits"
    with new_folder(request.out, request.force, request.sources) as work:
        calibration = None
        if bits < CALIBRATED_BELOW and request.calibration:
            calibration = Calibration(str(request.model), request.adapter, request.calibration)
        base = request.base or request.model
        request.notes.extend(fuse(merged, base, work, bits, group, calibration, request.code))
        Changes.read(request.adapter).write(work)
        card.write_generation_config(work, merged.config)
        if request.examples is None:
            reopened.check(work)
            return None
        ref = verify.reference(str(request.model), request.adapter, request.examples)
        run = verify.mlx_runner(load(str(work), "float32"))

        def why() -> str:
            wanted = _fused(request) if bits == UNQUANTIZED_BITS else None
            return differences.of_folder(work, wanted, _trained(request, ref), run, storage)

        return judged(work, ref, run, "MLX, float32", storage, request, why)


def _trained(request: Request, ref: Reference) -> Trained:
    return Trained(str(request.model), request.adapter, ref)


def _fused(request: Request) -> Wanted:
    """What a dense MLX folder should hold."""
    return Wanted(
        lambda dtype: _arrays(_merged_in(request, dtype)),
        lambda: _merged_in(request, mx.float32).tensors(),
        unquantized(merged_of(request).config),
        "A base in bfloat16 or float32 holds them (--base), and so does `mlxtune export --to hf --dtype float32`.",
    )


def _arrays(merged: Merged) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, to_numpy(array)) for name, array in merged.tensors())


def _merged_in(request: Request, dtype: mx.Dtype) -> Merged:
    return replace(merged_of(request), dtype=dtype)


def to_hf(request: Request) -> Report | None:
    """Write a merged model folder that transformers loads. Raises UserError when the proof fails; nothing is kept
    then.
    """
    folder = request.base or request.model
    source = source_of(folder)
    layout = families.by_model_type(source["config"])
    dropped = model_folder.dropped_tensors(layout, folder, source["config"])
    merged = merged_of(request)
    storage = dtype_name(merged.dtype)
    parameters = merged.count()
    if request.examples is not None:
        verify.require_memory(parameters)
    with new_folder(request.out, request.force, request.sources) as work:
        require_space(work, parameters * merged.dtype.size)
        tensors = ((name, to_numpy(array)) for name, array in merged.tensors())
        rows = vocabulary(merged.config)
        config = model_folder.write(work, layout, tensors, dropped, source["config"], rows, storage, request.code)
        request.notes.extend(copy_tokenizer(folder, work, request.code))
        Changes.read(request.adapter).write(work)
        card.write_generation_config(work, config)
        card.write(work, "transformers", base_name(request, source), card.licence_of(folder), request.adapter)
        if request.examples is None:
            return None
        ref = verify.reference(str(request.model), request.adapter, request.examples)
        run, name = _hf_runner(work)

        def why() -> str:
            return differences.of_folder(work, _as_hf(request), _trained(request, ref), run, storage)

        return judged(work, ref, run, name, storage, request, why)


def _as_hf(request: Request) -> Wanted:
    """What a Hugging Face folder should hold."""
    config = source_of(request.base or request.model)["config"]
    layout = families.by_model_type(config)
    return Wanted(
        lambda dtype: layout.to_hf(_arrays(_merged_in(request, dtype)), np),
        lambda: _merged_in(request, mx.float32).tensors(),
        unquantized(config),
        f"--dtype {'bfloat16 or ' if request.dtype != 'bfloat16' else ''}float32 holds them.",
    )


def _hf_runner(folder: Path) -> tuple[Runner, str]:
    why = "transformers is not installed"
    if verify.has_transformers():
        try:
            return verify.transformers_runner(folder), "transformers, float32"
        except ImportError as error:  # a tower in another library, as Gemma 3n's in timm
            why = f"transformers needs more for it: {shorten(str(error), 100, placeholder=' ...')}"
    return verify.mlx_runner(load(str(folder), "float32")), f"MLX, float32 ({why})"


def to_peft(request: Request) -> Report | ReadBack | None:
    """Write a PEFT adapter folder. Raises UserError when the proof fails; nothing is kept then."""
    if request.adapter is None:
        raise UserError("--to peft exports an adapter", "Name the run: --adapter RUN")
    source = source_of(request.model)
    families.by_model_type(source["config"])  # refuses before any work
    tuned = open_merged(request.model, request.adapter)
    saved = AdapterConfig.read(request.adapter)
    adapter = from_model(tuned.model, saved, source["config"], base_name(request, source) or saved.base)
    changes, rows, note = Changes.read(request.adapter), vocabulary(tuned.config), ""
    with new_folder(request.out, request.force, request.sources) as work:
        adapter_folder.write_adapter(work, adapter)
        if changes != Changes():
            request.notes.extend(copy_tokenizer(request.model, work, request.code))
            changes.write(work)
            note = "Its tokenizer is here; answers end at `generate(..., eos_token_id=tokenizer.eos_token_id)`."
        if rows != vocabulary(source["config"]):
            note += (
                f" Before PEFT loads it, the base needs rows for new tokens: `base.resize_token_embeddings({rows})`."
            )
        card.write(work, "peft", adapter.base, card.licence_of(request.model), request.adapter, note)
        count = adapter_folder.check_adapter(work, adapter)
        if request.examples is None:
            return None
        if not verify.has_peft():
            return save_proof(work, ReadBack(count))
        run = _peft_runner(request.model, work)
        ref = verify.reference(str(request.model), request.adapter, request.examples)
        why = partial(
            differences.of_peft, _trained(request, ref), run, lambda: adapter_folder.check_adapter(work, adapter)
        )
        return judged(work, ref, run, "PEFT on the dense base, float32", "float32", request, why)


def _peft_runner(model: Path, folder: Path) -> TorchRunner:
    config = source_of(model)["config"]
    base = open_merged(model, None, mx.float32)
    verify.require_memory(base.count())
    state = families.by_model_type(config).to_hf(((name, to_numpy(array)) for name, array in base.tensors()), np)
    return verify.peft_runner(dict(state), unquantized(config), folder)


def check(export: Path, model: Path, adapter: Path | None, examples: Sequence[Example]) -> tuple[Report, str]:
    """Compare an artefact that is already there with the trained model, and write the report into it. Returns it with
    what differs, "" when nothing does.

    Raises UserError for a folder that is no export, or whose runtime is not installed.
    """
    if not export.is_dir():
        raise UserError(f"no folder {export}", "Name what fuse or export wrote.")
    request = Request(model, adapter, export, examples=examples)
    run, name, storage, why = _opened(export, request)
    ref = verify.reference(str(model), adapter, examples)
    report = verify.measure(ref, run, name, storage)
    with explained(export):
        report.write(export)
    if report.verdict == "lossy":
        return report, "Codes of more bits lose less (fuse --bits 8 or 16), and the adapter beside its base nothing."
    return report, differences.told(lambda: why(ref)) if report.verdict == "failed" else ""


def _opened(export: Path, request: Request) -> tuple[Runner, str, str, Callable[[Reference], str]]:
    """An artefact's run, what runs it, its type, and what finds out why it is not the trained model."""
    if (export / adapter_folder.WEIGHTS_FILE).is_file():
        if not verify.has_peft():
            raise UserError("PEFT adapters are run by PEFT, which is not installed", "pip install torch peft")
        Settings.read(export)  # PEFT is given no key that we do not know: some name modules that it would import
        torch = _peft_runner(request.model, export)

        def of_adapter(ref: Reference) -> str:
            check = partial(_check_adapter, export, request)
            return differences.of_peft(_trained(request, ref), torch, check)

        return torch, "PEFT on the dense base, float32", "float32", of_adapter
    if not (export / "config.json").is_file():
        raise UserError(f"{export} is neither a model folder nor a PEFT adapter", "Name what fuse or export wrote.")
    opened, config = open_model(export)
    verify.require_memory(Merged(opened, config, mx.float32).count())
    quantization = config.get("quantization")
    storage = f"{quantization['bits']} bits" if quantization else dtype_name(model_dtype(opened))
    if source_of(export)["kind"] == "hf" and not (export / SOURCE_FILE).is_file():
        run, name = _hf_runner(export)
        holds = _as_hf
    else:
        run, name = verify.mlx_runner(load(str(export), "float32")), "MLX, float32"
        holds = _fused

    def of_folder(ref: Reference) -> str:
        wanted = None if quantization else holds(replace(request, dtype=storage))
        return differences.of_folder(export, wanted, _trained(request, ref), run, storage)

    return run, name, storage, of_folder


def _check_adapter(folder: Path, request: Request) -> None:
    """Raise UserError where a PEFT adapter's tensors are not those of the run."""
    if request.adapter is None:
        raise UserError("there is no run to compare them with: --adapter RUN")
    tuned = open_merged(request.model, request.adapter)
    source = source_of(request.model)
    adapter_folder.check_adapter(
        folder, from_model(tuned.model, AdapterConfig.read(request.adapter), source["config"], "")
    )


def save_proof(work: Path, proof: ReadBack) -> ReadBack:
    verify.write_report(work, asdict(proof))
    return proof


def base_name(request: Request, source: dict[str, Any]) -> str:
    """The original model on the hub, or "" when unknown. A repository of MLX-quantized weights is none."""
    return request.base_name or (source["name"] if source["kind"] == "hf" else "")


def names_base(adapter: Path) -> bool:
    """Whether a PEFT adapter says which model it is for."""
    return bool(read_json(adapter / adapter_folder.CONFIG_FILE, "a PEFT adapter").get("base_model_name_or_path"))


def merged_of(request: Request) -> Merged:
    """The model of a request with its adapter folded in. Raises UserError when `base` is another model."""
    if request.base is not None:
        check_base(request.base, request.model)
    dtype = getattr(mx, request.dtype) if request.dtype else None
    return open_merged(request.base or request.model, request.adapter, dtype)


def judged(
    work: Path, ref: Reference, run: Runner, name: str, storage: str, request: Request, why: Callable[[], str]
) -> Report:
    """Measure, write the report beside the export, and refuse a failed one with what `why` finds out.

    On another base than the trained one (`--base`), the difference is that of the bases, so it is measured and not
    judged.
    """
    report = verify.measure(ref, run, name, storage if request.base is None else "another base")
    if report.verdict == "failed":
        raise UserError(
            f"the export is not the model that was trained, so it was not kept ({report.line()})",
            f"{differences.told(why)} --no-verify keeps it all the same.",
        )
    report.write(work)
    return report
