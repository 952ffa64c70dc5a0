"""What is written for others to parse: Modelfiles for Ollama, model cards for the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
import yaml

from mlxtune.data.template.tokenizer import load_tokenizer
from mlxtune.errors import UserError
from mlxtune.ship import card, modelfile
from mlxtune.ship.request import Request

COMMANDS = ("FROM", "ADAPTER", "TEMPLATE", "SYSTEM", "PARAMETER", "LICENSE", "MESSAGE")


def instructions(text: str) -> list[tuple[str, str]]:
    """(command, value) pairs, as Ollama reads them (docs.ollama.com/modelfile): a value goes to the end of its line, or
    from three quote signs to the next three; nothing is escaped.
    """
    found = []
    while text := text.lstrip():
        if text.startswith("#"):
            text = text.partition("\n")[2]
            continue
        command, _, text = text.partition(" ")
        assert command in COMMANDS, command
        if command == "PARAMETER":
            name, _, text = text.partition(" ")
            command = f"PARAMETER {name}"
        if text.startswith('"""'):
            value, end, text = text[3:].partition('"""')
            assert end
        else:
            value, _, text = text.partition("\n")
            value = value.strip().removeprefix('"').removesuffix('"')
        found.append((command, value))
    return found


def written(folder: Path, template: str, out: str = "tuned.gguf", end: str = "<|im_end|>") -> tuple[str, list[str]]:
    """(the Modelfile of a model with this template and end token, notes)."""
    tiny.make_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    whole = (folder / "tokenizer.json").read_text().replace("<|im_end|>", json.dumps(end)[1:-1])
    (folder / "tokenizer.json").write_text(whole)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": end}))
    (folder / "chat_template.jinja").write_text(template.replace("<|im_end|>", json.dumps(end)[1:-1]))
    work = folder / "work"
    work.mkdir()
    assert load_tokenizer(folder).chat_template
    notes = modelfile.write(Request(folder, None, folder / out), work, "model.gguf", adapter=False)
    return (work / modelfile.FILE).read_text(), notes


def with_default(text: str) -> str:
    """ChatML with a system prompt of its own where the conversation has none."""
    prompt = f"{{{{ '<|im_start|>system\\n' + {json.dumps(text)} + '<|im_end|>\\n' }}}}"
    return f"{{% if messages[0].role != 'system' %}}{prompt}{{% endif %}}{tiny.CHATML}"


@pytest.mark.parametrize(
    "text", ["You are kind.", 'He said "no" twice.', "two\nlines", "{{ .Content }}", "'; FROM evil", "a ''' b"]
)
def test_a_template_and_its_system_prompt_come_back_from_the_modelfile(text: str, tmp_path: Path) -> None:
    made, notes = written(tmp_path, with_default(text))
    found = dict(instructions(made))
    assert found["FROM"] == "./tuned.gguf" and found["SYSTEM"] == text and not notes
    assert found["TEMPLATE"] == modelfile.turns(load_tokenizer(tmp_path)).go()  # type: ignore[union-attr]
    assert found["PARAMETER stop"] == "<|im_end|>"


@pytest.mark.parametrize(
    "text",
    [
        'Hi.\n"""\nFROM evil/model\nADAPTER /etc/x\nSYSTEM """do evil',
        '"quoted evil"',
        'evil """ in the middle',
        'evil ends with "',
        "a\x1b]0;evil\x07b",
    ],
)
def test_a_system_prompt_that_would_become_instructions_is_left_out_and_said(text: str, tmp_path: Path) -> None:
    made, notes = written(tmp_path, with_default(text))
    assert [command for command, _ in instructions(made)] == ["FROM", "PARAMETER stop"]
    assert "evil" not in made and any("are left out" in note for note in notes)


def test_a_template_that_takes_no_system_prompt_still_becomes_a_modelfile(tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
    made, notes = written(tmp_path, refusing + tiny.CHATML)
    around = modelfile.turns(load_tokenizer(tmp_path))
    assert around is not None and around.system == ("", "") and around.default == "" and not notes
    assert around.text([("user", "Hi")]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert dict(instructions(made))["TEMPLATE"] == around.go()


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("message['content']", "message['content'] | upper"),
        ("message['content']", "loop.index"),
        ("message['role']", "message['role'] + loop.index | string"),  # each piece is there, and none is fixed
    ],
)
def test_a_template_that_changes_what_is_said_has_no_fixed_text(part: str, changed: str, tmp_path: Path) -> None:
    made, notes = written(tmp_path, tiny.CHATML.replace(part, changed))
    assert [command for command, _ in instructions(made)] == ["FROM", "PARAMETER stop"]
    assert notes == ["this chat template is not fixed text around messages: Ollama will look for a template itself"]


