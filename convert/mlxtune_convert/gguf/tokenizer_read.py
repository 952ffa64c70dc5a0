"""A GGUF's vocabulary -> Hugging Face's tokenizer files, and the pre-tokenizers that both know.

A GGUF stores tokens, types, merges or scores, but only the *name* of the pre-tokenizer (`tokenizer.ggml.pre`). Each
name needs its exact rules; a tokenizer whose rules are not here is refused in both directions, because a nearly right
pre-tokenizer gives the wrong tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mlxtune_convert.errors import CONVERT_ORIGINAL, UserError
from mlxtune_convert.files import write_json
from mlxtune_convert.gguf.container import File
from mlxtune_convert.hf import chat_templates

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types
SPACE = "\u2581"

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
            CONVERT_ORIGINAL,
        )
    tokens, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type")
    others = file.get(f"tokenizer.ggml.{needed[2]}")
    texts = [*tokens, *(others if model == "gpt2" else ())]
    numbers = [*types, *(others if model == "llama" else ())]
    if not all(isinstance(t, str) for t in texts) or not all(isinstance(n, int | float) for n in numbers):
        raise UserError(f"{file.path}: the tokenizer's lists hold values of the wrong type", CONVERT_ORIGINAL)
    if len(types) != len(tokens) or (model == "llama" and len(others) != len(tokens)):
        raise UserError(f"{file.path}: {len(tokens)} tokens but {len(types)} token types or scores", CONVERT_ORIGINAL)
    if len(set(tokens)) != len(tokens) or (model == "gpt2" and not all(" " in merge for merge in others)):
        raise UserError(f"{file.path}: a token occurs twice, or a merge names one token", CONVERT_ORIGINAL)
    for key in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        index = file.get(f"tokenizer.ggml.{key}_token_id", 0)
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise UserError(
                f"{file.path}: the {key} token {str(index)[:40]} is none of {len(tokens)} tokens", CONVERT_ORIGINAL
            )


def write_tokenizer(file: File, folder: Path, max_length: int) -> list[int]:
    """Write tokenizer.json, tokenizer_config.json and the chat templates; return every end-of-turn token id.

    max_length: the model's context in tokens. Raises UserError for merges of what are no tokens.
    """

    def get(key: str, default: Any = None) -> Any:
        return file.get(f"tokenizer.ggml.{key}", default)

    tokens: list[str] = get("tokens")
    pieces = get("model") == "llama"
    prefix = bool(get("add_space_prefix", pieces))
    try:
        tokenizer = _sentencepiece(get, prefix) if pieces else _byte_level(get)
    except Exception as error:  # the library has no exception of its own
        raise UserError(f"{file.path}: its tokenizer cannot be built ({error})", CONVERT_ORIGINAL) from error
    typed = list(zip(tokens, get("token_type"), strict=True))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t, kind in typed if kind in (CONTROL, UNKNOWN)])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in typed if kind == USER_DEFINED])
    starting = get("add_bos_token", pieces or get("pre") in ("llama-bpe", "tekken"))  # llama.cpp's own defaults
    starts = [tokens[get("bos_token_id")]] if starting and get("bos_token_id") is not None else []
    ends = [tokens[get("eos_token_id")]] if get("add_eos_token") and get("eos_token_id") is not None else []
    if starts or ends:
        whole = [*starts, "$A", *ends]
        around = [(token, tokens.index(token)) for token in {*starts, *ends}]
        tokenizer.post_processor = processors.TemplateProcessing(whole, [*whole, "$B:1"], around)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
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
    templates = chat_templates.of_gguf(file)
    if templates:
        # Both places: some readers know only one of them.
        config["chat_template"] = chat_templates.for_config(templates)
        chat_templates.write(folder, templates)
    write_json(folder / "tokenizer_config.json", config)
    found = (get(f"{key}_token_id") for key in ("eos", "eot", "eom"))
    return sorted({index for index in found if index is not None})


SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


def _ids(get: Callable[[str], Any]) -> dict[str, int]:
    """Token -> id, without the names that an export gives to ids that have no token."""
    typed = enumerate(zip(get("tokens"), get("token_type"), strict=True))
    return {token: index for index, (token, kind) in typed if kind != UNUSED or token != f"[PAD{index}]"}


def _byte_level(get: Callable[[str], Any]) -> Tokenizer:
    rules = PRE_TOKENIZERS[get("pre")]
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges")]
    tokenizer = Tokenizer(models.BPE(_ids(get), merges, ignore_merges=rules.ignore_merges))
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if regex == "digits"
        else pre_tokenizers.Split(Regex(regex), "isolated")
        for regex in rules.splits
    ]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules.words)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(get: Callable[[str], Any], prefix: bool) -> Tokenizer:
    """SentencePiece's BPE joins the pair whose result has the highest score, so merges are all splits of all tokens by
    falling score; a token's own splits by their parts' places in the vocabulary.
    """
    tokens, types, scores, unknown = (get(key) for key in ("tokens", "token_type", "scores", "unknown_token_id"))
    ids = {token: index for index, token in enumerate(tokens) if types[index] == NORMAL}
    merges: list[tuple[float, int, tuple[str, str]]] = []
    for token, index in ids.items():
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = sorted((ids[a], ids[b]) for a, b in pairs if a in ids and b in ids)
        merges += [(-scores[index], index, (tokens[a], tokens[b])) for a, b in known]
    merges.sort(key=lambda merge: merge[:2])
    options = {"fuse_unk": True, "byte_fallback": True} | ({} if unknown is None else {"unk_token": tokens[unknown]})
    tokenizer = Tokenizer(models.BPE(_ids(get), [merge[2] for merge in merges], **options))
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([*([normalizers.Prepend(SPACE)] if prefix else []), spaces])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    back = decoders.Replace(SPACE, " ")
    tokenizer.decoder = decoders.Sequence([back, decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer
