"""The files that belong to a model beside its weights: tokenizer, processors, generation settings, its own code.

Code is never run here. It is copied where that was asked for, else the keys that name it go, so that no copy names
files that are not there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxtune_convert.files import matching, read_json, refuse_links_out, write_json
from mlxtune_convert.hf import chat_templates

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
# The vocabularies of transformers' tokenizer classes, and of the hub's own ones.
VOCABULARIES = (
    *("tokenizer.json", "*.model", "*.tiktoken", "*.spm", "*.tokenizer", "tekken.json", "vocab.bpe", "encoder.json"),
    *("vocab*.json", "vocab*.txt", "merges.txt", "dict.txt", "target_vocab.json", "entity_vocab.json", "emoji.json"),
    *("bpe.codes", "normalizer.json", "word_shape.json", "word_pronunciation.json", "byte_maps.json"),
)
CODE = "*.py"
# Keys by which a configuration names classes in .py files beside it.
CODE_KEYS = ("auto_map", "custom_pipelines")
WITH_CODE_KEYS = ("config.json", SETTINGS[0], *PROCESSORS)


def copy(source: Path, destination: Path, code: bool = False) -> bool:
    """Copy what belongs to a model beside config.json and the weights; return whether it names code that was left out.

    The chat templates end up both as files and inside tokenizer_config.json. code: copy the .py files too, and keep
    the keys that name them. Raises UserError for a link that leads out of the source.
    """
    refuse_links_out(source)
    for name in dict.fromkeys(_names(source)):
        shutil.copyfile(source / name, destination / name)
    _copy_templates(source, destination)
    if code:
        for path in matching(source, CODE):
            shutil.copyfile(path, destination / path.name)
        return False
    for name in (SETTINGS[0], *PROCESSORS):
        _without_code(destination / name)
    return bool(code_of(source))


def code_of(folder: Path) -> list[str]:
    """The settings files of a folder that name code of the model's own."""
    found = (name for name in WITH_CODE_KEYS if (folder / name).is_file())
    return [name for name in found if any(key in read_json(folder / name, "settings") for key in CODE_KEYS)]


def without_code(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a configuration without the keys that name code."""
    return {key: value for key, value in config.items() if key not in CODE_KEYS}


def _names(source: Path) -> Iterator[str]:
    for pattern in (*SETTINGS, *PROCESSORS, *VOCABULARIES):
        for path in matching(source, pattern):
            if path.is_file():
                yield path.name


def _copy_templates(source: Path, destination: Path) -> None:
    templates = chat_templates.of_folder(source)
    if not templates:
        return
    chat_templates.write(destination, templates)
    file = destination / chat_templates.CONFIG
    config = read_json(file, "the tokenizer's settings") if file.is_file() else {}
    if not config.get("chat_template"):
        write_json(file, {**config, "chat_template": chat_templates.for_config(templates)})


def _without_code(file: Path) -> bool:
    """Remove the keys from a settings file; return whether there were any."""
    if not file.is_file():
        return False
    config = read_json(file, "settings")
    kept = without_code(config)
    if kept.keys() != config.keys():
        write_json(file, kept)
    return kept.keys() != config.keys()
