"""What a run changes in its model's tokenizer, kept beside its adapter: chat template, end token, added tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlxtune_convert.files import read_json, write_json

from mlxtune.data.tokenizer import load_tokenizer
from mlxtune.errors import UserError

FILE = "mlxtune_tokenizer.json"
# What a special token is in tokenizer.json: found anywhere in a text, and taken out before anything else happens to it.
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@dataclass(frozen=True)
class Changes:
    """tokens: special tokens -> their ids. What is empty is the model's own."""

    chat_template: str = ""
    eos_token: str = ""
    tokens: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def read(adapter: Path | None) -> Changes:
        """Those of an adapter folder. Raises UserError for a damaged file."""
        if adapter is None or not (adapter / FILE).is_file():
            return Changes()
        saved = read_json(adapter / FILE, "what a run changed in the tokenizer")
        if saved.keys() - Changes.__dataclass_fields__.keys() or not isinstance(saved.get("tokens", {}), dict):
            raise UserError(f"{adapter / FILE}: not what mlxtune writes there", "Copy the adapter again.")
        return Changes(**saved)

    @staticmethod
    def of_files(folder: Path) -> Changes:
        """What the tokenizer files in a folder say (a PEFT adapter's, say); nothing where there are none."""
        if not (folder / "tokenizer.json").is_file():
            return Changes()
        added = read_json(folder / "tokenizer.json", "a tokenizer").get("added_tokens") or []
        own, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        settings = read_json(own, "the tokenizer's settings") if own.is_file() else {}
        template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
        end = settings.get("eos_token") or ""
        return Changes(
            template if isinstance(template, str) else "",
            end if isinstance(end, str) else end["content"],
            {token["content"]: token["id"] for token in added if token["special"]},
        )

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
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
        whole_file, settings_file, map_file, template_file = (folder / name for name in names)
        if not whole_file.is_file():  # made of tokenizer.model each time
            load_tokenizer(folder).backend_tokenizer.save(str(whole_file))
        whole = read_json(whole_file, "the tokenizer")
        settings = read_json(settings_file, "its settings") if settings_file.is_file() else {}
        known = {token["content"] for token in whole["added_tokens"]}
        for token, index in self.tokens.items():
            if token not in known:
                whole["added_tokens"].append({"id": index, "content": token, **SPECIAL})
                if "added_tokens_decoder" in settings:
                    settings["added_tokens_decoder"][str(index)] = {"content": token, **SPECIAL}
        whole_file.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
        end = {"eos_token": self.eos_token} if self.eos_token else {}
        if self.chat_template:
            settings["chat_template"] = self.chat_template
            template_file.write_text(self.chat_template, encoding="utf-8")
        write_json(settings_file, {**settings, **end})
        if map_file.is_file():  # older files; it would win
            write_json(map_file, {**read_json(map_file, "special tokens"), **end})


def add(tokenizer: Any, tokens: Sequence[str], folder: Path) -> None:
    """Add special tokens that the vocabulary does not have, numbered on from its end. Raises UserError where that is
    not its end."""
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
    if set(known.values()) & set(tokenizer.convert_tokens_to_ids(new)):
        raise UserError(f"{folder}: its vocabulary has gaps, so no token can be added to it")


def tokenizer_of(folder: Path, adapter: Path | None) -> Any:
    """The tokenizer of a model folder as a run changed it."""
    tokenizer = load_tokenizer(folder)
    Changes.read(adapter).apply(tokenizer, folder)
    return tokenizer
