"""A run's configuration, resolved: flags, --set, a file, and the defaults of `schema`.

A run is described by six sections (`model`, `data`, `lora`, `train`, `preference`, `fast`). Values come, strongest
first, from command-line flags, then `--set section.key=value`, then a YAML file, then the defaults of the schema. Of
two keys that exclude each other (steps, epochs), the one on the command line replaces the one in the file. An unknown
key is an error that names its nearest neighbour; a key whose value could have no effect is one too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path, PurePath
from typing import Any

from pydantic import ValidationError

from mlxtune.config.preference import OBJECTIVES, PreferenceSection, refuse_without_effect
from mlxtune.config.schema import (
    DataSection,
    ExportSection,
    FastSection,
    LoraSection,
    ModelSection,
    Section,
    SourceSection,
    TrainSection,
)
from mlxtune.config.yaml_text import Document, parse_yaml, read_text, write_yaml
from mlxtune.errors import UserError, did_you_mean, nearest

EITHER = (("train.steps", "train.epochs"), ("train.batch_rows", "train.batch_tokens"), ("data.path", "data.sources"))

# A section of a project's file (`project.file`) that says what commands do in its folder: no setting of a run.
PROJECT = "project"
# Keys that hold a list of sections: what one of these is, and what it is called.
LISTS: dict[str, tuple[type[Section], str]] = {
    "data.sources": (SourceSection, "source"),
    "project.export": (ExportSection, "export"),
}
DEEPEST = 32  # lists and tables in one another, of any value


class Config(Section):
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    preference: PreferenceSection = PreferenceSection()
    fast: FastSection = FastSection()

    def to_yaml(self) -> str:
        """The resolved configuration, every key written out, as the run folder keeps it."""
        return write_yaml(self.model_dump(mode="json"))


# What every dotted key means; sections have no text.
KEYS = dict.fromkeys(Config.model_fields, "") | {
    f"{section}.{name}": f"{section}.{name}: {field.description}."
    for section, part in Config.model_fields.items()
    for name, field in type(part.default).model_fields.items()
}


def recipe_folder() -> Path:
    """Where the shipped recipes are: inside the wheel, else in the checkout."""
    packaged = Path(str(resources.files("mlxtune"))) / "configs"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "configs"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def find_config(name: str) -> Path:
    """A path to a YAML file, or the name of a shipped recipe."""
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return Path(path)
    if name in recipe_names():
        return recipe_folder() / f"{name}.yaml"
    hint = f"Shipped recipes: {', '.join(recipe_names())}."
    if name in OBJECTIVES:
        hint = f"It is an objective: take -c dpo --set preference.loss={name}. {hint}"
    raise UserError(f"no configuration file {name!r}, and no recipe of that name", hint)


def load(
    file: str | Path | None = None, settings: tuple[str, ...] = (), flags: Mapping[str, Any] | None = None
) -> Config:
    """Resolve a configuration.

    file: YAML path or recipe name; settings: `section.key=value` strings; flags: dotted keys to values, the
    strongest of all. Raises UserError naming file, line and key of whatever is wrong.
    """
    tree, lines = read_sections(find_config(str(file))) if file is not None else ({}, {})
    tree.pop(PROJECT, None)  # which `project.file` reads
    given: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        key = key.strip()
        if "=" not in setting or not all(key.partition(".")):
            raise UserError(f"--set {setting}: expected section.key=value", "Example: --set train.lr=1e-4")
        document = parse_yaml(value, f"--set {key}", key)
        _refuse_older(document, {}, f"--set {setting}")
        given[key] = document.value
        lines[key] = f"--set {setting}"
        lines.setdefault(key.partition(".")[0], f"--set {setting}")
    for key, value in (flags or {}).items():
        if value is not None:
            given[key] = _plain(value)
            lines.pop(key, None)
    for key, value in given.items():
        _put(tree, key, value)
    for section, keys in tree.items():
        for name, value in keys.items() if isinstance(keys, dict) else ():
            if why := _unkept(value):
                where = f"{lines[f'{section}.{name}']}: " if f"{section}.{name}" in lines else ""
                raise UserError(f"{where}{section}.{name} holds {why}", KEYS.get(f"{section}.{name}", ""))
    named = {key for key, value in given.items() if value is not None}
    for one, other in (*EITHER, *(pair[::-1] for pair in EITHER)):
        if one in named and other not in named:
            _put(tree, other, None)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(*explained(error, lines)) from None
    refuse_without_effect(config, lines)
    return config


def read_sections(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's sections, and where each of its keys stands."""
    document = parse_yaml(read_text(path), str(path))
    tree = document.value
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as `train:`, found {type(tree).__name__}")
    lines = {key: f"{path} line {line}" for key, line in document.lines.items()}
    _refuse_older(document, lines)
    # A section whose keys are all commented out means the defaults.
    return {key: {} if value is None else value for key, value in (tree or {}).items()}, lines


