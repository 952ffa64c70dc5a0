"""The chat templates of a model folder or GGUF, by name, from every place where they are kept.

"default" is for plain conversations; "tool_use", where there is one, for those with tools.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxtune_convert.errors import UserError
from mlxtune_convert.files import matching, read_json
from mlxtune_convert.gguf.container import Field, File

DEFAULT = "default"
MAIN, MORE = "chat_template.jinja", "additional_chat_templates"
CONFIG, OLD = "tokenizer_config.json", "chat_template.json"
GGUF_KEY, GGUF_NAMES = "tokenizer.chat_template", "tokenizer.chat_templates"


def of_folder(folder: Path) -> dict[str, str]:
    """Name -> template, as transformers reads them: files first, then tokenizer_config.json.

    Two things it leaves out are read too: the default of tokenizer_config.json beside files that have none, and
    chat_template.json, which the processors of vision models wrote. Raises UserError for what is no template.
    """
    found = {path.stem: _text(path) for path in matching(folder / MORE, "*.jinja")}
    if (folder / MAIN).is_file():
        found[DEFAULT] = _text(folder / MAIN)
    for name in (CONFIG, OLD):
        if DEFAULT not in found and (folder / name).is_file():
            listed = read_json(folder / name, "a model's chat template").get("chat_template")
            found = {**_named(listed, folder / name), **found}
    return {name: found[name] for name in sorted(found, key=lambda name: (name != DEFAULT, name))}


def unread(folder: Path) -> list[str]:
    """What a person must know of template files that `of_folder` does not read."""
    read = of_folder(folder)
    notes = []
    if (folder / OLD).is_file():
        try:
            old = _named(read_json(folder / OLD, "a model's chat template").get("chat_template"), folder / OLD)
        except UserError:
            old = {DEFAULT: ""}
        if old.get(DEFAULT, read.get(DEFAULT)) != read.get(DEFAULT):
            first = MAIN if (folder / MAIN).is_file() else CONFIG
            notes.append(f"{folder / OLD} is not read: {first} has another chat template, which comes first")
    others = [path.name for path in matching(folder, "*.jinja") if path.name != MAIN]
    if others and DEFAULT not in read:
        notes.append(f"{folder} has no {MAIN}, and {', '.join(others)} is not read: rename it if it is the template")
    return notes


def by_name(value: str | dict[str, str] | None) -> dict[str, str]:
    """Name -> template of what a tokenizer has as its chat_template."""
    return {DEFAULT: value} if isinstance(value, str) else dict(value or {})


def write(folder: Path, templates: dict[str, str]) -> None:
    """Make these the template files of a folder."""
    for stale in [folder / MAIN, folder / OLD, *(folder / MORE).glob("*.jinja")]:
        stale.unlink(missing_ok=True)
    for name, text in templates.items():
        if Path(name).name != name:
            raise UserError(f"{folder}: a chat template has the name {name!r}, which no file can have")
        path = folder / MAIN if name == DEFAULT else folder / MORE / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def for_config(templates: dict[str, str]) -> str | list[dict[str, str]]:
    """As tokenizer_config.json holds them."""
    if templates.keys() == {DEFAULT}:
        return templates[DEFAULT]
    return [{"name": name, "template": text} for name, text in templates.items()]


def fields(templates: dict[str, str]) -> dict[str, Field]:
    """As GGUF metadata holds them."""
    more = [name for name in templates if name != DEFAULT]
    out = {GGUF_KEY: Field.of(templates[DEFAULT])} if DEFAULT in templates else {}
    out |= {f"{GGUF_KEY}.{name}": Field.of(templates[name]) for name in more}
    return out | ({GGUF_NAMES: Field.of(more)} if more else {})


def of_gguf(file: File) -> dict[str, str]:
    """Those of a GGUF's metadata."""
    found = {DEFAULT: file.get(GGUF_KEY)}
    found |= {str(name): file.get(f"{GGUF_KEY}.{name}") for name in file.get(GGUF_NAMES) or []}
    return {name: text for name, text in found.items() if isinstance(text, str) and text}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text (invalid UTF-8 at byte {error.start})") from error


def _named(listed: Any, path: Path) -> dict[str, str]:
    """Templates as JSON holds them: one text, or a list of {name, template}."""
    found = {DEFAULT: listed} if isinstance(listed, str) else listed or {}
    try:
        found = {one["name"]: one["template"] for one in found} if isinstance(found, list) else dict(found)
    except (KeyError, TypeError, ValueError):
        found = {DEFAULT: None}
    if not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise UserError(f"{path}: chat_template must be text, or a list of {{name, template}}")
    return found
