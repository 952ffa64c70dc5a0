"""What `mlxtune-convert` does: adapters and models across the fence between MLX and PyTorch, and the proof of it.

Nothing here needs MLX, PyTorch or a model that runs. An adapter is read back before it gets its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from mlxtune_convert import adapters, tokenizer_changes
from mlxtune_convert.checks import Comparison, compare
from mlxtune_convert.errors import UserError
from mlxtune_convert.files import new_folder, require_space
from mlxtune_convert.gguf import adapter_file, container
from mlxtune_convert.hf import companions, model_folder, mtp
from mlxtune_convert.mlx_folder import MlxFolder, base_of, source_of
from mlxtune_convert.peft import adapter_folder, base_model, crossing
from mlxtune_convert.peft.base_model import Base
from mlxtune_convert.peft.tensors import WEIGHTS_FILE
from mlxtune_convert.sizes import size

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


@dataclass
class Result:
    """What a command did."""

    said: str  # in words
    notes: list[str] = field(default_factory=list)  # what a person must know beside it


def to_peft(source: Path, destination: Path, base_path: Path, base_name: str = "", force: bool = False) -> Result:
    """An MLX adapter folder, or a GGUF adapter file, as a PEFT adapter folder.

    base_path: the model it was trained on, its original, or the config.json of one; base_name: the original on the hub.
    Raises UserError for what PEFT cannot express, or when the adapter is not for this base.
    """
    base = base_of(base_path)
    adapter = read_ours(source, base)
    name = base_name or name_of(base_path) or adapter.base
    theirs = _peft_of(adapter, base, name)
    result = Result("")
    with new_folder(destination, force, [source, base_path]) as work:
        adapter_folder.write_adapter(work, theirs)
        _write_tokenizer(source, base_path, work)
        count = adapter_folder.check_adapter(work, theirs)
    if not name:
        result.notes.append("the adapter names no base model (unknown here); --base-name OWNER/NAME writes it")
    rows = max((len(array) for key, array in theirs.trained.items() if key.startswith(f"{crossing.HEAD}.")), default=0)
    known = model_folder.vocabulary(base.original) or 0
    if rows > known:
        result.notes.append(f"before PEFT loads it, the base needs rows: `base.resize_token_embeddings({rows})`")
    result.said = f"a PEFT adapter of {_layers(theirs)} layers; {count} tensors read back"
    return result


def read_ours(source: Path, base: Base) -> adapter_folder.Adapter:
    """An MLX adapter folder or a GGUF adapter under MLX's names. Raises UserError when it is not for this base."""
    if source.suffix == ".gguf":
        file = container.read(source)
        if not adapter_file.is_adapter(file):
            raise UserError(f"{source} holds no adapter", "Models in GGUF are converted by mlxtune convert.")
        updates, _ = adapter_file.read_adapter(file, base.original)
        adapter = adapter_folder.Adapter(updates)
    else:
        adapter, spec = adapters.read_adapter(source)
        if base.own_head is not None:
            spec.check_head(base.own_head, source)
    crossing.check_fit(adapter, base, source, bool(_changes(source).tokens))
    return adapter


def _changes(source: Path) -> tokenizer_changes.Changes:
    """What an MLX adapter changes in its model's tokenizer; nothing for a file."""
    return tokenizer_changes.Changes.read(source if source.is_dir() else None)


def _peft_of(adapter: adapter_folder.Adapter, base: Base, name: str) -> adapter_folder.Adapter:
    return crossing.to_peft(adapter, base.layout, name, base.own_head)


def name_of(base: Path) -> str:
    """The original model of a folder on the hub, or "" when unknown. A repository of MLX-quantized weights is none."""
    source = source_of(base) if base.is_dir() else {"kind": "", "name": ""}
    return str(source.get("name", "")) if source["kind"] == "hf" else ""


def _write_tokenizer(source: Path, base: Path, work: Path) -> None:
    """Give the folder the tokenizer that the adapter was trained with, where that is not the base's own."""
    changes = _changes(source)
    if changes.empty:
        return
    folder = base if base.is_dir() else base.parent
    if not (folder / tokenizer_changes.TOKENIZER).is_file():
        raise UserError(
            f"{source} was trained with a chat template or tokens of its own, and {folder} has no "
            f"{tokenizer_changes.TOKENIZER} to write them into",
            "Give the model's folder with its tokenizer: --base DIR.",
        )
    companions.copy(folder, work)
    changes.write(work)


