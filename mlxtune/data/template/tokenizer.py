"""A model folder's own tokenizer."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from textwrap import shorten
from typing import Any

from mlxtune_convert.files import read_json, refuse_links_out
from mlxtune_convert.hf import chat_templates
from mlxtune_convert.shown import shown_name

from mlxtune.errors import UserError

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
MODEL_FOLDER = "a model folder: config.json, safetensors weights and a tokenizer"


def require_config(path: Path) -> None:
    """Raise UserError for a folder without config.json, and say what the folder is instead, where that is plain."""
    if (path / "config.json").exists() or not path.is_dir():
        return
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} is an adapter, no model", f"Name its model as --model, and --adapter {path} beside it."
        )
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        raise UserError(
            f"{path} has no config.json, but {shown_name(ggufs[0].name)}: a GGUF file is a model by itself",
            f"Convert it first: mlxtune convert {shlex.quote(str(ggufs[0]))} DST",
        )
    raise UserError(f"{path} has no config.json", f"Expected {MODEL_FOLDER}.")


def require_folder(path: Path) -> None:
    """Raise UserError when `path`, which exists or not, is no folder."""
    if path.is_file():
        raise UserError(f"{path} is a file; a model is a folder", f"Convert it first: mlxtune convert {path} FOLDER")
    if not path.is_dir():
        raise UserError(f"no model folder {path}")
    refuse_links_out(path)


def load_tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer of a folder, which may hold nothing else.

    Its chat_template is a text, or a dict of them by name. Raises UserError when there is no tokenizer, or when it is a
    slow one (no character offsets, so no exact masks), and for broken chat templates.
    """
    from transformers import AutoTokenizer

    require_folder(folder)
    if not any((folder / name).is_file() for name in FILES):
        raise UserError(f"{folder} has no tokenizer", "Expected tokenizer.json beside the model's weights.")
    templates = chat_templates.of_folder(folder)
    try:
        # Without the last, the library would ask the user whether to run code that came with the model.
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises whatever its parts raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: the tokenizer needs code of its own (auto_map), and code from others is never run",
                "Take a version of this model whose tokenizer transformers knows.",
            ) from error
        reason = shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
        if str(error) == _config_error(folder):  # the library looks into it first
            raise UserError(f"{folder / 'config.json'} is none that transformers can read ({reason})") from error
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({reason})") from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: the tokenizer has no tokenizer.json, so tokens cannot be traced to their text")
    if templates:  # the library does not find every one
        only = templates.keys() == {chat_templates.DEFAULT}
        tokenizer.chat_template = templates[chat_templates.DEFAULT] if only else templates
    return tokenizer


def _config_error(folder: Path) -> str | None:
    """What transformers says of config.json; None where it can read it, or there is none."""
    from transformers import AutoConfig

    try:
        if (folder / "config.json").is_file():
            AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises whatever its parts raise
        return str(error)
    return None


def tokenizer_json(folder: Path) -> dict[str, Any]:
    """tokenizer.json of a folder; made of its tokenizer.model where it has that alone."""
    file = folder / "tokenizer.json"
    if file.is_file():
        return read_json(file, "the model's tokenizer")
    whole: dict[str, Any] = json.loads(load_tokenizer(folder).backend_tokenizer.to_str())
    return whole