def _refuse_older(document: Document, lines: Mapping[str, str], source: str = "") -> None:
    """Raise UserError for a word that YAML 1.1 read as a truth value or a number, where a value of any kind may stand.

    Elsewhere the key says what its value is: `fast.head: off` is a word, `train.steps: 1:30` is no number. But
    `enable_thinking: off` was false, and as the text it is now a chat template would take it for true.
    lines: where each key of a file stands; source: the flag that is not in a file.
    """
    for key, text in document.older.items():
        if key.startswith("data.template_kwargs."):
            meant = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(text.lower(), "a decimal number")
            raise UserError(
                f"{lines.get(key, source)}: {key}: {text} is a text in YAML 1.2, and was none in YAML 1.1",
                f"Write {meant}; or '{text}' in quotes, if the text is meant.",
            )


def _unkept(value: Any, depth: int = 0) -> str:
    """What of a value cannot be written into a run's folder and read again as it was, in words; "" where all can."""
    if depth > DEEPEST:
        return f"lists or tables more than {DEEPEST} deep in one another"
    if isinstance(value, dict | list):
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        return next(filter(None, (_unkept(one, depth + 1) for one in inside)), "")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "a whole number of more than 64 bits"
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        return "half of a character (a surrogate)"
    if value is None or isinstance(value, str | int | float):
        return ""
    return f"a value of the type {type(value).__name__}"


def _plain(value: Any) -> Any:
    """A value as a file could hold it: paths, wherever they stand in it, are texts."""
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise UserError(f"{key}: {parent} is not a section")
    tree[last] = value


def explained(error: ValidationError, lines: Mapping[str, str]) -> tuple[str, str]:
    """(One line on the first problem, with where it stands; what is allowed). lines: where each key stands."""
    problems: dict[str, list[Any]] = {}
    for problem in error.errors():
        # pydantic adds the branch of a union to the location; our own keys are the first two parts.
        problems.setdefault(".".join(str(part) for part in problem["loc"][:2]), []).append(problem)
    key, same = next(iter(problems.items()))
    where = f"{lines[key]}: " if key in lines else ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    first, messages = same[0], dict.fromkeys(problem["msg"] for problem in same)
    inside = [str(part) for part in first["loc"][2:]]
    if key in LISTS and len(inside) > 1:
        section, called = LISTS[key]
        place, name = f"{called} {int(inside[0]) + 1}", inside[-1]
        if first["type"] == "extra_forbidden":
            return f"{where}unknown key {name} in {place}{more}", did_you_mean(name, section.model_fields)
        if first["type"] == "missing":
            return f"{where}{key}: {place} has no {name}{more}", f"Its keys: {', '.join(section.model_fields)}."
    if first["type"] in ("extra_forbidden", "invalid_key"):
        near = nearest_key(key)
        hint = f"Did you mean {near}?" if near else f"Sections: {', '.join(Config.model_fields)}."
        return f"{where}unknown key {key}{more}", hint
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
    elif first["type"] == "model_type":
        message = f"expected a section with its keys indented below it, got {first['input']!r}"
    else:
        allowed = " or ".join(text.removeprefix("Input should be ") for text in messages)
        if first["type"] == "string_too_short":
            allowed = "a text that is not empty"
        got = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
        message = f"should be {allowed}{got}"
    return f"{where}{key}: {message}{more}", KEYS.get(key, "")


def nearest_key(key: str) -> str:
    """The known key most like an unknown one, or an empty string.

    First the same name in another section, then a description with its words (learning_rate), best in the section that
    was named, then the spelling.
    """
    section, _, name = key.rpartition(".")
    moved = [other for other in KEYS if other.endswith(f".{name}")]
    meant = [other for other, text in KEYS.items() if "_" in name and name.replace("_", " ") in text]
    meant.sort(key=lambda other: not other.startswith(f"{section}."))
    return next(iter(moved or meant), "") or nearest(key, KEYS, 0.5)
