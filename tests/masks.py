"""Tokenizers with chat templates of our own writing, and the text that a mask supervises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxtune.data.chat import masking, repairs

TEMPLATES = Path(__file__).parent / "templates"
Messages = list[dict[str, Any]]


def byte_tokenizer(special: list[str], merges: tuple[tuple[str, str], ...] = ()) -> Tokenizer:
    """Byte-level BPE, as GPT-2's: one token per byte but for the merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special, *letters, *(a + b for a, b in merges)]
    inner = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    return inner


def piece_tokenizer(special: list[str], merges: tuple[tuple[str, str], ...] = ()) -> Tokenizer:
    """SentencePiece's BPE with byte fallback, as Llama 2's: spaces are ▁, one is put before each stretch of text."""
    printable = [chr(code) for code in range(33, 127)]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *printable, *(a + b for a, b in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(parts)
    inner.add_special_tokens(special)
    return inner


def with_template(inner: Tokenizer, template: str | dict[str, str], eos: str, bos: str | None = None) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


# name: (special tokens, end token, beginning token)
FAMILIES: dict[str, tuple[str, str, str | None]] = {
    "llama": (
        "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
    ),
    "gemma": (
        "<bos> <eos> <|turn> <turn|> <|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> "
        "<|channel> <channel|>",
        "<eos>",
        "<bos>",
    ),
    "mistral": (
        "<s> </s> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]",
        "</s>",
        "<s>",
    ),
    "harmony": ("<|start|> <|end|> <|message|> <|channel|> <|return|> <|call|>", "<|return|>", None),
    "qwen": ("<|im_start|> <|im_end|> <|endoftext|> <think> </think>", "<|im_end|>", None),
    "deepseek": (
        "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> <think> </think> <｜tool▁sep｜> "
        "<｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> "
        "<｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜>",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
    ),
    "glm": ("[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|endoftext|>", "<|endoftext|>", None),
    "phi": ("<|user|> <|assistant|> <|system|> <|end|> <|endoftext|>", "<|endoftext|>", None),
    "olmo": ("<|user|> <|assistant|> <|system|> <|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "cohere": (
        "<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>",
    ),
    "bare": ("<eos>", "<eos>", None),
}


def family(name: str, kind: Callable[[list[str]], Tokenizer] = byte_tokenizer) -> Any:
    """The tokenizer of one family, with its template."""
    special, eos, bos = FAMILIES[name]
    template: Any = source(name)
    if name == "cohere":
        template = {"default": template, "tool_use": source("cohere_tools")}
    return with_template(kind(special.split()), template, eos, bos)


def source(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def supervised(tokenizer: Any, messages: Messages, tools: Any = None, **kwargs: Any) -> list[str]:
    """The runs of supervised text; also asserts that ids are the tokenizer's own for the repaired messages."""
    example = masking.render(tokenizer, messages, tools, **kwargs)
    repaired = repairs.repaired(masking.template_of(tokenizer, kwargs), messages)
    own = tokenizer.apply_chat_template(repaired, tools=tools, tokenize=True, return_dict=False, **kwargs)
    assert list(example.ids) == list(own)
    return runs(tokenizer, example)


def runs(tokenizer: Any, example: Any) -> list[str]:
    """Neighbouring supervised tokens, decoded together: byte-level text needs its bytes joined."""
    out: list[list[int]] = []
    for before, (token, flag) in zip([0, *example.mask], zip(example.ids, example.mask, strict=True), strict=False):
        if flag and not before:
            out.append([])
        if flag:
            out[-1].append(int(token))
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in out]


def turns(*texts: str) -> Messages:
    """user, assistant, user, ... turns."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
