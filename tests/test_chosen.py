"""What a run changed in its tokenizer: written into tokenizer files of every age, and seen before training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
from click.testing import CliRunner

from mlxtune.cli import cli
from mlxtune.data.template.tokenizer_changes import Changes

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
