"""What a run changes in its model's tokenizer, kept beside its adapter: chat template, end token, added tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlxtune_convert import chat_templates
from mlxtune_convert.files import read_json, write_json

from mlxtune.config import Config
from mlxtune.data.template_choice import missing
from mlxtune.data.tokenizer import load_tokenizer
from mlxtune.errors import UserError

FILE = "mlxtune_tokenizer.json"
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@dataclass(frozen=True)
class Changes:
    """tokens: special tokens -> their ids. What is empty is the model's own; several templates have names."""

    chat_template: str | dict[str, str] = ""
    eos_token: str = ""
    tokens: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def read(adapter: Path | None) -> Changes:
        """Those of an adapter folder."""
        if adapter is None or not (adapter / FILE).is_file():
            return Changes()
        saved = read_json(adapter / FILE, "what a run changed in the tokenizer")
        return Changes(*(saved.get(key, own) for key, own in asdict(Changes()).items()))

    @staticmethod
    def of_files(folder: Path) -> Changes:
        """What the tokenizer beside a PEFT adapter says; nothing where there is none."""
        if not (folder / "tokenizer_config.json").is_file():
            return Changes()
        tokenizer = load_tokenizer(folder)
        tokens = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        return Changes(tokenizer.chat_template or "", tokenizer.eos_token or "", tokens)

    def save(self, adapter: Path) -> None:
        if self != Changes():
            write_json(adapter / FILE, asdict(self))

    def apply(self, tokenizer: Any, folder: Path) -> None:
        """Change a tokenizer so. folder: where it is from. Raises UserError when a token gets another id there."""
        add(tokenizer, sorted(self.tokens, key=lambda token: self.tokens[token]), folder)
        wrong = [token for token, index in self.tokens.items() if tokenizer.convert_tokens_to_ids(token) != index]
        if wrong:
            raise UserError(
                f"{folder}: its tokenizer has another number for {wrong[0]} than the adapter was trained with",
                "Use the model that the adapter was trained on.",
            )
        tokenizer.chat_template = self.chat_template or tokenizer.chat_template
        tokenizer.eos_token = self.eos_token or tokenizer.eos_token

    def write(self, folder: Path) -> None:
        """Change the tokenizer files in a folder so."""
        if self == Changes():
            return
        file = folder / "tokenizer.json"
        if not file.is_file():  # made of tokenizer.model each time
            load_tokenizer(folder).backend_tokenizer.save(str(file))
        whole = read_json(file, "the tokenizer")
        known = {token["content"] for token in whole["added_tokens"]}
        new = {index: {"content": token, **SPECIAL} for token, index in self.tokens.items() if token not in known}
        whole["added_tokens"] += [{"id": index, **new[index]} for index in sorted(new)]  # their order numbers them
        file.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
        templates = chat_templates.by_name(self.chat_template) if self.chat_template else {}
        said: dict[str, Any] = {"chat_template": chat_templates.for_config(templates)} if templates else {}
        said |= {"eos_token": self.eos_token} if self.eos_token else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the latter is older, and wins
            if (folder / name).is_file():
                settings = read_json(folder / name, "the tokenizer's settings")
                if "added_tokens_decoder" in settings:
                    settings["added_tokens_decoder"].update(new)
                write_json(folder / name, {**settings, **said})
        if templates:
            chat_templates.write(folder, templates)


def add(tokenizer: Any, tokens: Sequence[str], folder: Path) -> None:
    """Add special tokens that the vocabulary does not have. Raises UserError where their numbers are taken."""
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
    if set(known.values()) & set(tokenizer.convert_tokens_to_ids(new)):
        raise UserError(f"{folder}: its vocabulary has gaps, so no token can be added to it")


def for_rows(folder: Path, config: Config) -> Any:
    """The tokenizer to look at rows with; the folder may hold it alone. Tokens that training would add are added."""
    tokenizer = load_tokenizer(folder)
    if config.data.template and "embeddings" in config.lora.train_also:
        add(tokenizer, missing(tokenizer, config.data.template), folder)
    return tokenizer


def tokenizer_of(folder: Path, adapter: Path | None) -> Any:
    """The tokenizer of a model folder as a run changed it."""
    tokenizer = load_tokenizer(folder)
    Changes.read(adapter).apply(tokenizer, folder)
    return tokenizer
