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

from mlxtune.data.template.tokenizer import load_tokenizer, tokenizer_json
from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.model import reopened
from mlxtune.model.arrays import named, to_numpy
from mlxtune.model.corrections import corrected
from mlxtune.model.dense import QUANTIZED, dequantize_model
from mlxtune.model.hub import resolve
from mlxtune.model.load import cast, model_dtype, open_model, require_known, source_of

# The bits and group sizes of each mode, the default first.
MODES = {
    "affine": ((4, 1, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
UNQUANTIZED_BITS = 16
TOKENIZER_FILE = "tokenizer.json"
CODE_LEFT_OUT = "the model names code of its own (auto_map), which is left out with the keys that name it"


@dataclass(frozen=True)
class Target:
    """What the weights become. bits 16: not quantized; `asked`: the user named it, so a quantized source is
    requantized.
    """

    bits: int
    group_size: int
    mode: str
    asked: bool

    @staticmethod
    def of(bits: int | None, group_size: int | None, mode: str | None) -> Target:
        """Resolve the three options. Raises UserError for a contradiction."""
        asked = any(option is not None for option in (bits, group_size, mode))
        if bits == UNQUANTIZED_BITS:
            if group_size is not None or mode is not None:
                raise UserError("--bits 16 means not quantized, so --group-size and --mode have no meaning with it")
            return Target(UNQUANTIZED_BITS, 0, "", asked)
        mode = mode or "affine"
        all_bits, all_groups = MODES[mode]
        out = Target(bits or all_bits[0], all_groups[0] if group_size is None else group_size, mode, asked)
        if out.bits not in all_bits or out.group_size not in all_groups:
            bits_text, groups_text = (", ".join(map(str, sorted(known))) for known in MODES[mode])
            raise UserError(
                f"--bits {out.bits} --group-size {out.group_size} does not exist for --mode {mode}",
                f"Bits: {bits_text}; group sizes: {groups_text}.",
            )
        return out


@dataclass(frozen=True)
class Converted:
    """What was written: bytes of weights, bits per weight, and lines a person must read."""

    total_bytes: int
    bits_per_weight: float
    notes: list[str]


def convert(
    source: str,
    destination: Path,
    target: Target,
    dtype: str | None = None,
    force: bool = False,
    base: Path | None = None,
    code: bool = False,
) -> Converted:
    """Convert any source into `destination`, which appears only when it is complete and a few tokens ran through it.

    base: the model that a GGUF adapter belongs to; code: copy the model's own .py files, which are never run here.
    dtype: type of what is not quantized (None: the source's). Raises UserError for anything wrong with the
    source, the options or the disk.
    """
    backend.prepare()
    path = resolve(source, code)
    if code and (path.is_file() or not companions.code_of(path)):
        raise UserError(f"--trust-remote-code has no effect: {source} names no code of its own", "Leave it out.")
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path}: a model file must be a .gguf", "A Hugging Face model is given as its folder.")
        file = container.read(path)
        if adapter_file.is_adapter(file):
            if target.asked or dtype is not None:
                raise UserError(
                    f"{path} is an adapter: its factors are kept as they are", "Leave out --bits and --dtype."
                )
            with new_folder(destination, force, [path, *([base] if base is not None else [])]) as work:
                config = read_json(base / "config.json", "the base model") if base else None
                updates, layers = adapter_file.read_adapter(file, config)
                spec = save_adapter(work, Adapter(updates), layers)
                return Converted((work / spec.file).stat().st_size, 32.0, [])
    if base is not None:
        raise UserError("--base has no effect here", "It names the model that a GGUF adapter belongs to.")
    if path.is_dir():
        foreign = _foreign(path, target, dtype)
        if foreign is not None:
            require_space(destination, foreign.converted_bytes + _result_bytes(foreign, target))
            with new_folder(destination, force, [path]) as work:
                return _from_foreign(foreign, _hub_id(source), work, target, dtype, code)
    opened = model_read.open_gguf(path) if path.is_file() else None
    if opened is not None:
        require_space(destination, opened.converted_bytes)
    with new_folder(destination, force, [path]) as work:
        if opened is None:
            return _from_folder(path, _hub_id(source), work, target, dtype, code)
        if opened.quantized and not target.asked and dtype is None:
            model_read.convert(opened, work)
            reopened.check(work)
            return _measured(work, opened.notes())
        lossless = work / "lossless"
        lossless.mkdir()
        model_read.convert(opened, lossless)
        try:
            out = _from_folder(lossless, "", work, target, dtype)
        except UserError as error:  # a person knows the file, not the folder that was made of it
            raise UserError(error.message.replace(str(lossless), str(path)), error.hint) from error
        shutil.rmtree(lossless)
        if opened.notes():
            out.notes.append("the GGUF was already quantized: quantizing it again is lossy")
        return out


def _hub_id(source: str) -> str:
    """What the user named, where that is no path."""
    return "" if Path(source).expanduser().exists() else source


def _foreign(path: Path, target: Target, dtype: str | None) -> Opened | None:
    """A folder that another maker's tool quantized, understood; None for any other. Raises UserError where it cannot be
    read, or is of a type that mlx-lm does not know.
    """
    config = read_json(path / "config.json", "a model folder: config.json, safetensors weights and a tokenizer")
    foreign = of_folder(path, config)
    if foreign is None:
        return None
    opened = open_foreign(foreign, keep=not target.asked, dtype=dtype)
    require_known(path, unquantized(config))  # before hours of work, not after
    load_tokenizer(path)
    return opened


def _result_bytes(opened: Opened, target: Target) -> int:
    """Bytes that what is made of the floats will take."""
    if opened.kept or target.bits == UNQUANTIZED_BITS:
        return opened.converted_bytes
    return int(opened.converted_bytes * _share(target))


def _from_foreign(
    opened: Opened, name: str, work: Path, target: Target, dtype: str | None, code: bool = False
) -> Converted:
    """The floats in a folder of their own, then what any folder becomes. name: hub id, or ""; code: as `convert`."""
    plain, source = work / "plain", opened.foreign.folder
    plain.mkdir()
    write(opened, plain)
    try:
        out = _from_folder(plain, name, work, target, dtype, code)
    except UserError as error:
        raise UserError(error.message.replace(str(plain), str(source)), error.hint) from error
    shutil.rmtree(plain)
    out.notes.insert(0, opened.note(target.bits))
    return out


def _from_folder(path: Path, name: str, work: Path, target: Target, dtype: str | None, code: bool = False) -> Converted:
    """name: hub id, or ""; code: with the model's own .py files. Quantizing is mlx-lm's own, the family's exceptions
    (routers and such) included.
    """
    from mlx_lm.utils import quantize_model

    original = read_json(path / "config.json", "a model folder: config.json, safetensors weights and a tokenizer")
    weights = weights_of(path)
    require_space(work, _estimate(weights.files, original, target))
    model, config = open_model(path)
    load_tokenizer(path)  # nothing is written without one
    notes = [*weights.notes, *corrected.notes(model, config)]
    quantized = bool(config.get("quantization"))
    own = dict.fromkeys(QUANTIZATION_KEYS, config["quantization"]) if quantized else {}
    config = unquantized(config) | own  # nothing that another maker's tool declared, and no empty entries
    if quantized and not target.asked and of_mxfp4(original):
        notes.append("MXFP4: its codes are kept; what it left unquantized stays so (--bits 4 quantizes all anew)")
    if quantized and target.asked:
        notes.append(
            "the source was already quantized: its weights are dequantized"
            + (" and quantized again, which is lossy" if target.bits != UNQUANTIZED_BITS else "")
        )
        model, config = dequantize_model(model), unquantized(config)  # rounds to the scales' type, as MLX would
        quantized = False
    if dtype:
        wanted = getattr(mx, dtype)
        if quantized and wanted not in (model_dtype(model), mx.float32):
            raise UserError(
                f"--dtype {dtype} would round the scales of this quantized source", "Add --bits to requantize it."
            )
        cast(model, wanted)
    if not quantized and target.bits != UNQUANTIZED_BITS:
        with contextlib.redirect_stdout(io.StringIO()):  # it reports by printing
            model, config = quantize_model(model, config, target.group_size, target.bits, target.mode)
        left = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
        if left:
            notes.append(
                f"{len(left)} layers stay unquantized (first: {left[0]}): width no multiple of {target.group_size}"
            )
    _save_weights(model, work)
    origin = source_of(path)
    if not (path / SOURCE_FILE).is_file():
        origin |= {"name": name, "config": unquantized(original)}
    write_config(work, config, origin, code)
    left_out = copy_tokenizer(path, work, code)
    notes += [f"{note}; --trust-remote-code copies it" for note in left_out]
    same = target.bits == UNQUANTIZED_BITS and dtype is None and not any(key in original for key in QUANTIZATION_KEYS)
    reopened.check(work, path if same else None)
    return _measured(work, notes)


def _estimate(files: list[Path], config: dict[str, Any], target: Target) -> int:
    """Bytes the result will take, from the source's: within some ten percent, on the high side."""
    size = sum(file.stat().st_size for file in files)
    if any(config.get(key) for key in QUANTIZATION_KEYS):
        return size if not target.asked else size * 4
    if target.bits == UNQUANTIZED_BITS:
        return size
    return int(size * _share(target))


def _share(target: Target) -> float:
    """A quantized model's bytes in those of its 16-bit floats, on the high side."""
    return (target.bits + 32 / target.group_size) / 16 * 1.1


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
