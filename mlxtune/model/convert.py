"""SRC (hub id, Hugging Face folder, MLX folder, GGUF file) -> an MLX model folder that `mlx_lm.load` loads."""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlxtune_convert.adapters import save_adapter
from mlxtune_convert.files import json_text, new_folder, read_json, require_space, write_json
from mlxtune_convert.foreign.folder import Opened, open_foreign, write
from mlxtune_convert.foreign.method import of_folder, of_mxfp4
from mlxtune_convert.gguf import adapter_file, container, model_read
from mlxtune_convert.hf import companions
from mlxtune_convert.hf.configs import QUANTIZATION_KEYS, SOURCE_FILE, unquantized
from mlxtune_convert.peft.adapter_folder import Adapter
from mlxtune_convert.tensors import ShardWriter, weights_of

from mlxtune.data.template.tokenizer import MODEL_FOLDER, load_tokenizer, require_config, tokenizer_json
from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.model import reopened
from mlxtune.model.arrays import named, to_numpy
from mlxtune.model.corrections import corrected
from mlxtune.model.dense import QUANTIZED, dequantize_model
from mlxtune.model.hub import resolve
from mlxtune.model.load import cast, model_dtype, open_model, source_of
from mlxtune.model.mlx_lm_classes import require_known

# The bits and group sizes of each mode, the default first.
MODES = {
    "affine": ((4, 1, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
UNQUANTIZED_BITS = 16  # what a user types for "not quantized"
TOKENIZER_FILE = "tokenizer.json"
CODE_LEFT_OUT = "the model names code of its own (auto_map), which is left out with the keys that name it"


@dataclass(frozen=True)
class Quantization:
    """What the weights become, by --bits, --group-size and --mode.

    options        bits  requantize  a dense source     a quantized source
    (none)         4     no          quantized          its codes are kept
    --bits 4       4     yes         quantized          dequantized, quantized again
    --bits 16      None  yes         stays as it is     dequantized
    """

    # Bits of each weight; None: dense.
    bits: int | None
    # Neighbours in a row that share a scale; 0 where bits is None.
    group_size: int
    # Of MODES; "" where bits is None.
    mode: str
    # Whether a source that is quantized already is done anew: the user named at least one of the options.
    requantize: bool

    @staticmethod
    def of(bits: int | None, group_size: int | None, mode: str | None) -> Quantization:
        """Resolve the three options, None: not given. Raises UserError for a contradiction."""
        requantize = any(option is not None for option in (bits, group_size, mode))
        if bits == UNQUANTIZED_BITS:
            if group_size is not None or mode is not None:
                raise UserError("--bits 16 means not quantized, so --group-size and --mode have no meaning with it")
            return Quantization(None, 0, "", requantize)
        mode = mode or "affine"
        all_bits, all_groups = MODES[mode]
        bits = bits or all_bits[0]
        group_size = all_groups[0] if group_size is None else group_size
        if bits not in all_bits or group_size not in all_groups:
            bits_text, groups_text = (", ".join(map(str, sorted(known))) for known in MODES[mode])
            raise UserError(
                f"--bits {bits} --group-size {group_size} does not exist for --mode {mode}",
                f"Bits: {bits_text}; group sizes: {groups_text}.",
            )
        return Quantization(bits, group_size, mode, requantize)

    @property
    def dense(self) -> bool:
        """Whether the weights are not to be quantized."""
        return self.bits is None

    @property
    def share(self) -> float:
        """Bytes of a quantized model in those of its 16-bit floats, on the high side: each group has a scale and an
        offset of 16 bits.
        """
        if self.bits is None:
            return 1.0
        return (self.bits + 32 / self.group_size) / 16 * 1.1


@dataclass(frozen=True)
class Converted:
    """What was written."""

    # Of the weights.
    total_bytes: int
    # For each number of the original model.
    bits_per_weight: float
    # Lines that a person must read.
    notes: list[str]


@dataclass(frozen=True)
class Wanted:
    """What a conversion is to do with a source, whatever its kind."""

    # What the weights become.
    quantization: Quantization
    # Type of what is not quantized, such as "bfloat16"; None: the source's.
    dtype: str | None = None
    # Whether the model's own .py files, which are never run here, go along.
    code: bool = False


def convert(
    source: str,
    destination: Path,
    quantization: Quantization,
    dtype: str | None = None,
    force: bool = False,
    base: Path | None = None,
    code: bool = False,
) -> Converted:
    """Convert any source into `destination`, which appears only when it is complete and a few tokens ran through it.

    base: the model that a GGUF adapter belongs to; dtype, code: as in `Wanted`. Raises UserError for anything wrong
    with the source, the options or the disk.
    """
    backend.prepare()
    path = resolve(source, code)
    if code and (path.is_file() or not companions.code_of(path)):
        raise UserError(f"--trust-remote-code has no effect: {source} names no code of its own", "Leave it out.")
    if path.is_file() and path.suffix != ".gguf" and not container.is_gguf(path):  # Ollama's have no ending
        raise UserError(f"{path}: a model file must be a .gguf", "A Hugging Face model is given as its folder.")
    wanted = Wanted(quantization, dtype, code)
    # The kinds of source. Each writes into a folder that gets its name at the end.
    if path.is_file() and adapter_file.is_adapter(file := container.read(path)):
        if quantization.requantize or dtype is not None:
            raise UserError(f"{path} is an adapter: its factors are kept as they are", "Leave out --bits and --dtype.")
        with new_folder(destination, force, [path, *([base] if base is not None else [])]) as work:
            return _from_gguf_adapter(file, base, work)
    if base is not None:
        raise UserError("--base has no effect here", "It names the model that a GGUF adapter belongs to.")
    if path.is_file():
        opened = model_read.open_gguf(path)
        require_space(destination, opened.converted_bytes)
        with new_folder(destination, force, [path]) as work:
            return _from_gguf(opened, path, work, wanted)
    foreign = _foreign(path, wanted)
    if foreign is not None:
        require_space(destination, foreign.converted_bytes + _result_bytes(foreign, quantization))
    with new_folder(destination, force, [path]) as work:
        if foreign is not None:
            return _from_foreign(foreign, _hub_id(source), work, wanted)
        return _from_folder(path, _hub_id(source), work, wanted)


def _from_gguf_adapter(file: container.File, base: Path | None, work: Path) -> Converted:
    """An adapter in a GGUF file -> an MLX adapter folder. base: the model that it belongs to."""
    config = read_json(base / "config.json", "the base model") if base else None
    updates, layers = adapter_file.read_adapter(file, config)
    saved = save_adapter(work, Adapter(updates), layers)
    return Converted((work / saved.file).stat().st_size, 32.0, [])


def _from_gguf(opened: model_read.Gguf, path: Path, work: Path, wanted: Wanted) -> Converted:
    """A GGUF model: its codes as they are, or, where something was asked for, what any folder becomes."""
    if opened.quantized and not wanted.quantization.requantize and wanted.dtype is None:
        model_read.convert(opened, work)
        reopened.check(work)
        return _measured(work, opened.notes())
    lossless = work / "lossless"
    lossless.mkdir()
    model_read.convert(opened, lossless)
    out = _from_own_folder(lossless, path, "", work, wanted)
    if opened.notes():
        out.notes.append("the GGUF was already quantized: quantizing it again is lossy")
    return out


def _from_own_folder(made: Path, source: Path, name: str, work: Path, wanted: Wanted) -> Converted:
    """Convert a folder that was made on the way from a source, and remove it. name: hub id, or "".

    A person knows the source, not the folder: a UserError names the former.
    """
    try:
        out = _from_folder(made, name, work, wanted)
    except UserError as error:
        raise UserError(error.message.replace(str(made), str(source)), error.hint) from error
    shutil.rmtree(made)
    return out


def _hub_id(source: str) -> str:
    """What the user named, where that is no path."""
    return "" if Path(source).expanduser().exists() else source


def _foreign(path: Path, wanted: Wanted) -> Opened | None:
    """A folder that another maker's tool quantized, understood; None for any other. Raises UserError where it cannot be
    read, or is of a type that mlx-lm does not know.
    """
    require_config(path)
    config = read_json(path / "config.json", MODEL_FOLDER)
    foreign = of_folder(path, config)
    if foreign is None:
        return None
    opened = open_foreign(foreign, keep=not wanted.quantization.requantize, dtype=wanted.dtype)
    require_known(path, unquantized(config))  # before hours of work, not after
    load_tokenizer(path)
    return opened


def _result_bytes(opened: Opened, quantization: Quantization) -> int:
    """Bytes that what is made of the floats will take."""
    if opened.kept:
        return opened.converted_bytes
    return int(opened.converted_bytes * quantization.share)


def _from_foreign(opened: Opened, name: str, work: Path, wanted: Wanted) -> Converted:
    """The floats in a folder of their own, then what any folder becomes. name: hub id, or ""."""
    plain = work / "plain"
    plain.mkdir()
    write(opened, plain)
    out = _from_own_folder(plain, opened.foreign.folder, name, work, wanted)
    bits = wanted.quantization.bits
    out.notes.insert(0, opened.note(UNQUANTIZED_BITS if bits is None else bits))
    return out


def _from_folder(path: Path, name: str, work: Path, wanted: Wanted) -> Converted:
    """A model folder of Hugging Face's or ours. name: hub id, or "".

    The steps: open, dequantize where the source is to be done anew, change the type, quantize, write, open again.
    """
    original = read_json(path / "config.json", MODEL_FOLDER)
    quantization = wanted.quantization
    weights = weights_of(path)
    require_space(work, _estimate(weights.files, original, quantization))
    model, config = open_model(path)
    load_tokenizer(path)  # nothing is written without one
    notes = [*weights.notes, *corrected.notes(model, config)]
    quantized = bool(config.get("quantization"))
    own = dict.fromkeys(QUANTIZATION_KEYS, config["quantization"]) if quantized else {}
    config = unquantized(config) | own  # nothing that another maker's tool declared, and no empty entries
    if quantized and not quantization.requantize and of_mxfp4(original):
        notes.append("MXFP4: its codes are kept; what it left unquantized stays so (--bits 4 quantizes all anew)")
    if quantized and quantization.requantize:
        how = "" if quantization.dense else " and quantized again, which is lossy"
        notes.append(f"the source was already quantized: its weights are dequantized{how}")
        model, config = dequantize_model(model), unquantized(config)  # rounds to the scales' type, as MLX would
        quantized = False
    if wanted.dtype is not None:
        _change_type(model, wanted.dtype, quantized)
    if not quantized and not quantization.dense:
        model, config = quantized_model(model, config, quantization, notes)
    _save_weights(model, work)
    origin = source_of(path)
    if not (path / SOURCE_FILE).is_file():
        origin |= {"name": name, "config": unquantized(original)}
    write_config(work, config, origin, wanted.code)
    for note in copy_tokenizer(path, work, wanted.code):
        notes.append(f"{note}; --trust-remote-code copies it")
    was_quantized = any(key in original for key in QUANTIZATION_KEYS)
    same_numbers = quantization.dense and wanted.dtype is None and not was_quantized
    reopened.check(work, path if same_numbers else None)
    return _measured(work, notes)


def _change_type(model: nn.Module, dtype: str, quantized: bool) -> None:
    """Give what is not quantized another type. Raises UserError where that would change what codes stand for."""
    wanted = getattr(mx, dtype)
    if quantized and wanted not in (model_dtype(model), mx.float32):
        raise UserError(
            f"--dtype {dtype} would round the scales of this quantized source", "Add --bits to requantize it."
        )
    cast(model, wanted)


def quantized_model(
    model: nn.Module, config: dict[str, Any], quantization: Quantization, notes: list[str]
) -> tuple[nn.Module, dict[str, Any]]:
    """The model and its config.json, quantized as mlx-lm does it, the family's exceptions (routers and such) included.
    A line about what had to stay dense is added to notes.
    """
    from mlx_lm.utils import quantize_model

    group_size = quantization.group_size
    with contextlib.redirect_stdout(io.StringIO()):  # it reports by printing
        model, config = quantize_model(model, config, group_size, quantization.bits, quantization.mode)
    left = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if left:
        notes.append(f"{len(left)} layers stay unquantized (first: {left[0]}): width no multiple of {group_size}")
    return model, config


def _estimate(files: list[Path], config: dict[str, Any], quantization: Quantization) -> int:
    """Bytes the result will take, from the source's: within some ten percent, on the high side."""
    size = sum(file.stat().st_size for file in files)
    if any(config.get(key) for key in QUANTIZATION_KEYS):
        return size * 4 if quantization.requantize else size
    return int(size * quantization.share)


def _save_weights(model: nn.Module, folder: Path) -> None:
    """Write a model's parameters shard by shard; each tensor is computed, written and forgotten."""
    writer = ShardWriter(folder, {"format": "mlx"})
    arrays = named(model.parameters())
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))  # the model holds on to none of them
    for name in list(arrays):
        writer.add(name, to_numpy(arrays.pop(name)))
    writer.close()


def write_config(folder: Path, config: dict[str, Any], origin: dict[str, Any], code: bool) -> None:
    """Write config.json, and beside it where the model came from. code: keep the keys that name .py files."""
    if not code:
        config = companions.without_code(config)
        origin = {**origin, "config": companions.without_code(origin["config"])}
    # This names a weight file of the source; ours have the usual names.
    write_json(folder / "config.json", {key: value for key, value in config.items() if key != "transformers_weights"})
    write_json(folder / SOURCE_FILE, {**origin, "code": code})


def copy_tokenizer(source: Path, destination: Path, code: bool = False) -> list[str]:
    """Copy what belongs to a model beside config.json and weights (`companions.copy`); return what a person must know.

    The copy has a tokenizer.json also where the source has SentencePiece's tokenizer.model alone.
    """
    left_out = companions.copy(source, destination, code)
    if not (destination / TOKENIZER_FILE).is_file() and (destination / "tokenizer.model").is_file():
        text = json_text(tokenizer_json(source))
        (destination / TOKENIZER_FILE).write_text(text, encoding="utf-8")
    return [CODE_LEFT_OUT] if left_out else []


def _measured(folder: Path, notes: list[str]) -> Converted:
    """Size of the result, read from its files."""
    model, _ = open_model(folder)
    weights = sum(_weights(module) for _, module in model.named_modules())
    total = sum(array.nbytes for array in named(model.parameters()).values())
    return Converted(total, total * 8 / max(weights, 1), notes)


def _weights(module: nn.Module) -> int:
    """How many numbers of the original model a module itself holds."""
    if isinstance(module, QUANTIZED):
        return module.weight.size * 32 // module.bits + (module.bias.size if "bias" in module else 0)
    return sum(value.size for value in module.values() if isinstance(value, mx.array))
