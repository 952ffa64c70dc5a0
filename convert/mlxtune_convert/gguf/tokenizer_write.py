"""Hugging Face's tokenizer files -> a GGUF's vocabulary: tokens, types, merges or scores, and the rules' name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune_convert.errors import UserError
from mlxtune_convert.files import read_json
from mlxtune_convert.gguf.container import Field
from mlxtune_convert.gguf.tokenizer_read import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SPECIAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from mlxtune_convert.hf import chat_templates

LARGEST_ID = 1 << 31  # of a token: ids are 32-bit numbers


def fields(folder: Path, rows: int, whole: dict[str, Any] | None = None) -> dict[str, Field]:
    """The tokenizer of a model folder as GGUF metadata.

    rows: of the embedding; ids without a token are named unused; whole: its tokenizer.json, where the folder has none
    (SentencePiece's tokenizer.model alone).

    Raises UserError for a tokenizer that llama.cpp cannot reproduce.
    """
    whole = whole or read_json(folder / "tokenizer.json", "the model's tokenizer")
    try:
        return _fields(folder, rows, whole)
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        wrong = f"{folder}: its tokenizer cannot be written to GGUF ({type(error).__name__}: {error})"
        raise UserError(wrong, "Its tokenizer.json is damaged, or of a kind that is not known here.") from error


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens of a tokenizer.json, and how llama.cpp calls them."""

    pieces: bool  # SentencePiece's BPE, which spells what is no token in bytes; else GPT-2's BPE over bytes
    tokens: dict[int, str]  # id -> token; not every id below the largest need have one
    types: dict[int, int]  # id -> llama.cpp's type, of the same ids
    ids: dict[str, int]  # token -> id
    merges: list[str]  # "first second", in the order in which they are tried
    unknown: int | None  # id of the token for what is no token, of SentencePiece

    @staticmethod
    def of(whole: dict[str, Any], folder: Path) -> _Vocabulary:
        """whole: a tokenizer.json; folder: for messages. Raises UserError for what is no BPE."""
        model = whole.get("model") or {}
        if model.get("type") != "BPE":
            kind = model.get("type")
            raise UserError(f"{folder}: tokenizers of type {kind!r} cannot be written to GGUF yet (only BPE)")
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        tokens = {index: token for token, index in model["vocab"].items()}
        types = dict.fromkeys(tokens, NORMAL)
        for entry in whole.get("added_tokens", []):
            tokens[entry["id"]] = entry["content"]
            types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
        ids = {token: index for index, token in tokens.items()}
        pieces = bool(model.get("byte_fallback"))
        unknown = None
        if pieces:
            for byte in range(256):
                name = f"<0x{byte:02X}>"
                if name in ids:
                    types[ids[name]] = BYTE
            unknown = ids.get(model.get("unk_token"))
            if unknown is not None:
                types[unknown] = UNKNOWN
        return _Vocabulary(pieces, tokens, types, ids, merges, unknown)


def _fields(folder: Path, rows: int, whole: dict[str, Any]) -> dict[str, Field]:
    """The same, of a tokenizer.json that may hold anything."""
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file, "the tokenizer's settings") if settings_file.is_file() else {}
    vocabulary = _Vocabulary.of(whole, folder)
    known = max(vocabulary.tokens) + 1
    if known > rows:
        raise UserError(f"{folder}: the tokenizer knows {known} tokens, the model {rows}")
    if vocabulary.pieces:
        out = {"model": "llama", "pre": "default"} | _listed(vocabulary, rows)
        out["scores"] = _scores(out["token_type"], _made(vocabulary))
        out["add_space_prefix"] = _prepends(whole)
        if vocabulary.unknown is not None:
            out["unknown_token_id"] = vocabulary.unknown
    else:
        out = {"model": "gpt2", "pre": pre_tokenizer(whole, folder)} | _listed(vocabulary, rows)
        out["merges"] = vocabulary.merges
    out |= _special_ids(vocabulary, settings)
    out |= _further_ends(vocabulary, folder, taken=out)
    start, out["add_eos_token"] = _added(whole, settings)
    out["add_bos_token"] = bool(start)
    if isinstance(start, str) and start in vocabulary.ids:
        out["bos_token_id"] = vocabulary.ids[start]
    found = {f"tokenizer.ggml.{key}": Field.of(value) for key, value in out.items()}
    return found | chat_templates.fields(chat_templates.of_folder(folder))


def _listed(vocabulary: _Vocabulary, rows: int) -> dict[str, Any]:
    """Tokens and types of all ids, one for each row of the embedding."""
    return {
        "tokens": [vocabulary.tokens.get(index, f"[PAD{index}]") for index in range(rows)],
        "token_type": [vocabulary.types.get(index, UNUSED) for index in range(rows)],
    }


