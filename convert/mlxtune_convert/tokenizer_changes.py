"""What a run changes in its model's tokenizer, kept beside its adapter: chat template, end token, added tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from mlxtune_convert.errors import UserError
from mlxtune_convert.files import json_text, read_json, write_json
from mlxtune_convert.hf import chat_templates

FILE = "mlxtune_tokenizer.json"
TOKENIZER = "tokenizer.json"
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")  # the latter is older, and wins
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@dataclass(frozen=True)
class Changes:
    """What is empty is the model's own."""

    chat_template: str | dict[str, str] = ""  # its text; several templates by name
    eos_token: str = ""  # the token that ends an answer
    tokens: dict[str, int] = field(default_factory=dict)  # added special tokens -> their ids

    @classmethod
    def read(cls, adapter: Path | None) -> Self:
        """Those of an adapter folder."""
        if adapter is None or not (adapter / FILE).is_file():
            return cls()
        saved = read_json(adapter / FILE, "what a run changed in the tokenizer")
        found = cls(*(saved.get(key, own) for key, own in asdict(cls()).items()))
        if not found._is_sound():
            raise UserError(f"{adapter / FILE} is none that mlxtune wrote", "Copy the adapter again.")
        return found

    @classmethod
    def of_files(cls, folder: Path) -> Self:
        """What the tokenizer.json beside a PEFT adapter and its settings say; nothing where there is none."""
        if not _is_tokenizer(folder):
            return cls()
        end = _settings(folder).get("eos_token") or ""
        templates = chat_templates.of_folder(folder)
        return cls(
            templates.get(chat_templates.DEFAULT, "") if templates.keys() <= {chat_templates.DEFAULT} else templates,
            str(end.get("content", "") if isinstance(end, dict) else end),
            {token: index for token, (index, special) in _added(folder).items() if special},
        )

    def _is_sound(self) -> bool:
        """Whether all values are of the types that are written."""
        templates = self.chat_template.values() if isinstance(self.chat_template, dict) else [self.chat_template]
        texts = [*templates, self.eos_token]
        if not isinstance(self.tokens, dict) or not all(isinstance(text, str) for text in texts):
            return False
        return all(type(index) is int and 0 <= index < 1 << 31 for index in self.tokens.values())

    @property
    def empty(self) -> bool:
        return not (self.chat_template or self.eos_token or self.tokens)

    def save(self, adapter: Path) -> None:
        if not self.empty:
            write_json(adapter / FILE, asdict(self))

    def write(self, folder: Path) -> None:
        """Change the tokenizer files in a folder so. Raises UserError where there is no tokenizer.json."""
        if self.empty:
            return
        file = folder / TOKENIZER
        whole = read_json(file, "the tokenizer")
        known = {token["content"] for token in whole["added_tokens"]}
        new = {index: {"content": token, **SPECIAL} for token, index in self.tokens.items() if token not in known}
        whole["added_tokens"] += [{"id": index, **new[index]} for index in sorted(new)]  # their order numbers them
        file.write_text(json_text(whole), encoding="utf-8")
        templates = chat_templates.by_name(self.chat_template) if self.chat_template else {}
        said: dict[str, Any] = {"chat_template": chat_templates.for_config(templates)} if templates else {}
        said |= {"eos_token": self.eos_token} if self.eos_token else {}
        for name in SETTINGS:
            if (folder / name).is_file():
                settings = read_json(folder / name, "the tokenizer's settings")
                if "added_tokens_decoder" in settings:
                    settings["added_tokens_decoder"].update(new)
                write_json(folder / name, {**settings, **said})
        if templates:
            chat_templates.write(folder, templates)


def plain_tokens(folder: Path, base: Path) -> list[str]:
    """Added tokens of the tokenizer in `folder` that are no special ones and that the one in `base` does not have; none
    where one of the folders has no tokenizer.json.
    """
    if not (_is_tokenizer(folder) and _is_tokenizer(base)):
        return []
    vocabulary = (read_json(base / TOKENIZER, "the tokenizer").get("model") or {}).get("vocab") or {}
    # Unigram models list [token, score].
    known = set(vocabulary) if isinstance(vocabulary, dict) else {str(entry[0]) for entry in vocabulary}
    known |= _added(base).keys()
    return [token for token, (_, special) in _added(folder).items() if not special and token not in known]


def _is_tokenizer(folder: Path) -> bool:
    return (folder / TOKENIZER).is_file() and (folder / SETTINGS[0]).is_file()


def _settings(folder: Path) -> dict[str, Any]:
    """Of all settings files; the last one wins."""
    found: dict[str, Any] = {}
    for name in SETTINGS:
        found |= read_json(folder / name, "the tokenizer's settings") if (folder / name).is_file() else {}
    return found


def _added(folder: Path) -> dict[str, tuple[int, bool]]:
    """The added tokens of a tokenizer.json and of the settings beside it: text -> (id, whether it is a special one).

    Raises UserError for what are none.
    """
    added = read_json(folder / TOKENIZER, "the tokenizer").get("added_tokens") or []
    decoder = _settings(folder).get("added_tokens_decoder") or {}
    try:
        tokens = [*added, *({"id": index, **token} for index, token in decoder.items())]
        return {str(token["content"]): (int(token["id"]), bool(token.get("special"))) for token in tokens}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        wrong = f"{folder}: the added tokens of its tokenizer are not understood ({type(error).__name__}: {error})"
        raise UserError(wrong, "Save the tokenizer again.") from error