@pytest.mark.parametrize("end", ['<|e|>"\nFROM evil/model', '<"e">', "<e\nFROM evil/model>", "<e\x1b>"])
def test_an_end_token_that_would_become_an_instruction_is_left_out_and_said(end: str, tmp_path: Path) -> None:
    made, notes = written(tmp_path, tiny.CHATML, end=end)
    found = instructions(made)
    assert [value for command, value in found if command == "FROM"] == ["./tuned.gguf"]
    assert not any(command == "PARAMETER stop" for command, _ in found)
    assert any("the end token" in note for note in notes)


@pytest.mark.parametrize("name", ["a\nFROM evil.gguf", "a\x1b.gguf", " a.gguf", "a.gguf "])
def test_a_name_that_cannot_stand_in_a_modelfile_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot stand in a Modelfile"):
        modelfile.check_name(name)
    modelfile.check_name("my tuned model.gguf")


def test_such_a_name_is_refused_before_any_work(mlx_model: Path, tmp_path: Path) -> None:
    options = ("--to", "gguf", "--no-verify", "--ollama", "--out", tmp_path / "a\nFROM evil.gguf")
    tiny.one_clear_line(tiny.mlxtune("export", "--model", mlx_model, *options), "cannot stand in a Modelfile")
    assert not list(tmp_path.iterdir())


HOSTILE_NAMES = ["x/y\nlicense: apache-2.0\ntags: [evil]", "a/b <script>alert(1)</script>", "a/b: c", "../../x", "a b"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_base_name_that_is_no_repository_stays_out_of_the_card(name: str, tmp_path: Path) -> None:
    card.write(tmp_path, "peft", name, "mit", None)
    text = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head == {"library_name": "peft", "tags": ["mlxtune", "lora"], "license": "mit"}
    assert name not in text and "its base model" in text
    card.write(tmp_path, "peft", "acme/tiny-1.5", "mit", None)
    assert yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])["base_model"] == "acme/tiny-1.5"


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# A card\n", "apache-2.0"),
        ('---\r\ntags:\r\n- a\r\nlicense: "mit"  # as it says\r\n---\r\n', "mit"),
        ("---\nlicense: '1.0'\n---\n\xff", "1.0"),
        ("---\nlicense: no\n---\n", ""),
        ("---\nlicense: [mit, bsd]\n---\n", ""),
        ('---\nlicense: "mit\\nevil: yes"\n---\n', ""),
        ("---\nname: x\n---\nlicense: mit\n", ""),
        ("license: mit\n", ""),
        ("---\nlicense: mit\n", ""),
        ("---\nlicense: mit\n1: 2\n---\n", ""),
        ("---\n- license: mit\n---\n", ""),
        ("---\nlicense: {\n---\n", ""),
        (f"---\nlicense: mit\nx: {'[' * 700}{']' * 700}\n---\n", ""),
    ],
)
def test_a_licence_is_read_from_whatever_card_a_model_has(
    text: str, licence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert card.licence_of(tmp_path) == ""
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert card.licence_of(tmp_path) == licence
    assert capfd.readouterr() == ("", "")
    card.write(tmp_path, "transformers", "acme/1e5", licence, None)
    head = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    facts = {"library_name": "transformers", "tags": ["mlxtune", "lora"], "license": licence or "unknown"}
    assert head == {**facts, "base_model": "acme/1e5"} and list(head) == [*facts, "base_model"]


def test_a_recipe_keeps_its_columns_and_holds_no_html(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    source = "a|b\n| evil | row |\n<img src=x onerror=alert(1)>\\|"
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"path": source}, "model": {"path": "m"}}))
    card.write(tmp_path, "peft", "", "", run)
    table = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("|")]
    columns = [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table]
    assert columns == [3] * len(table), table
    assert not any("<img" in line for line in table) and "&lt;img" in "".join(table)
