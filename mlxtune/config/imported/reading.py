"""A file of another program -> our configuration: whose it is, and who translates it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlxtune.config.imported import axolotl, mlx_lm
from mlxtune.config.imported.given import Given
from mlxtune.config.imported.translation import Translation
from mlxtune.config.resolve import Config
from mlxtune.config.yaml_text import parse_yaml, read_text
from mlxtune.errors import UserError

TRANSLATORS: dict[str, Callable[[Given], Translation]] = {"mlx-lm": mlx_lm.translate, "axolotl": axolotl.translate}
# Keys by which a file shows whose it is: no other of these programs has them.
OF_AXOLOTL = ("base_model", "datasets", "micro_batch_size")
OF_MLX_LM = ("iters", "fine_tune_type", "lora_parameters", "num_layers", "adapter_path", "hf_dataset", "mask_prompt")
OF_OTHERS = {"model_name_or_path": "LLaMA-Factory or TRL", "finetuning_type": "LLaMA-Factory"}


def read(path: Path, program: str | None = None) -> Translation:
    """Read a file of another program. program: a key of TRANSLATORS; None: whose it is shows in its keys.

    Raises UserError for a file that cannot be read, is of no program that is known, is one of ours, or asks for what we
    refuse.
    """
    given = _given(path)
    program = program or _program_of(given)
    made = TRANSLATORS[program](given)
    try:
        made.config()
    except UserError as error:
        raise UserError(f"{path}: {error.message}", error.hint) from None
    return made


def _given(path: Path) -> Given:
    if not path.is_file():
        raise UserError(f"no file {path}", "Name a configuration of mlx-lm or Axolotl.")
    document = parse_yaml(read_text(path), str(path))
    if not isinstance(document.value, dict):
        raise UserError(f"{path}: no keys in it", "A configuration of mlx-lm or Axolotl is YAML with keys.")
    return Given(document.value, document, str(path))


def _program_of(given: Given) -> str:
    """A key of TRANSLATORS. Raises UserError where a file shows none."""
    keys = given.tree.keys()
    ours = [section for section in Config.model_fields if isinstance(given.tree.get(section), dict)]
    if ours:
        raise UserError(f"{given.source} is mlxtune's own already", f"mlxtune train -c {given.source}")
    if "base_model" in keys:
        return "axolotl"
    if any(name in keys for name in OF_MLX_LM):
        return "mlx-lm"
    if any(name in keys for name in OF_AXOLOTL):
        return "axolotl"
    other = next((whose for name, whose in OF_OTHERS.items() if name in keys), "")
    known = "Configurations of mlx-lm (iters, lora_parameters ...) and Axolotl (base_model ...) are read"
    of_other = f"; this looks like one of {other}" if other else ""
    raise UserError(f"{given.source}: no configuration that is known{of_other}", f"{known}; --from says whose it is.")
