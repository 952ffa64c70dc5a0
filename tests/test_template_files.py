"""Where a chat template may be found in a model folder, which of several is used, and that copies keep them all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import masks
import pytest
import tiny
from mlxtune_convert.gguf import container, tokenizer_write
from mlxtune_convert.hf import chat_templates
from transformers import AutoTokenizer

from mlxtune.data.chat import masking
from mlxtune.data.template.tokenizer import load_tokenizer
from mlxtune.data.template.tokenizer_changes import Changes
from mlxtune.errors import UserError
from mlxtune.model.convert import copy_tokenizer

PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
TOOLS = "{{ tools | length }} tools. " + PLAIN
OTHER = "other " + PLAIN
BOTH = {"default": PLAIN, "tool_use": TOOLS}
NAMED = [{"name": name, "template": text} for name, text in BOTH.items()]
ASK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
TOOL = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def folder_with(folder: Path, config: Any = None, **files: str) -> Path:
    """A tokenizer whose templates are in tokenizer_config.json, and in files; __ is a slash, _jinja .jinja."""
    tiny.make_tokenizer(folder, chat=False)
    if config is not None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": config}))
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json").replace("_jinja", ".jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


OLD = json.dumps({"chat_template": PLAIN})
# (tokenizer_config.json, files, what is found, whether transformers finds all of it too)
PLACES: list[tuple[Any, dict[str, str], Any, bool]] = [
    (None, {}, None, True),
    (PLAIN, {}, PLAIN, True),
    (NAMED, {}, BOTH, True),
    (None, {"chat_template_jinja": PLAIN}, PLAIN, True),
    (OTHER, {"chat_template_jinja": PLAIN}, PLAIN, True),
    (NAMED, {"chat_template_jinja": OTHER}, OTHER, True),
    (None, {"chat_template_jinja": PLAIN, "additional_chat_templates__tool_use_jinja": TOOLS}, BOTH, True),
    (PLAIN, {"additional_chat_templates__tool_use_jinja": TOOLS}, BOTH, False),
    (None, {"chat_template_json": OLD}, PLAIN, False),
    (None, {"chat_template_json": json.dumps({"chat_template": NAMED})}, BOTH, False),
    (None, {"chat_template_json": OLD, "additional_chat_templates__tool_use_jinja": TOOLS}, BOTH, False),
    (OTHER, {"chat_template_json": OLD}, OTHER, True),
    (None, {"chat_template_json": OLD, "chat_template_jinja": OTHER}, OTHER, True),
]


@pytest.mark.parametrize(("config", "files", "found", "known"), PLACES)
def test_a_template_is_found_in_every_place(
    config: Any, files: dict[str, str], found: Any, known: bool, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path / "model", config, **files)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == found
    assert (AutoTokenizer.from_pretrained(folder).chat_template == found) == known
    if found == BOTH:
        for tools, start in ((None, "user: Hi"), (TOOL, "1 tools. user: Hi")):
            ids = tokenizer.apply_chat_template(ASK, tools=tools, tokenize=True, return_dict=False)
            assert tokenizer.decode(ids).startswith(start)
            assert list(masking.render(tokenizer, ASK, tools).ids) == list(ids)


@pytest.mark.parametrize(("config", "files", "found", "known"), PLACES)
def test_a_copy_of_the_tokenizer_has_the_same_templates(
    config: Any, files: dict[str, str], found: Any, known: bool, tmp_path: Path
) -> None:
    """As `convert` and `export` make one: for this program, and for one that knows tokenizer_config.json alone."""
    folder = folder_with(tmp_path / "model", config, **files)
    (tmp_path / "copy").mkdir()
    copy_tokenizer(folder, tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").chat_template == found
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == found
    if config is None and found is not None:
        said = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())["chat_template"]
        assert said == (found if isinstance(found, str) else chat_templates.for_config(found))


def test_a_gguf_names_every_template(tmp_path: Path) -> None:
    """By the names that gguf-py writes, and read back from them."""
    from gguf import Keys

    folder = folder_with(tmp_path / "model", NAMED)
    # A pre-tokenizer's rules are another matter: Llama 2's kind has none.
    masks.with_template(masks.piece_tokenizer(["<unk>", "<s>", "</s>"]), BOTH, "</s>").save_pretrained(folder)
    fields = tokenizer_write.fields(folder, 1000)
    assert fields[Keys.Tokenizer.CHAT_TEMPLATE].value == PLAIN
    assert fields[Keys.Tokenizer.CHAT_TEMPLATE_N.format(name="tool_use")].value == TOOLS
    assert fields[Keys.Tokenizer.CHAT_TEMPLATES].value == ["tool_use"]
    assert chat_templates.of_gguf(container.File(tmp_path, fields, {}, 0)) == BOTH


def test_the_template_of_a_run_replaces_every_one_of_the_model(tmp_path: Path) -> None:
    """Else conversations with tools would still get the old one."""
    folder = folder_with(tmp_path / "model", NAMED, additional_chat_templates__tool_use_jinja=TOOLS)
    Changes(OTHER).write(folder)
    assert load_tokenizer(folder).chat_template == OTHER
    Changes(BOTH).write(folder)
    assert load_tokenizer(folder).chat_template == BOTH
    Changes(BOTH, "<|im_end|>").save(tmp_path)
    assert Changes.read(tmp_path) == Changes(BOTH, "<|im_end|>")


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        (None, {"chat_template_json": "{"}, "chat_template.json line 1: not valid JSON"),
        (None, {"chat_template_json": '{"chat_template": 5}'}, "chat_template.json: chat_template must be text"),
        ([{"name": "default"}], {}, "tokenizer_config.json: chat_template must be text"),
        ([{"name": "../x", "template": PLAIN}], {}, "which no file can have"),
    ],
)
def test_a_broken_template_is_named(config: Any, files: dict[str, str], expected: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model", config, **files)
    with pytest.raises(UserError, match=expected):
        load_tokenizer(folder)
        copy_tokenizer(folder, tmp_path)


def test_a_template_file_that_is_not_read_is_named(tmp_path: Path) -> None:
    same = folder_with(tmp_path / "same", PLAIN, chat_template_json=OLD)
    assert chat_templates.unread(same) == []
    differs = folder_with(tmp_path / "differs", OTHER, chat_template_json=OLD)
    (note,) = chat_templates.unread(differs)
    assert "chat_template.json is not read: tokenizer_config.json has another" in note
    misnamed = folder_with(tmp_path / "misnamed", template_jinja=PLAIN)
    (note,) = chat_templates.unread(misnamed)
    assert "template.jinja is not read: rename it" in note
