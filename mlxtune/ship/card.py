"""What a Hugging Face folder needs beside its weights: generation_config.json, and the model card."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from mlxtune_convert.files import read_json, write_json
from mlxtune_convert.gguf.tokenizer_write import token_ids

from mlxtune.config.resolve import Config
from mlxtune.data.template.template import Template
from mlxtune.data.template.tokenizer import load_tokenizer
from mlxtune.ship.push import REPO
from mlxtune.train.run_folder import RunFolder

LICENCE = re.compile(r"[\w.-]+")  # an identifier such as apache-2.0


def write_generation_config(work: Path, config: dict[str, Any]) -> None:
    """generation_config.json with every id that ends an answer: the configs', the tokenizer's, the template's."""
    file = work / "generation_config.json"
    generation = read_json(file, "generation settings") if file.is_file() else {}
    tokenizer = load_tokenizer(work)
    ends = {*token_ids(config.get("eos_token_id")), *token_ids(generation.get("eos_token_id")), tokenizer.eos_token_id}
    if tokenizer.chat_template:
        token = Template(tokenizer).end_of_turn.strip()
        ends.add(tokenizer.convert_tokens_to_ids(token) if token else None)
    write_json(file, {**generation, "eos_token_id": sorted(ends - {None})})


def write(work: Path, kind: str, base: str, licence: str, adapter: Path | None, note: str = "") -> None:
    """README.md as the hub shows it. kind: "transformers" or "peft"; base: hub id or ""; note: for its users."""
    from huggingface_hub import ModelCardData

    base = base if REPO.fullmatch(base) else ""  # a name that a stranger's file gave may be any text
    facts: dict[str, Any] = {"library_name": kind, "tags": ["mlxtune", "lora"], "license": licence or "unknown"}
    if base:
        facts["base_model"] = base
    what = "merged and exported" if kind == "transformers" else "as a PEFT adapter, exported"
    lines = ["---", ModelCardData(**facts).to_yaml(original_order=list(facts)), "---", ""]
    lines.append(f"A fine-tuned version of {base or 'its base model'}, {what} with mlxtune.")
    lines.append("" if licence else "The licence of the base model applies.")
    lines.append(note)
    if adapter is not None and RunFolder(adapter).is_run():
        lines += _recipe(RunFolder(adapter).config())
    (work / "README.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


def _recipe(run: Config) -> list[str]:
    """A table of how it was trained."""
    lora, train, data = run.lora, run.train, run.data
    length = f"{train.steps} steps" if train.steps else f"{train.epochs or 1:g} epochs"
    rows = {
        "data": ", ".join(_name_of_source(source.path) for source in data.mixture()),
        "adapter": f"{lora.variant}, rank {lora.rank}, alpha {lora.alpha:g}, {lora.targets}",
        "trained in full": ", ".join(lora.train_also),
        "training": f"{length}, learning rate {train.lr:g} ({train.schedule}), seed {train.seed}",
        "loss on": f"{data.train_on} assistant turns, rows of up to {data.max_tokens} tokens",
    }
    lines = ["", "| recipe | |", "|---|---|"]
    for name, text in rows.items():
        if text:
            lines.append(f"| {name} | {_cell(text)} |")
    return lines


def _name_of_source(path: str) -> str:
    """Where the files lay on somebody's machine is nobody's business."""
    return Path(path).name if Path(path).is_absolute() else path


def _cell(text: str) -> str:
    """A text inside of a table: no column, no line and no HTML of its own."""
    text = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", text).split())
    return html.escape(text, quote=False).replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`")


def licence_of(folder: Path) -> str:
    """The licence that a model folder's own card names, or "": a card is a stranger's text, and may be broken."""
    file = folder / "README.md"
    if not file.is_file():
        return ""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    text = file.read_text(encoding="utf-8", errors="replace")
    if not REGEX_YAML_BLOCK.search(text):  # the library would print a warning
        return ""
    try:
        licence = ModelCard(text, ignore_metadata_errors=True).data.get("license")
    except Exception:  # the YAML, its nesting, keys that are no names: whatever the library trips over
        return ""
    return licence if isinstance(licence, str) and LICENCE.fullmatch(licence) else ""
