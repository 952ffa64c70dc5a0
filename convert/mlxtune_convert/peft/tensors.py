"""The tensors of an adapter_model.safetensors, sorted by what they are.

PEFT writes `base_model.model.<module>.lora_A.weight` and its like. The state dict of a model in training has the
adapter's name inside as well (`lora_A.default.weight`), and wrappers of torch add parts of their own; neither says
anything about the adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from mlxtune_convert.errors import UserError
from mlxtune_convert.peft.settings import Settings
from mlxtune_convert.tensors import read_header, require_fractions

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# What torch.compile, FSDP, activation checkpoints (inside names) and data parallelism (before them) add.
WRAPPED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PARALLEL = "module."
FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.weight)?"
)
ROWS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?")
SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)")
COPY = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.base_layer\.(?P<rest>weight|bias)")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings")
HEADS = ("lm_head", "embed_out")
UNGATHERED = (
    "DeepSpeed ZeRO-3 and FSDP write such files when the shards are not gathered: save it again "
    "(stage3_gather_16bit_weights_on_model_save: true), or rebuild it from the checkpoint with zero_to_fp32.py."
)


@dataclass
class Tensors:
    """What an adapter's file holds, in float32."""

    file: Path  # adapter_model.safetensors
    # Path of a module -> its A [r, in], B [out, r], embedding_A [r, tokens], embedding_B [width, r] and
    # magnitude_vector [out], those that there are.
    factors: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    whole: dict[str, np.ndarray] = field(default_factory=dict)  # tensors that replace the base's, by the base's names
    # Path of an embedding or head -> [tokens, width]: new rows of the tokens that `trainable_token_indices` names.
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    # Path of a module -> [tokens, width]: the matrix below it, as it was when the adapter was saved.
    copies: dict[str, np.ndarray] = field(default_factory=dict)

    @staticmethod
    def read(folder: Path, settings: Settings) -> Tensors:
        """Raises UserError for a file that is missing, torn or without numbers, and for a tensor not understood."""
        file = folder / WEIGHTS_FILE
        if not file.is_file():
            raise UserError(f"{folder} has no {WEIGHTS_FILE}", _instead(folder))
        found = Tensors(file)
        adapters: set[str] = set()
        for name, array in found._numbers():
            found._sort(name, array, settings, adapters)
        if len(adapters) > 1:
            raise UserError(
                f"{file} holds {len(adapters)} adapters: {', '.join(sorted(adapters)[:4])}",
                "Save each one alone with PEFT (save_pretrained, selected_adapters).",
            )
        return found

    def _numbers(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each tensor under its plain name. Raises UserError where there are none, or empty ones."""
        header = read_header(self.file)
        empty = next((name for name, tensor in header.items() if 0 in tensor["shape"]), "")
        if not header or empty:
            what = f"the tensor {empty} holds no numbers" if empty else "it holds no tensors"
            raise UserError(f"{self.file}: {what}", UNGATHERED)
        seen: set[str] = set()
        for name, array in load_file(self.file).items():
            if plain(name) in seen:
                raise UserError(f"{self.file} holds {plain(name)} under two names", "Save it again with PEFT.")
            seen.add(plain(name))
            require_fractions(self.file, plain(name), array)
            yield plain(name), array.astype(np.float32)

    def _sort(self, name: str, array: np.ndarray, settings: Settings, adapters: set[str]) -> None:
        factor, rows, saved, copy = (pattern.fullmatch(name) for pattern in (FACTOR, ROWS, SAVED, COPY))
        adapters |= {match["adapter"] for match in (factor, rows, saved) if match and match["adapter"]}
        module = name.rpartition(".")[0]
        if factor:
            self.factors.setdefault(factor["module"], {})[factor["part"]] = array
        elif rows:
            self.rows[rows["module"]] = array
        elif saved:
            self.whole[f"{saved['module']}.{saved['rest']}"] = array
        elif copy:
            if copy["rest"] == "weight":  # biases PEFT leaves as they are
                self.copies[copy["module"]] = array
        elif ".original_module." in name:
            return  # what modules_to_save replaced
        elif settings.is_saved(module) or module.rpartition(".")[2] in (*EMBEDDINGS, *HEADS):
            # Embedding and head PEFT saves without being asked where tokens were added.
            self.whole[name] = array
        else:
            raise UserError(
                f"{self.file}: the tensor {name} is not understood",
                "LoRA on linear layers and embeddings, trained token rows and modules_to_save can be read.",
            )


def plain(name: str) -> str:
    """A tensor's name in transformers' model, with PEFT's part at its end."""
    name = WRAPPED.sub("", name).removeprefix(PARALLEL)
    while name.startswith(PREFIX):  # twice, where an adapted model was adapted
        name = name.removeprefix(PREFIX)
    return name


def is_embedding(name: str) -> bool:
    """Whether a tensor is the matrix of a token embedding, by its name."""
    module, _, parameter = name.rpartition(".")
    return parameter == "weight" and module.rpartition(".")[2] in EMBEDDINGS


def is_head(module: str) -> bool:
    return module.rpartition(".")[2] in HEADS


def _instead(folder: Path) -> str:
    if (folder / "adapter_model.bin").is_file():
        return "Its adapter_model.bin is pickled, which is never loaded: load it in PEFT and save it again."
    return "Copy or download the folder again."
