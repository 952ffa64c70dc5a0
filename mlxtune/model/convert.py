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
from mlxtune_convert import chat_templates, gguf_file, gguf_lora, gguf_model
from mlxtune_convert.adapters import save_adapter
from mlxtune_convert.configs import QUANTIZATION_KEYS, SOURCE_FILE, unquantized
from mlxtune_convert.files import new_folder, read_json, require_space, write_json
from mlxtune_convert.foreign.folder import Opened, open_foreign, write
from mlxtune_convert.foreign.method import of_folder, of_mxfp4
from mlxtune_convert.peft import Adapter
from mlxtune_convert.tensors import ShardWriter, weight_files

from mlxtune import backend
from mlxtune.data.tokenizer import load_tokenizer
from mlxtune.errors import UserError
from mlxtune.model import corrected
from mlxtune.model.arrays import named, to_numpy
from mlxtune.model.hub import resolve
from mlxtune.model.load import cast, model_dtype, open_model, require_known, source_of
from mlxtune.model.quantize import QUANTIZED

# The bits and group sizes of each mode, the default first.
MODES = {
    "affine": ((4, 1, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
UNQUANTIZED_BITS = 16
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "generation_config.json"),
)


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
) -> Converted:
    """Convert any source into `destination`, which appears only when it is complete.

    base: the model that a GGUF adapter belongs to.
    dtype: type of what is not quantized (None: the source's). Raises UserError for anything wrong with the
    source, the options or the disk.
    """
    backend.prepare()
    path = resolve(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path}: a model file must be a .gguf", "A Hugging Face model is given as its folder.")
        file = gguf_file.read(path)
        if gguf_lora.is_adapter(file):
            if target.asked or dtype is not None:
                raise UserError(
                    f"{path} is an adapter: its factors are kept as they are", "Leave out --bits and --dtype."
                )
            with new_folder(destination, force, [path]) as work:
                config = read_json(base / "config.json", "the base model") if base else None
                updates, layers = gguf_lora.read_adapter(file, config)
                spec = save_adapter(work, Adapter(updates), layers)
                return Converted((work / spec.file).stat().st_size, 32.0, [])
    if base is not None:
        raise UserError("--base has no effect here", "It names the model that a GGUF adapter belongs to.")
    if path.is_dir():
        foreign = _foreign(path, target, dtype)
        if foreign is not None:
            require_space(destination, foreign.converted_bytes + _result_bytes(foreign, target))
            with new_folder(destination, force, [path]) as work:
                return _from_foreign(foreign, _hub_id(source), work, target, dtype)
    opened = gguf_model.open_gguf(path) if path.is_file() else None
    if opened is not None:
        require_space(destination, opened.converted_bytes)
    with new_folder(destination, force, [path]) as work:
        if opened is None:
            return _from_folder(path, _hub_id(source), work, target, dtype)
        if opened.quantized and not target.asked and dtype is None:
            gguf_model.convert(opened, work)
            return _measured(work, opened.notes())
        lossless = work / "lossless"
        lossless.mkdir()
        gguf_model.convert(opened, lossless)
        out = _from_folder(lossless, "", work, target, dtype)
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


def _from_foreign(opened: Opened, name: str, work: Path, target: Target, dtype: str | None) -> Converted:
    """The floats in a folder of their own, then what any folder becomes. name: hub id, or ""."""
    plain, source = work / "plain", opened.foreign.folder
    plain.mkdir()
    write(opened, plain)
    try:
        out = _from_folder(plain, name, work, target, dtype)
    except UserError as error:
        raise UserError(error.message.replace(str(plain), str(source)), error.hint) from error
    shutil.rmtree(plain)
    out.notes.insert(0, opened.note(target.bits))
    return out


def _from_folder(path: Path, name: str, work: Path, target: Target, dtype: str | None) -> Converted:
    """name: hub id, or "". Quantizing is mlx-lm's own, the family's exceptions (routers and such) included."""
    from mlx_lm.utils import dequantize_model, quantize_model

    original = read_json(path / "config.json", "a model folder: config.json, safetensors weights and a tokenizer")
    require_space(work, _estimate(path, original, target))
    model, config = open_model(path)
    load_tokenizer(path)  # nothing is written without one
    notes = corrected.notes(model, config)
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
    write_json(work / "config.json", config)
    copy_tokenizer(path, work)
    origin = source_of(path)
    if not (path / SOURCE_FILE).is_file():
        origin |= {"name": name, "config": unquantized(original)}
    write_json(work / SOURCE_FILE, origin)
    return _measured(work, notes)


def _estimate(path: Path, config: dict[str, Any], target: Target) -> int:
    """Bytes the result will take, from the source's: within some ten percent, on the high side."""
    size = sum(file.stat().st_size for file in weight_files(path))
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


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy tokenizer and generation settings; the chat templates end up both as files and inside
    tokenizer_config.json.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
    templates = chat_templates.of_folder(source)
    config_file = destination / chat_templates.CONFIG
    config = read_json(config_file, "the tokenizer's settings") if config_file.is_file() else {}
    if templates:
        chat_templates.write(destination, templates)
        if not config.get("chat_template"):
            write_json(config_file, {**config, "chat_template": chat_templates.for_config(templates)})


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
