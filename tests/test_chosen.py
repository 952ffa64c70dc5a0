"""What a run changed in its tokenizer: written into tokenizer files of every age, and seen before training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner

from mlxtune.cli import cli
from mlxtune.config import resolve
from mlxtune.data.template.tokenizer_changes import Changes, tokenizer_of
from mlxtune.errors import UserError
from mlxtune.train.run_data import read_data

NEW = {"<|im_end|>": 257, "<|im_start|>": 258}  # after an end token and the bytes


def test_older_tokenizer_files_get_the_tokens_too(tmp_path: Path) -> None:
    """added_tokens_decoder, and special_tokens_map.json, whose end token would win over the settings'."""
    from transformers import AutoTokenizer

    tiny.make_plain_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    decoder = {"0": {"content": "<|endoftext|>", **dict.fromkeys(("lstrip", "normalized", "rstrip"), False)}}
    decoder["0"] |= {"single_word": False, "special": True}
    old: Sequence[dict[str, Any]] = ({"added_tokens_decoder": decoder}, {})
    for extra in old:
        tiny.make_plain_tokenizer(tmp_path)
        file.write_text(json.dumps({**json.loads(file.read_text()), **extra}))
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
        Changes("{{ messages }}", "<|im_end|>", dict(reversed(NEW.items()))).write(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        assert again("<|im_start|>a<|im_end|>")["input_ids"][::2] == [NEW["<|im_start|>"], NEW["<|im_end|>"]]
        assert (again.eos_token, again.chat_template) == ("<|im_end|>", "{{ messages }}")
    assert len(json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]) == 3


def test_rows_can_be_looked_at_before_anything_is_trained(data: Path, tmp_path: Path) -> None:
    """With a folder that holds the tokenizer alone."""
    tiny.make_plain_tokenizer(tmp_path)
    options = ("--set", "data.template=chatml", "--set", "lora.train_also=[embeddings]", "--limit", "1", "--json")
    arguments = ["data", "show", "--model", str(tmp_path), "--data", str(data), *options]
    row = json.loads(CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout)
    assert [index for index in row["ids"] if index >= 257] == [*reversed(NEW.values())] * 2
    assert row["ids"][-2] == NEW["<|im_end|>"] and row["mask"][-3:] == [1, 1, 0]


def test_rows_are_looked_at_with_the_template_of_the_adapter_that_a_run_would_start_from(
    data: Path, tmp_path: Path
) -> None:
    tiny.make_plain_tokenizer(tmp_path)
    (tmp_path / "before").mkdir()
    Changes("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}").save(tmp_path / "before")
    options = ("--set", f"lora.start_from={tmp_path / 'before'}", "--limit", "1", "--json")
    arguments = ["data", "show", "--model", str(tmp_path), "--data", str(data), *options]
    row = json.loads(CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout)
    assert row["text"].startswith("[user]") and "[assistant]" in row["text"]


def test_an_end_token_that_the_tokenizer_does_not_have_is_refused(tmp_path: Path) -> None:
    tiny.make_plain_tokenizer(tmp_path)
    Changes(eos_token="../../etc").save(tmp_path)
    with pytest.raises(UserError, match=r"its tokenizer does not have '../../etc', which ends the adapter's answers"):
        tokenizer_of(tmp_path, tmp_path)


def test_a_runs_template_is_set_once_however_many_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerBase

    given: list[Any] = []

    def keep(tokenizer: Any, template: Any) -> None:
        given.append(template)
        vars(tokenizer)["chat_template"] = template

    watched = property(lambda tokenizer: vars(tokenizer).get("chat_template"), keep)
    monkeypatch.setattr(PreTrainedTokenizerBase, "chat_template", watched, raising=False)
    tiny.make_plain_tokenizer(tmp_path / "model")
    for name in ("train-0", "train-1", "valid"):
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", tiny.conversations(2))
    flags = {"model.path": str(tmp_path / "model"), "data.path": str(tmp_path)}
    found, _ = read_data(resolve.load(None, ("data.template=alpaca", "data.cache=off"), flags))
    assert (found.train.rows, found.valid.rows) == (4, 2)
    assert sum("### Response" in str(template) for template in given) == 1