def _made(vocabulary: _Vocabulary) -> list[int]:
    """The id of the token that each merge makes."""
    return [vocabulary.ids["".join(merge.split(" ", 1))] for merge in vocabulary.merges]


def _special_ids(vocabulary: _Vocabulary, settings: dict[str, Any]) -> dict[str, int]:
    """The ids of the tokens that tokenizer_config.json gives a role, by GGUF's key."""
    found = {}
    for key, name in SPECIAL.items():
        token = settings.get(f"{name}_token")
        if isinstance(token, dict):  # transformers' older way to write an added token
            token = token.get("content")
        if token in vocabulary.ids:
            found[f"{key}_token_id"] = vocabulary.ids[token]
    return found


def _further_ends(vocabulary: _Vocabulary, folder: Path, taken: dict[str, Any]) -> dict[str, int]:
    """The other ids that end an answer, under what is not taken of the keys that llama.cpp has for such (three)."""
    free = [f"{key}_token_id" for key in ("eos", "eot", "eom") if f"{key}_token_id" not in taken]
    ends = []
    for index in end_ids(folder):
        if index in vocabulary.tokens and index != taken.get("eos_token_id"):
            ends.append(index)
    return dict(zip(free, ends, strict=False))


def end_ids(folder: Path) -> list[int]:
    """Every id that ends an answer, of the generation settings and the configuration. What is no id is left out."""
    found: dict[int, None] = {}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            listed = read_json(folder / name, "a model's settings").get("eos_token_id")
            found |= dict.fromkeys(token_ids(listed))
    return list(found)


def token_ids(listed: Any) -> list[int]:
    """The ids in an eos_token_id as configurations have it: one, a list of them, or null. What is no id is left out."""
    ids = listed if isinstance(listed, list) else [listed]
    return [index for index in ids if type(index) is int and 0 <= index < LARGEST_ID]


def _scores(types: list[int], made: list[int]) -> list[float]:
    """SentencePiece joins the pair whose result has the highest score. made: what each merge makes, first to last.

    Most vocabularies number their pieces by falling score, so minus the distance from the first normal piece is the
    score itself; where the merges say otherwise they count. (A constant would make llama.cpp join in another order.)
    """
    order = list(dict.fromkeys(made))
    first = types.index(NORMAL)
    if order == sorted(order):
        return [float(first - index) if kind == NORMAL else 0.0 for index, kind in enumerate(types)]
    places = {index: place for place, index in enumerate(order)}
    return [float(-places.get(index, len(order))) if kind == NORMAL else 0.0 for index, kind in enumerate(types)]


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json, which is one step or a sequence of them. inner: the sequence's key."""
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _prepends(whole: dict[str, Any]) -> bool:
    """Whether a text is tokenized as if a space came before it."""
    steps = [*_steps(whole.get("normalizer"), "normalizers"), *_steps(whole.get("pre_tokenizer"), "pretokenizers")]
    for step in steps:
        if step["type"] == "Prepend":
            return True
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
    return False


def pre_tokenizer(whole: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name for a byte-level tokenizer.json's rules. Raises UserError for rules it has no name for."""
    splits, words, level = [], False, False
    for step in _steps(whole.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            level, words = True, step.get("use_regex", True)
        else:
            splits.append(_split(step))
    normal = [step["type"] for step in _steps(whole.get("normalizer"), "normalizers")]
    shape = (tuple(splits), words, bool(whole["model"].get("ignore_merges")))
    fitting = []
    for name, rules in PRE_TOKENIZERS.items():
        if (rules.splits, rules.words, rules.ignore_merges) == shape:
            fitting.append(name)
    if level and fitting and normal in ([], ["NFC"]):
        for name in fitting:
            if PRE_TOKENIZERS[name].nfc == bool(normal):
                return name
        return fitting[0]  # the same splits, though with NFC where this has none, or the other way round
    raise UserError(
        f"{folder}: llama.cpp has no pre-tokenizer known to split as this tokenizer.json does",
        "`--to hf` exports the model with its own tokenizer.",
    )


def _split(step: dict[str, Any]) -> str:
    """A step as `Rules.splits` has it; the type of a step that is none of those, which no rules have."""
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "Split" and "Regex" in step["pattern"] and (step["behavior"] == "Isolated" or step["invert"]):
        return str(step["pattern"]["Regex"])
    return str(step["type"])


def _added(whole: dict[str, Any], settings: dict[str, Any]) -> tuple[str | bool, bool]:
    """The token that is put before every text (or whether there is one), and whether one is put after."""
    for step in _steps(whole.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing":
            first, last = step["single"][0], step["single"][-1]
            return first["SpecialToken"]["id"] if "SpecialToken" in first else False, "SpecialToken" in last
    if whole.get("post_processor") is None and "add_bos_token" in settings and whole["model"].get("byte_fallback"):
        return bool(settings["add_bos_token"]), bool(settings.get("add_eos_token"))
    return False, False
