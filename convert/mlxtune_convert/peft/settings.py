"""What an adapter_config.json of PEFT says, and a refusal by name of whatever would be understood wrongly.

PEFT gets new keys with every version. A key that is known to change nothing we do, or that has PEFT's default, is fine;
of any other it must be assumed that it changes what the adapter computes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from mlxtune_convert.errors import UserError
from mlxtune_convert.files import read_json, refuse_links_out

CONFIG_FILE = "adapter_config.json"
RANK = ALPHA = 8  # PEFT's defaults of r and lora_alpha
# Keys that are read here, and those that change nothing we do: who made it, which layers it chose (the tensors say
# so), how its factors began (init_lora_weights says whether the base changed) and how they were trained.
KNOWN = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "alpha_pattern", "rank_pattern"),
    *("modules_to_save", "target_modules", "target_parameters", "base_model_name_or_path", "ensure_weight_tying"),
    *("task_type", "inference_mode", "revision", "auto_mapping", "peft_version", "exclude_modules", "layers_pattern"),
    *("layers_to_transform", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "eva_config"),
    *("init_lora_weights", "bias", "trainable_token_indices", "corda_config", "lora_ga_config", "loftq_config"),
    *("velora_config", "unsloth_fixed"),
}
# Initialisations that leave the base as it is; the others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) train beside a changed
# one.
KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
TEXT_TASKS = (None, "", "CAUSAL_LM", "SEQ_2_SEQ_LM")  # the last is also what some write who train a language model
VIRTUAL_TOKENS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT")

MERGE = "PEFT can merge it into its model (merge_and_unload, then save_pretrained): convert the merged model."
HINTS = {
    "lora_bias": "MLX's LoRA has no bias. PEFT can merge it where the adapted layers have a bias of their own.",
    "alora_invocation_tokens": "An activated LoRA acts from its invocation tokens on: PEFT alone runs it.",
    "use_qalora": "Its factors act on groups of a GPTQ layer's inputs: PEFT alone runs it.",
    "arrow_config": "It chooses between several adapters for each token: PEFT alone runs it.",
    "init_lora_weights": "It trained beside a changed base: save it in PEFT as plain LoRA "
    "(path_initial_model_for_weight_conversion), or merge it there and convert the merged model.",
    "bias": "Only 'none' can be read: biases stay the base's. " + MERGE,
    "layer_replication": "It runs blocks of its base more than once. " + MERGE,
}
UNKNOWN = "It may change what the adapter computes. " + MERGE


@dataclass(frozen=True)
class Settings:
    """A checked adapter_config.json."""

    where: Path  # the file
    values: dict[str, Any]  # what it holds

    @staticmethod
    def read(folder: Path) -> Settings:
        """Raises UserError naming the key that is not understood, or whose value cannot be."""
        file = folder / CONFIG_FILE
        settings = Settings(file, read_json(file, "a PEFT adapter: adapter_config.json and adapter_model.safetensors"))
        refuse_links_out(folder)
        settings._refuse_other_kinds()
        settings._check_values()
        return settings

    def _refuse_other_kinds(self) -> None:
        kind, task = self.values.get("peft_type"), self.values.get("task_type")
        if kind in VIRTUAL_TOKENS:
            raise UserError(
                f"{self.where}: peft_type {kind!r} trains virtual tokens, not weights",
                "Only LoRA adapters can be read; train one, or run this one with PEFT.",
            )
        if kind != "LORA":
            raise UserError(
                f"{self.where}: peft_type {kind!r} is not understood",
                "Only LoRA adapters can be read. Most other kinds PEFT can merge into their model (merge_and_unload, "
                "then save_pretrained): convert the merged model.",
            )
        if task not in TEXT_TASKS:
            raise UserError(
                f"{self.where}: task_type {task!r}: it was trained for another head than the one that makes text",
                "Only adapters of language models (CAUSAL_LM) can be read.",
            )
        for key, value in self.values.items():
            if key == "bias":
                fine = value in (None, "none")
            elif key == "init_lora_weights":
                fine = value in KEEPS_BASE
            else:
                fine = key in KNOWN or value in (None, False, "", [], {})
            if not fine:
                raise UserError(f"{self.where}: {key} {_shown(value)} is not understood", HINTS.get(key, UNKNOWN))

    def _check_values(self) -> None:
        """PEFT writes all of these; people edit them."""
        checks = {
            "r": (_is_count, "a whole number above 0"),
            "lora_alpha": (_is_number, "a number other than 0"),
            "lora_dropout": (lambda value: value == 0 or _is_number(value), "a number"),
            "rank_pattern": (lambda value: _is_table(value, _is_count), "names and whole numbers above 0"),
            "alpha_pattern": (lambda value: _is_table(value, _is_number), "names and numbers other than 0"),
            "modules_to_save": (_is_names, "a list of names"),
            "target_parameters": (_is_names, "a list of names"),
            "trainable_token_indices": (_is_rows, "a list of token numbers, or one for each module"),
            "base_model_name_or_path": (lambda value: isinstance(value, str), "a name or a path"),
        }
        for key, (fine, allowed) in checks.items():
            value = self.values.get(key)
            if value is not None and not fine(value):
                raise UserError(
                    f"{self.where}: {key} is {_shown(value)}, it must be {allowed}", "Copy or download it again."
                )

    def rank(self, module: str) -> int:
        """The rank at a module's or parameter's path."""
        return int(_matching(self.values.get("rank_pattern"), module, self.values.get("r") or RANK))

    def scale(self, module: str) -> float:
        """What multiplies the update at a module's or parameter's path: alpha / r, or alpha / sqrt(r) in rsLoRA."""
        alpha = float(_matching(self.values.get("alpha_pattern"), module, self.values.get("lora_alpha") or ALPHA))
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def token_rows(self, module: str) -> list[int]:
        """Which rows of an embedding `trainable_token_indices` trains; a plain list means the input embedding."""
        chosen = self.values.get("trainable_token_indices") or []
        if isinstance(chosen, list):
            return chosen
        return next((rows for name, rows in chosen.items() if f".{module}".endswith(f".{name}")), [])

    def is_saved(self, module: str) -> bool:
        """Whether a module is, or is in, one of modules_to_save."""
        return any(f".{part}." in f".{module}." for part in self.values.get("modules_to_save") or ())

    @property
    def dropout(self) -> float:
        return float(self.values.get("lora_dropout") or 0.0)

    @property
    def rslora(self) -> bool:
        return bool(self.values.get("use_rslora"))

    @property
    def base(self) -> str:
        """The model that it was trained on: a name on the hub or a path, "" where it is not said."""
        return self.values.get("base_model_name_or_path") or ""

    @property
    def ties(self) -> bool:
        """Whether PEFT kept a tied embedding and head as one matrix in training."""
        return bool(self.values.get("ensure_weight_tying"))

    @property
    def parameters(self) -> list[str]:
        """The parameters, such as those of experts, that are adapted without being linear layers."""
        return self.values.get("target_parameters") or []

    @property
    def some_blocks(self) -> bool:
        """Whether it was made for some blocks of its base, not for all."""
        return self.values.get("layers_to_transform") is not None


def _matching(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of a module's path."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _shown(value: Any) -> str:
    return shorten(repr(value), 80, placeholder=" ...")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value != 0


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_rows(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(rows, list) and _is_rows(rows) for rows in value.values())
    return isinstance(value, list) and all(row == 0 or _is_count(row) for row in value)


def _is_table(value: Any, fine: Any) -> bool:
    return isinstance(value, dict) and all(_is_pattern(key) and fine(one) for key, one in value.items())


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True
