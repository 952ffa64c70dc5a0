"""A GGUF's vocabulary -> Hugging Face's tokenizer files, and the pre-tokenizers that both know.

A GGUF stores tokens, types, merges or scores, but only the *name* of the pre-tokenizer (`tokenizer.ggml.pre`). Each
name needs its exact rules; a tokenizer whose rules are not here is refused in both directions, because a nearly right
pre-tokenizer gives the wrong tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune_convert.errors import UserError
from mlxtune_convert.files import write_json
from mlxtune_convert.gguf_file import File

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types
SPACE = "\u2581"
HINT = "Convert from the original Hugging Face model instead."

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_MARKS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(ending: str, digits: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}|{digits}{_SLASH}"


_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Rules:
    """splits: regexes applied one after another ("digits": each digit alone); words: GPT-2's own regex follows;
    nfc: text is normalised first; ignore_merges: a word that is a token needs no merges."""

    splits: tuple[str, ...] = ()
    words: bool = False
    nfc: bool = False
    ignore_merges: bool = False


PRE_TOKENIZERS = {
    "gpt-2": Rules(words=True),
    "smollm": Rules(("digits",), words=True),
    "starcoder": Rules(("digits",), words=True),
    "command-r": Rules(("digits",), words=True, nfc=True),
    "llama-bpe": Rules((_LLAMA3,), ignore_merges=True),
    "dbrx": Rules((_LLAMA3,)),
    "qwen2": Rules((_QWEN2,), nfc=True),
    "qwen35": Rules((f"{_CONTRACTIONS}|{_MARKS}",), nfc=True),
    "tekken": Rules((_cased("", r"\p{N}"),), ignore_merges=True),
    "gpt-4o": Rules((_cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),)),
    "deepseek-v3": Rules((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3)),
}


def check_supported(file: File) -> None:
    """Raise UserError for a vocabulary that cannot be rebuilt exactly, before any work is done."""
    model, pre = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
    needed = ("tokens", "token_type", "scores" if model == "llama" else "merges")
    missing = [key for key in needed if not isinstance(file.get(f"tokenizer.ggml.{key}"), list)]
    if model in ("gpt2", "llama") and missing:
        raise UserError(
            f"the GGUF's tokenizer has no {missing[0]}", "The file is damaged, or holds no language model of its own."
        )
    if model != "llama" and (model != "gpt2" or pre not in PRE_TOKENIZERS):
        raise UserError(
            f"the GGUF's tokenizer ({model}, pre-tokenizer {str(pre)[:40]}) cannot be rebuilt exactly yet "
            f"(covered: llama; gpt2 with {', '.join(PRE_TOKENIZERS)})",
            HINT,
        )
    tokens, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type")
    others = file.get(f"tokenizer.ggml.{needed[2]}")
    texts = [*tokens, *(others if model == "gpt2" else ())]
    numbers = [*types, *(others if model == "llama" else ())]
    if not all(isinstance(t, str) for t in texts) or not all(isinstance(n, int | float) for n in numbers):
        raise UserError(f"{file.path}: the tokenizer's lists hold values of the wrong type", HINT)
    if len(types) != len(tokens) or (model == "llama" and len(others) != len(tokens)):
        raise UserError(f"{file.path}: {len(tokens)} tokens but {len(types)} token types or scores", HINT)
    if len(set(tokens)) != len(tokens) or (model == "gpt2" and not all(" " in merge for merge in others)):
        raise UserError(f"{file.path}: a token occurs twice, or a merge names one token", HINT)
    for key in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        index = file.get(f"tokenizer.ggml.{key}_token_id", 0)
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise UserError(f"{file.path}: the {key} token {str(index)[:40]} is none of {len(tokens)} tokens", HINT)


def write_tokenizer(file: File, folder: Path, max_length: int) -> list[int]:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; return every end-of-turn token id.

    max_length: the model's context in tokens.
    """

    def get(key: str, default: Any = None) -> Any:
        return file.get(f"tokenizer.ggml.{key}", default)

    tokens: list[str] = get("tokens")
    types: list[int] = get("token_type")
    added = [
        {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": kind in (CONTROL, UNKNOWN)}
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    pieces = get("model") == "llama"
    prefix = bool(get("add_space_prefix", pieces))
    body = _sentencepiece(tokens, types, get("scores"), prefix) if pieces else _byte_level(get("pre"), get("merges"))
    body["model"] |= {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    unknown = get("unknown_token_id")
    body["model"] |= {
        "unk_token": tokens[unknown] if pieces and unknown is not None else None,
        "vocab": {token: i for i, token in enumerate(tokens) if types[i] != UNUSED or token != f"[PAD{i}]"},
    }
    starting = get("add_bos_token", pieces or get("pre") in ("llama-bpe", "tekken"))  # llama.cpp's own defaults
    starts = [tokens[get("bos_token_id")]] if starting and get("bos_token_id") is not None else []
    ends = [tokens[get("eos_token_id")]] if get("add_eos_token") and get("eos_token_id") is not None else []
    if starts or ends:
        sequence: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
        marks = [[{"SpecialToken": {"id": token, "type_id": 0}} for token in side] for side in (starts, ends)]
        ids = {token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]} for token in {*starts, *ends}}
        second = [{"Sequence": {"id": "B", "type_id": 1}}]
        single = [*marks[0], *sequence, *marks[1]]
        body["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": [*single, *second]}
        body["post_processor"]["special_tokens"] = ids
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": None,
        **body,
    }
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    config: dict[str, Any] = {
        # Not the model family's own class: transformers would replace the pre-tokenizer with that class's.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": prefix,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    for key, name in SPECIAL.items():
        index = get(f"{key}_token_id")
        if index is not None:
            config[f"{name}_token"] = tokens[index]
    template = file.get("tokenizer.chat_template")
    if template:
        # Both places: some readers know only one of them.
        config["chat_template"] = template
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)
    found = (get(f"{key}_token_id") for key in ("eos", "eot", "eom"))
    return sorted({index for index in found if index is not None})


SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


def _byte_level(pre: str, merges: list[str]) -> dict[str, Any]:
    rules = PRE_TOKENIZERS[pre]
    steps: list[dict[str, Any]] = [
        {"type": "Digits", "individual_digits": True}
        if regex == "digits"
        else {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in rules.splits
    ]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": rules.words})
    return {
        "normalizer": {"type": "NFC"} if rules.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rules.ignore_merges,
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }


def _sentencepiece(tokens: list[str], types: list[int], scores: list[float], prefix: bool) -> dict[str, Any]:
    """SentencePiece's BPE joins the pair whose result has the highest score, so merges are all splits of all tokens by
    falling score; a token's own splits by their parts' places in the vocabulary.
    """
    ids = {token: index for index, token in enumerate(tokens) if types[index] == NORMAL}
    merges: list[tuple[float, int, list[str]]] = []
    for token, index in ids.items():
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = sorted((ids[a], ids[b]) for a, b in pairs if a in ids and b in ids)
        merges += [(-scores[index], index, [tokens[a], tokens[b]]) for a, b in known]
    merges.sort(key=lambda merge: merge[:2])
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*steps, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "merges": [merge[2] for merge in merges],
        },
    }
