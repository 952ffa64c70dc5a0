"""Which of llama.cpp's architectures a model has. What is known of each is in `families/`."""

from __future__ import annotations

from mlxtune_convert.errors import CONVERT_ORIGINAL, UserError
from mlxtune_convert.families import table
from mlxtune_convert.gguf.container import File
from mlxtune_convert.gguf.family import GgufFamily

# In the order of the table: of several with one architecture of llama.cpp, the plain one comes first.
FAMILIES: tuple[GgufFamily, ...] = tuple(family.gguf for family in table.FAMILIES.values() if family.gguf is not None)
# Of several, these keys tell: experts make a Mixtral of a llama, a sliding window an Olmo 3 of an Olmo 2.
MARKS = ("expert_count", "attention.sliding_window")


def by_model_type(model_type: str) -> GgufFamily:
    """The family of a config.json. Raises UserError naming what is covered and what works instead."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    covered = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(
        f"models of type {model_type} cannot be written as GGUF yet (covered: {covered})",
        "`--to hf`, or `mlxtune fuse` for a merged MLX model.",
    )


def of_file(file: File) -> GgufFamily:
    """The family of a GGUF model. Raises UserError naming what is covered."""
    name = file.get("general.architecture")
    matching = [family for family in FAMILIES if family.gguf == name and not family.written_only]
    if not matching:
        covered = ", ".join(dict.fromkeys(family.gguf for family in FAMILIES if not family.written_only))
        raise UserError(
            f"GGUF files of the {str(name)[:40]} architecture cannot be converted yet (covered: {covered})",
            CONVERT_ORIGINAL,
        )
    for family in matching:
        marks = [key for key in family.keys if key in MARKS]
        if marks and all(file.get(f"{name}.{key}") for key in marks):
            return family
    return matching[0]
