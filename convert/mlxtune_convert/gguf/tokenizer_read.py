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
SPACE = "\u2581"  # how SentencePiece writes a space
KEYS = "tokenizer.ggml."  # before every key of a vocabulary
MODELS = ("llama", "gpt2")  # SentencePiece's BPE, and GPT-2's BPE over bytes
SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # GGUF's word -> transformers'
OTHER_ENDS = ("eot", "eom")  # GGUF's words for further tokens that end an answer

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
    """How a byte-level tokenizer cuts a text into words, which it then merges bytes in."""

    splits: tuple[str, ...] = ()  # regexes applied one after another; "digits": each digit alone
    words: bool = False  # GPT-2's own regex follows
    nfc: bool = False  # text is normalised first: letters with marks become one character
    ignore_merges: bool = False  # a word that is a token needs no merges


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
    model, pre = file.get(f"{KEYS}model"), file.get(f"{KEYS}pre")
    if model in MODELS:
        for key in _lists_of(model):
            if not isinstance(file.get(KEYS + key), list):
                raise UserError(
                    f"the GGUF's tokenizer has no {key}", "The file is damaged, or holds no language model of its own."
                )
    if model not in MODELS or (model == "gpt2" and pre not in PRE_TOKENIZERS):
        raise UserError(
            f"the GGUF's tokenizer ({model}, pre-tokenizer {str(pre)[:40]}) cannot be rebuilt exactly yet "
            f"(covered: llama; gpt2 with {', '.join(PRE_TOKENIZERS)})",
            CONVERT_ORIGINAL,
        )
    _check_lists(file, model)
    _check_ids(file)


def _lists_of(model: str) -> tuple[str, ...]:
    """The lists that a vocabulary needs: SentencePiece's has scores, GPT-2's has merges."""
    return ("tokens", "token_type", "scores" if model == "llama" else "merges")


def _check_lists(file: File, model: str) -> None:
    """Tokens, their types, and scores (as many) or merges ("first second"), all of the right type."""
    tokens, types, others = (file.get(KEYS + key) for key in _lists_of(model))
    pieces = model == "llama"
    texts = tokens if pieces else [*tokens, *others]
    numbers = [*types, *others] if pieces else types
    all_texts = all(isinstance(text, str) for text in texts)
    all_numbers = all(isinstance(number, int | float) for number in numbers)
    if not all_texts or not all_numbers:
        raise UserError(f"{file.path}: the tokenizer's lists hold values of the wrong type", CONVERT_ORIGINAL)
    if len(types) != len(tokens) or (pieces and len(others) != len(tokens)):
        raise UserError(f"{file.path}: {len(tokens)} tokens but {len(types)} token types or scores", CONVERT_ORIGINAL)
    twice = len(set(tokens)) != len(tokens)
    whole_merges = pieces or all(" " in merge for merge in others)
    if twice or not whole_merges:
        raise UserError(f"{file.path}: a token occurs twice, or a merge names one token", CONVERT_ORIGINAL)


def _check_ids(file: File) -> None:
    """The tokens with a role are tokens."""
    count = len(file.get(f"{KEYS}tokens"))
    for key in (*SPECIAL, *OTHER_ENDS):
        index = file.get(f"{KEYS}{key}_token_id", 0)
        if not isinstance(index, int) or not 0 <= index < count:
            raise UserError(
                f"{file.path}: the {key} token {str(index)[:40]} is none of {count} tokens", CONVERT_ORIGINAL
            )


def write_tokenizer(file: File, folder: Path, max_length: int) -> list[int]:
    """Write tokenizer.json, tokenizer_config.json and the chat templates; return every end-of-turn token id.

    max_length: the model's context in tokens. Raises UserError for merges of what are no tokens.
    """

    def get(key: str, default: Any = None) -> Any:
        return file.get(KEYS + key, default)

    tokens: list[str] = get("tokens")
    pieces = get("model") == "llama"
    prefix = bool(get("add_space_prefix", pieces))
    try:
        tokenizer = _sentencepiece(get, prefix) if pieces else _byte_level(get)
    except Exception as error:  # the library has no exception of its own
        raise UserError(f"{file.path}: its tokenizer cannot be built ({error})", CONVERT_ORIGINAL) from error
    _add_whole_tokens(tokenizer, tokens, get("token_type"))
    _add_start_and_end(tokenizer, tokens, get)
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
    ends = {get(f"{key}_token_id") for key in ("eos", *OTHER_ENDS)}
    return sorted(ends - {None})


