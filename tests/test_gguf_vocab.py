"""Vocabularies in and out of GGUF: the tokenizers library on the original is the oracle, llama.cpp the witness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from mlxtune_convert.errors import UserError
from mlxtune_convert.gguf import model_read, tokenizer_read, tokenizer_write
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mlxtune.ship import llama_cpp
from mlxtune.ship.export import ship
from mlxtune.ship.gguf import Gguf
from mlxtune.ship.request import Request

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
HARD = [
    "a  12 345   6789",
    "I'll we'VE can't",
    "naïve ÀÉÎ 日本語 العربية हिन्दी 한국어 Ωμέγα кириллица",
    "👩‍👩‍👧‍👦 ½ ² ٣",
    "\t\tx = 1_000\r\n\r\n  y",
    "a\n\n\nb   ",
    "HelloWorld fooBar/baz\n//x",
    "<|im_start|>user\nhi<|im_end|>\n",
]
TEXTS = [*HARD, *README.splitlines(), README]


def byte_level(pre: str) -> dict[str, Any]:
    """A tokenizer with the rules of `pre`, trained on the README."""
    rules = tokenizer_read.PRE_TOKENIZERS[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=rules.ignore_merges))
    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if rule == "digits"
        else pre_tokenizers.Split(Regex(rule), "isolated")
        for rule in rules.splits
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules.words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.normalizer = normalizers.NFC() if rules.nfc else None
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=tiny.SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([README, *HARD], trainer)
    return json.loads(tokenizer.to_str())


def sentencepiece(prefix: bool, scrambled: bool = False) -> dict[str, Any]:
    """Pieces numbered by falling score, bytes for what has no piece, as Llama 2's; scrambled: numbered otherwise."""
    tokenizer = Tokenizer(models.BPE())
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[], show_progress=False, limit_alphabet=60)
    tokenizer.train_from_iterator(README.splitlines(), trainer)
    whole = json.loads(tokenizer.to_str())
    pieces = sorted(whole["model"]["vocab"], key=whole["model"]["vocab"].get)
    made = {"".join(merge) for merge in whole["model"]["merges"]}
    # SentencePiece puts single characters last.
    pieces = [piece for piece in pieces if piece in made] + [piece for piece in pieces if piece not in made]
    if scrambled:
        pieces = pieces[100:] + pieces[:100]
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    whole["model"] |= {"vocab": {piece: index for index, piece in enumerate([*head, *pieces])}}
    whole["model"] |= {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    start = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    whole["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": {"<s>": start},
    }
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    whole["added_tokens"] = [{"id": index, "content": token, **plain} for index, token in enumerate(head[:3])]
    return whole


KINDS = {
    **{
        pre: (lambda pre=pre: byte_level(pre))
        for pre in tokenizer_read.PRE_TOKENIZERS
        if pre not in ("starcoder", "command-r")
    },
    "llama": lambda: sentencepiece(True),
    "gemma": lambda: sentencepiece(False),
    "mistral": lambda: sentencepiece(True, scrambled=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_and_the_rebuilt_tokenizer_split_as_the_original(kind: str, tmp_path: Path) -> None:
    whole = KINDS[kind]()
    size = len(whole["model"]["vocab"])
    folder = tiny.make_model(tmp_path / "hf", vocab_size=size + 5, num_hidden_layers=1)
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    eos = "</s>" if "<unk>" in whole["model"]["vocab"] else "<|im_end|>"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "chat_template": tiny.CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    ship(Request(folder, None, tmp_path / "m.gguf"), Gguf("f32"))
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    opened = model_read.open_gguf(tmp_path / "m.gguf")
    (tmp_path / "back").mkdir()
    model_read.convert(opened, tmp_path / "back")
    rebuilt = Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json"))
    # llama.cpp approximates letter case outside ASCII for these two.
    texts = [text for text in TEXTS if text.isascii() or kind not in ("tekken", "gpt-4o")]
    expected = [original.encode(text, add_special_tokens=False).ids for text in texts]
    assert [rebuilt.encode(text, add_special_tokens=False).ids for text in texts] == expected
    assert rebuilt.encode("a").ids == original.encode("a").ids
    with llama_cpp.runner(tmp_path / "m.gguf") as run:
        differing = [text for text, ids in zip(texts, expected, strict=True) if run.tokenize(text) != ids]
    assert not differing
    assert len(texts) > 100
    assert opened.file.get("tokenizer.ggml.tokens")[-5:] == [f"[PAD{size + index}]" for index in range(5)]
    assert opened.file.get("tokenizer.ggml.eot_token_id") == 0
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == {"eos_token_id": [0, 2]}
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == tiny.CHATML
    again = tokenizer_write.fields(tmp_path / "back", size + 5)
    mine = {key: field for key, field in opened.file.fields.items() if key.startswith("tokenizer.")}
    assert {key: field.value for key, field in again.items() if key in mine} == {k: f.value for k, f in mine.items()}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no pre-tokenizer known"),
        ({"normalizer": {"type": "Lowercase"}}, "no pre-tokenizer known"),
        ({"model": {"type": "Unigram", "vocab": []}}, "tokenizers of type 'Unigram'"),
    ],
)
def test_rules_that_llama_cpp_does_not_have_are_refused(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({**byte_level("qwen2"), **change}))
    with pytest.raises(UserError, match=expected):
        tokenizer_write.fields(tmp_path, 1000)


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level("gpt-2")))
    with pytest.raises(UserError, match="the model 300"):
        tokenizer_write.fields(tmp_path, 300)


def test_a_start_token_is_said(tmp_path: Path) -> None:
    """llama.cpp adds one to some vocabularies unless it is told not to."""
    whole = byte_level("llama-bpe")
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    for starts in (False, True):
        if starts:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
            )
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        assert tokenizer_write.fields(tmp_path, 1000)["tokenizer.ggml.add_bos_token"].value is starts
