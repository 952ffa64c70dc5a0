"""Hugging Face's tokenizer files -> a GGUF's vocabulary: tokens, types, merges or scores, and the rules' name."""

from __future__ import annotations

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
    """The tokenizer of a model folder as GGUF metadata. rows: of the embedding; ids without a token are named unused;
    whole: its tokenizer.json, where the folder has none (SentencePiece's tokenizer.model alone).

    Raises UserError for a tokenizer that llama.cpp cannot reproduce.
    """
    whole = whole or read_json(folder / "tokenizer.json", "the model's tokenizer")
    try:
        return _fields(folder, rows, whole)
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        wrong = f"{folder}: its tokenizer cannot be written to GGUF ({type(error).__name__}: {error})"
        raise UserError(wrong, "Its tokenizer.json is damaged, or of a kind that is not known here.") from error


def _fields(folder: Path, rows: int, whole: dict[str, Any]) -> dict[str, Field]:
    """The same, of a tokenizer.json that may hold anything."""
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file, "the tokenizer's settings") if settings_file.is_file() else {}
    model = whole.get("model") or {}
    if model.get("type") != "BPE":
        raise UserError(f"{folder}: tokenizers of type {model.get('type')!r} cannot be written to GGUF yet (only BPE)")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    pieces = bool(model.get("byte_fallback"))
    tokens = {index: token for token, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for entry in whole.get("added_tokens", []):
        tokens[entry["id"]] = entry["content"]
        types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    ids = {token: index for index, token in tokens.items()}
    if max(tokens) >= rows:
        raise UserError(f"{folder}: the tokenizer knows {max(tokens) + 1} tokens, the model {rows}")
    if pieces:
        types |= {ids[name]: BYTE for byte in range(256) if (name := f"<0x{byte:02X}>") in ids}
        unknown = ids.get(model.get("unk_token"))
        types |= {} if unknown is None else {unknown: UNKNOWN}
    out: dict[str, Any] = {
        "model": "llama" if pieces else "gpt2",
        "pre": "default" if pieces else pre_tokenizer(whole, folder),
        "tokens": [tokens.get(index, f"[PAD{index}]") for index in range(rows)],
        "token_type": [types.get(index, UNUSED) for index in range(rows)],
    }
    if pieces:
        out["scores"] = _scores(out["token_type"], [ids["".join(merge.split(" ", 1))] for merge in merges])
        out["add_space_prefix"] = _prepends(whole)
        out |= {} if unknown is None else {"unknown_token_id": unknown}
    else:
        out["merges"] = merges
    for key, name in SPECIAL.items():
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            out[f"{key}_token_id"] = ids[token]
    ends = [index for index in end_ids(folder) if index in tokens and index != out.get("eos_token_id")]
    for key, index in zip([key for key in ("eos", "eot", "eom") if f"{key}_token_id" not in out], ends, strict=False):
        out[f"{key}_token_id"] = index
    start, out["add_eos_token"] = _added(whole, settings)
    out["add_bos_token"] = bool(start)
    if isinstance(start, str) and start in ids:
        out["bos_token_id"] = ids[start]
    found = {f"tokenizer.ggml.{key}": Field.of(value) for key, value in out.items()}
    return found | chat_templates.fields(chat_templates.of_folder(folder))


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
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _prepends(whole: dict[str, Any]) -> bool:
    steps = [*_steps(whole.get("normalizer"), "normalizers"), *_steps(whole.get("pre_tokenizer"), "pretokenizers")]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def pre_tokenizer(whole: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name for a byte-level tokenizer.json's rules. Raises UserError for rules it has no name for."""
    splits, words, level = [], False, False
    for step in _steps(whole.get("pre_tokenizer"), "pretokenizers"):
        if (
            step["type"] == "Split"
            and "Regex" in step["pattern"]
            and (step["behavior"] == "Isolated" or step["invert"])
        ):
            splits.append(step["pattern"]["Regex"])
        elif step["type"] == "Digits" and step["individual_digits"]:
            splits.append("digits")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            level, words = True, step.get("use_regex", True)
        else:
            splits.append(step["type"])
    normal = [step["type"] for step in _steps(whole.get("normalizer"), "normalizers")]
    shape = (tuple(splits), words, bool(whole["model"].get("ignore_merges")))
    found = [name for name, r in PRE_TOKENIZERS.items() if (r.splits, r.words, r.ignore_merges) == shape]
    if level and found and normal in ([], ["NFC"]):
        return next((name for name in found if PRE_TOKENIZERS[name].nfc == bool(normal)), found[0])
    raise UserError(
        f"{folder}: llama.cpp has no pre-tokenizer known to split as this tokenizer.json does",
        "`--to hf` exports the model with its own tokenizer.",
    )


def _added(whole: dict[str, Any], settings: dict[str, Any]) -> tuple[str | bool, bool]:
    """The token that is put before every text (or whether there is one), and whether one is put after."""
    for step in _steps(whole.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing":
            first, last = step["single"][0], step["single"][-1]
            return first["SpecialToken"]["id"] if "SpecialToken" in first else False, "SpecialToken" in last
    if whole.get("post_processor") is None and "add_bos_token" in settings and whole["model"].get("byte_fallback"):
        return bool(settings["add_bos_token"]), bool(settings.get("add_eos_token"))
    return False, False