def _add_whole_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tokens that a text is cut at before anything else; those with a role are left out when ids become text."""
    special, plain = [], []
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, UNKNOWN):
            special.append(AddedToken(token, normalized=False))
        elif kind == USER_DEFINED:
            plain.append(AddedToken(token, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_start_and_end(tokenizer: Tokenizer, tokens: list[str], get: Callable[..., Any]) -> None:
    """The tokens that are put before and after every text."""
    usual = get("model") == "llama" or get("pre") in ("llama-bpe", "tekken")  # llama.cpp's own defaults
    start, end = get("bos_token_id"), get("eos_token_id")
    whole, around = ["$A"], set()
    if get("add_bos_token", usual) and start is not None:
        whole.insert(0, tokens[start])
        around.add(tokens[start])
    if get("add_eos_token") and end is not None:
        whole.append(tokens[end])
        around.add(tokens[end])
    if around:
        ids = [(token, tokens.index(token)) for token in around]
        tokenizer.post_processor = processors.TemplateProcessing(whole, [*whole, "$B:1"], ids)


def _ids(get: Callable[[str], Any]) -> dict[str, int]:
    """Token -> id, without the names that an export gives to ids that have no token."""
    ids = {}
    for index, (token, kind) in enumerate(zip(get("tokens"), get("token_type"), strict=True)):
        if kind != UNUSED or token != f"[PAD{index}]":
            ids[token] = index
    return ids


def _byte_level(get: Callable[[str], Any]) -> Tokenizer:
    rules = PRE_TOKENIZERS[get("pre")]
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges")]
    tokenizer = Tokenizer(models.BPE(_ids(get), merges, ignore_merges=rules.ignore_merges))
    steps: list[Any] = []
    for regex in rules.splits:
        if regex == "digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            steps.append(pre_tokenizers.Split(Regex(regex), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules.words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(get: Callable[[str], Any], prefix: bool) -> Tokenizer:
    """A BPE that joins as SentencePiece does. prefix: a text is tokenized as if a space came before it."""
    tokens, unknown = get("tokens"), get("unknown_token_id")
    merges = _merges_of_scores(tokens, get("token_type"), get("scores"))
    options: dict[str, Any] = {"fuse_unk": True, "byte_fallback": True}
    if unknown is not None:
        options["unk_token"] = tokens[unknown]
    tokenizer = Tokenizer(models.BPE(_ids(get), merges, **options))
    before: list[Any] = [normalizers.Replace(" ", SPACE)]
    after: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        before.insert(0, normalizers.Prepend(SPACE))
        after.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(before)
    tokenizer.decoder = decoders.Sequence(after)
    return tokenizer


def _merges_of_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that make a vocabulary of scores, in the order in which they are tried.

    SentencePiece joins the pair whose result has the highest score, so merges are all splits of all tokens by falling
    score: "the" of score -3 with "t", "h", "e", "th" and "he" gives ("th", "e") and ("t", "he"). A token's own splits
    follow by their parts' places in the vocabulary.
    """
    ids = {token: index for index, token in enumerate(tokens) if types[index] == NORMAL}
    merges: list[tuple[float, int, tuple[str, str]]] = []
    for token, index in ids.items():
        splits = []
        for at in range(1, len(token)):
            first, second = token[:at], token[at:]
            if first in ids and second in ids:
                splits.append((ids[first], ids[second]))
        for a, b in sorted(splits):
            merges.append((-scores[index], index, (tokens[a], tokens[b])))
    merges.sort(key=lambda merge: merge[:2])
    return [pair for _, _, pair in merges]
