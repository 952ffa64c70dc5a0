"""Models with SentencePiece's tokenizer.model alone: converted with a tokenizer.json, exported to GGUF without one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from mlxtune_convert.gguf import container
from test_companions import DENSE

from mlxtune.data.template.tokenizer import load_tokenizer
from mlxtune.model import convert
from mlxtune.ship import llama_cpp
from mlxtune.ship.export import ship
from mlxtune.ship.gguf import Gguf
from mlxtune.ship.request import Request

TEXT = "where is the order of my friend and what is the answer to the question in the shop"
TEXTS = ["where is the order", "two  spaces and an ümlaut 漢", "the answer", "a\nline"]


@pytest.fixture(scope="module")
def pieces() -> Any:
    """A byte-fallback BPE of some 300 pieces, trained by SentencePiece itself."""
    import sentencepiece

    words = TEXT.split()
    rows = (" ".join(words[place:] + words[:place]) for place in range(len(words)))
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=rows,
        model_writer=trained,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=-1,
        normalization_rule_name="identity",  # as Llama's own
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())


@pytest.fixture(scope="module")
def alone(pieces: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with that tokenizer.model and no tokenizer.json."""
    folder = tiny.make_model(tmp_path_factory.mktemp("pieces") / "llama", bos_token_id=1, eos_token_id=2)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(pieces.serialized_model_proto())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True, "legacy": False}))
    return folder


def test_convert_makes_a_tokenizer_json_that_splits_as_sentencepiece_does(
    pieces: Any, alone: Path, tmp_path: Path
) -> None:
    convert.convert(str(alone), tmp_path / "mlx", DENSE)
    assert (tmp_path / "mlx" / "tokenizer.model").read_bytes() == (alone / "tokenizer.model").read_bytes()
    (tmp_path / "mlx" / "tokenizer.model").unlink()
    made, source = load_tokenizer(tmp_path / "mlx"), load_tokenizer(alone)
    for text in TEXTS:
        assert made(text)["input_ids"] == source(text)["input_ids"]
        assert made(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)


def test_a_folder_without_tokenizer_json_is_exported_to_gguf(pieces: Any, alone: Path, tmp_path: Path) -> None:
    ship(Request(alone, None, tmp_path / "m.gguf"), Gguf("f32"))
    fields = container.read(tmp_path / "m.gguf")
    assert fields.get("tokenizer.ggml.model") == "llama"
    assert fields.get("tokenizer.ggml.tokens")[: len(pieces)] == [pieces.id_to_piece(i) for i in range(len(pieces))]
    assert not (alone / "tokenizer.json").exists()
    if llama_cpp.installed():
        with llama_cpp.runner(tmp_path / "m.gguf") as run:
            for text in TEXTS:
                assert run.tokenize(text) == pieces.encode(text)