def to_mlx(source: Path, destination: Path, base_path: Path | None, force: bool = False) -> Result:
    """A PEFT adapter folder as an MLX adapter folder.

    base_path: the MLX model it is for, its original, or the config.json of one; None: its layers have the same names in
    MLX. Raises UserError naming the key, the tensor or the layer that cannot be carried over.
    """
    notes: list[str] = []
    base = base_model.named(source, notes, _same_function) if base_path is None else _same_function(base_path)
    ours = base_model.read(source, base, notes)
    if base is None:
        notes.append("names and shapes were not compared with a model (--base DIR does)")
    elif base.layers is None:
        notes.append("shapes were not compared: the base's weights are not at hand in MLX's form")
    changes = tokenizer_changes.Changes.of_files(source)
    if base is not None:
        crossing.check_fit(ours, base, source, bool(changes.tokens))
    with new_folder(destination, force, [source, *([base.path] if base is not None else [])]) as work:
        spec = adapters.save_adapter(work, ours, None if base is None else base.blocks)
        if base is not None and base.own_head is not None:
            spec.check_head(base.own_head, source)
        changes.save(work)
        read, _ = adapters.read_adapter(work)
        compared = _compared(read, ours)
        compared.require(source)
    trained_on = f", trained on {spec.base}" if spec.base else ""
    return Result(
        f"an MLX adapter of {_layers(ours)} layers ({spec.variant}{trained_on}); {compared.equal} tensors read back",
        notes,
    )


def _same_function(path: Path) -> Base:
    base = base_of(path)
    base.require_same_function()
    return base


def _layers(adapter: adapter_folder.Adapter) -> int:
    """Layers that are adapted or trained in full; a tied head is no layer of its own."""
    whole = {name.rpartition(".")[0] for name in adapter.trained} - ({crossing.HEAD} if adapter.tied else set())
    return len(adapter.updates) + len(whole)


def to_hf(
    source: Path, destination: Path, base_path: Path | None = None, dtype: str | None = None, force: bool = False
) -> Result:
    """An MLX model folder, quantized or not, as a Hugging Face folder.

    base_path: the original, for the parts that MLX does not have (vision towers, further heads); dtype: None, the
    model's own. Raises UserError for a family that is not covered, or when such parts are needed and not there.
    """
    folder = MlxFolder.open(source)
    folder.require_mlx()
    base = folder.base
    layout, wanted = base.layout, folder.dtype if dtype is None else DTYPES[dtype]
    origin = base_path or source
    dropped = model_folder.dropped_tensors(layout, origin, base.original)
    if base_path is not None and not model_folder.dropped_files(layout, base_path, base.original):
        raise UserError(f"--base has no effect here: MLX has every part of {base_path}", "Leave it out.")
    with new_folder(destination, force, [source, origin]) as work:
        require_space(work, folder.parameters * wanted.itemsize)
        rows = model_folder.vocabulary(folder.config)
        model_folder.write(work, layout, folder.dense(wanted), dropped, base.original, rows, wanted.name)
        left_out = companions.copy(origin, work)
        if base_path is not None:  # what the model here has is its own: another template, added tokens
            companions.copy(source, work)
    written = sum(file.stat().st_size for file in destination.glob("*.safetensors"))
    notes = ["it names code of its own, which was left out: mlxtune convert --trust-remote-code copies it"] * left_out
    return Result(f"a Hugging Face model in {wanted.name}, {size(written)}", notes)


def check(export: Path, source: Path, base_path: Path | None = None, adapter: Path | None = None) -> Result:
    """Compare an export, a PEFT adapter or a Hugging Face folder, with what it was made of, tensor by tensor.

    source: the MLX adapter (or GGUF adapter) of a PEFT adapter, the MLX model of a Hugging Face folder; base_path: as
    in `to_peft`; adapter: what was merged into a Hugging Face folder. Raises UserError when a tensor is another one.
    """
    if (export / WEIGHTS_FILE).is_file():
        if adapter is not None:
            raise UserError("--adapter has no effect here: nothing is merged in a PEFT adapter", "Leave it out.")
        if base_path is None:
            raise UserError("how PEFT names the layers depends on the model's family", "Name the model: --base DIR.")
        base = base_of(base_path)
        expected = _peft_of(read_ours(source, base), base, "")
        return Result(_compared(adapter_folder.read_back(export, expected), expected).require(source))
    if base_path is not None:
        raise UserError("--base has no effect here: it names the model of an adapter", "Leave it out.")
    folder = MlxFolder.open(source)
    folder.require_mlx()
    layout = folder.base.layout
    change = None if adapter is None else read_ours(adapter, folder.base)
    theirs = MlxFolder.open(export)
    tensors = layout.to_hf(folder.dense(theirs.dtype, change), np)
    found = {name: partial(theirs.read, name) for name in theirs.tensors}

    def left_out(name: str) -> bool:
        return layout.is_dropped(name) or mtp.belongs(name, folder.base.original)

    return Result(compare(found, tensors, left_out, change is not None).require(source))


def _compared(adapter: adapter_folder.Adapter, expected: adapter_folder.Adapter) -> Comparison:
    found = {name: partial(np.asarray, array) for name, array in adapter_folder.arrays(adapter).items()}
    return compare(found, adapter_folder.arrays(expected).items())
