"""An MLX model's tensors -> a GGUF model file. The counterpart of `model_read`.

A file is planned before it is written: which tensors it holds, in which shape, and its metadata. The weights then come
as a stream of (MLX name, value), where a value is

    Codes          an untouched quantized matrix, whose codes the file may take over as they are
    float32 array  everything else: merged matrices, norms, biases

so that whoever has MLX reads and merges them one by one, and nothing here needs MLX. One tensor on its way:

    model.layers.0.self_attn.q_proj.weight        MLX's name; Codes of 4 bits, [64, 64] when dense
    blk.0.attn_q.weight                           llama.cpp's name (`GgufFamily.gguf_name`)
    rows in llama.cpp's order                     pairs of rotary rows side by side (`GgufFamily.row_order`)
    Q4_1, 64 rows of 40 bytes                     the type that --type asks for (`Choice.store`), and its blocks

Types are chosen tensor by tensor, because `keep` and the block types look at the values (whether codes can be carried
exactly). The header, which names them, is therefore written last; its length is known before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxtune_convert.files import require_space
from mlxtune_convert.gguf import container, metadata, tokenizer_write
from mlxtune_convert.gguf.architectures import by_model_type
from mlxtune_convert.gguf.container import Field, File, Writer
from mlxtune_convert.gguf.family import GgufFamily
from mlxtune_convert.gguf.model_read import HEADER_FILE
from mlxtune_convert.gguf.quant_blocks import Codes
from mlxtune_convert.gguf.tensor_types import Choice, columns_moved, gguf_shape
from mlxtune_convert.gguf.tokenizer_read import CONTROL
from mlxtune_convert.hf import chat_templates
from mlxtune_convert.tokenizer_changes import Changes

Value = Codes | np.ndarray  # codes of a quantized matrix, or a float32 array in MLX's shape
Progress = Callable[[int, int], None]  # (weights done, weights in all)
FILE_TYPE = "general.file_type"
# Bytes that a weight takes at most, for the question whether the disk has room. q8_0: 34 bytes for 32 weights; the
# others: 210 bytes for 256 weights (Q6_K), the widest of the types below 8 bits.
BYTES_PER_WEIGHT = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.1}
BYTES_PER_WEIGHT_ELSE = 0.8


@dataclass(frozen=True)
class GgufPlan:
    """What a GGUF model file will hold."""

    family: GgufFamily  # what llama.cpp knows of the model's architecture
    choice: Choice  # which type each tensor gets; while tensors are made it notes what it chose
    config: dict[str, Any]  # config.json, of its text part alone
    fields: dict[str, Field]  # the file's metadata in its order
    shapes: dict[str, tuple[int, ...]]  # of every tensor by its GGUF name, outermost first, in the file's order
    original: File | None  # the header of the GGUF file that the model came from

    @staticmethod
    def of(
        config: dict[str, Any],
        shapes: dict[str, tuple[int, ...]],
        type_: str,
        folder: Path,
        name: str,
        tokenizer: dict[str, Any] | None,
    ) -> GgufPlan:
        """config: the model's config.json; shapes: of its dense tensors by their MLX names; type_: of TYPES; folder:
        where its tokenizer and, if it came from a GGUF file, that file's header are; name: of the model, for people;
        tokenizer: its tokenizer.json where the folder has none. Raises UserError for what llama.cpp cannot express.
        """
        config = metadata.text_of(config)
        family = by_model_type(config["model_type"])
        in_file = {}
        for mlx, shape in shapes.items():
            gguf = family.gguf_name(mlx)
            in_file[gguf] = gguf_shape(gguf, shape)
        for gguf, table in metadata.rope_tensors(config).items():
            in_file[gguf] = table.shape
        header = folder / HEADER_FILE
        original = container.read(header, header_only=True) if header.is_file() else None
        head_is_embedding = "output.weight" not in in_file
        choice = Choice.of(type_, config, head_is_embedding, original)
        fields = {
            "general.architecture": Field.of(family.gguf),
            "general.type": Field.of("model"),
            "general.name": Field.of(name),
            FILE_TYPE: Field.of(0),  # its value is known when all tensors are made
            "general.quantization_version": Field.of(2),
            **metadata.metadata(family, config),
            **tokenizer_write.fields(folder, in_file["token_embd.weight"][0], tokenizer),
        }
        if original is not None:
            fields = keep_source_metadata(original, fields)
        return GgufPlan(family, choice, config, fields, in_file, original)

    def tensors(self, values: Iterable[tuple[str, Value]]) -> Iterator[tuple[str, str, np.ndarray]]:
        """(GGUF name, type, rows) of every tensor as the file holds it. values: by MLX names; rows: floats in the
        tensor's shape, or uint8 [rows, bytes of a row].
        """
        for name, table in metadata.rope_tensors(self.config).items():
            yield name, "F32", table
        for mlx, value in values:
            name = self.family.gguf_name(mlx)
            shape = self.shapes[name]
            if isinstance(value, np.ndarray):
                value = self.family.written(name, value).reshape(shape)
            value = columns_moved(value, self.family.column_order(name, self.config))
            row_order = self.family.row_order(name, self.config, shape[0])
            kind, rows = self.choice.store(name, value, row_order, shape)
            yield name, kind, rows

    def write(self, values: Iterable[tuple[str, Value]], path: Path, progress: Progress | None = None) -> None:
        """Write the file. values: as `tensors` takes them. Raises UserError where the disk has no room for it."""
        total = sum(math.prod(shape) for shape in self.shapes.values())
        require_space(path.parent, int(total * BYTES_PER_WEIGHT.get(self.choice.type, BYTES_PER_WEIGHT_ELSE)))
        fields = dict(self.fields)
        done = 0
        with Writer(path, fields, self.shapes) as writer:
            for name, kind, rows in self.tensors(values):
                writer.add(name, kind, rows)
                done += math.prod(self.shapes[name])
                if progress is not None:
                    progress(done, total)
            # A model that goes back as it came keeps the number that its file had.
            if not self._has_types_of_original(writer):
                fields[FILE_TYPE] = Field.of(self.choice.file_type)

    def _has_types_of_original(self, writer: Writer) -> bool:
        if self.original is None:
            return False
        written = {name: tensor.kind for name, tensor in writer.tensors.items()}
        return written == {name: tensor.kind for name, tensor in self.original.tensors.items()}


def keep_source_metadata(original: File, fields: dict[str, Field]) -> dict[str, Field]:
    """The metadata of the GGUF file that a model came from, with the values that its folder now says otherwise.

    fields: what the folder says. The file's own order and types stay, so that an unchanged model comes back equal.
    """
    out = dict(original.fields)
    same_tokens = out.get("tokenizer.ggml.tokens") == fields["tokenizer.ggml.tokens"]
    for key, field in fields.items():
        if key not in out:
            if key.startswith("tokenizer.") and key.endswith(("_token_id", "template")):
                out[key] = field
            continue
        if key.startswith("general.") or _same_float32(out[key].value, field.value):
            continue
        # The file's own scores, types and rules' name hold as long as the vocabulary is the same.
        if same_tokens and key.endswith((".scores", ".token_type", ".pre", "add_space_prefix")):
            continue
        out[key] = field._replace(kind=out[key].kind)
    return out


def _same_float32(one: Any, other: Any) -> bool:
    """Whether two values are the same in a file, which keeps floats in 32 bits."""
    if isinstance(one, float):
        return bool(np.float32(one) == np.float32(other))
    return bool(one == other)


def with_tokenizer_changes(fields: dict[str, Field], changes: Changes, eos_token_id: int) -> dict[str, Field]:
    """The metadata of a file with what a run changed in its model's tokenizer. eos_token_id: of the changed one."""
    out = dict(fields)
    if changes.chat_template:
        for key in fields:
            if key.startswith(chat_templates.GGUF_KEY):
                del out[key]
        out |= chat_templates.fields(chat_templates.by_name(changes.chat_template))
    if changes.eos_token:
        out["tokenizer.ggml.eos_token_id"] = Field.of(eos_token_id)
    tokens, types = out["tokenizer.ggml.tokens"], out["tokenizer.ggml.token_type"]
    texts, kinds = list(tokens.value), list(types.value)
    for token, index in changes.tokens.items():
        if texts[index] != token:  # a row of the embedding that had no token so far
            texts[index], kinds[index] = token, CONTROL
    out["tokenizer.ggml.tokens"] = tokens._replace(value=texts)
    out["tokenizer.ggml.token_type"] = types._replace(value=kinds)
    return out
