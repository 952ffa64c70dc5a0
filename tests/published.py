"""Chat templates as models are published with them, out of the package trl, and small tokenizers that fit them.

trl itself is never imported: it brings half of PyTorch's world along, and only its files are read.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.metadata import files
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Qwen's way to cut text before merging: newlines stay with the signs before them, blanks with the word after them.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What the merges are learnt from: markup at borders, doubled blanks and newlines.
LESSON = [
    "assistant\n\nThe answer.\n\nuser\nWhat is the answer?\n",
    "<think>\n\n</think>\n\nThe answer.\n",
    "<think>\nThe user asks.\n</think>\n\n  Two  blanks.\n\n\n",
    "system\n\nYou are short.  \n \n  model\n[/INST] The\n[INST]  user\n: Yes. Assistant: User:\n",
    '{"name": "look", "arguments": {"x": 1}}\n<function=look>\n<parameter=x>\n1\n</parameter>\n</function>\n',
]
SPLIT_OPEN = ("<think>", "</think>")  # special tokens of some vocabularies, ordinary text in others

# family: (its special tokens, end of sequence, beginning of sequence, what ends the model's turn)
CHATML = (
    "<|endoftext|> <|im_start|> <|im_end|> <think> </think> <tool_call> </tool_call> <tool_response> </tool_response>"
)
GEMMA4 = (
    "<bos> <eos> <pad> <|turn> <turn|> <|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> "
    '<|channel> <channel|> <|think|> <|"|> <|image|> <|audio|> <|video|>'
)
DEEPSEEK = (
    "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> <think> </think> <｜tool▁sep｜> "
    "<｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> "
    "<｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜>"
)
GLM = (
    "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|endoftext|> <think> </think> /nothink "
    "<tool_call> </tool_call> <arg_key> </arg_key> <arg_value> </arg_value> <tool_response> </tool_response>"
)
LLAMA3 = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>"
COHERE = (
    "<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> "
    "<|START_RESPONSE|> <|END_RESPONSE|>"
)
HARMONY = "<|start|> <|end|> <|message|> <|channel|> <|return|> <|call|> <|constrain|> <|endoftext|> <|startoftext|>"
LFM2 = (
    "<|startoftext|> <|endoftext|> <|im_start|> <|im_end|> <|tool_list_start|> <|tool_list_end|> <|tool_call_start|> "
    "<|tool_call_end|> <|tool_response_start|> <|tool_response_end|> <think> </think>"
)
FAMILIES: dict[str, tuple[str, str, str | None, tuple[str, ...]]] = {
    "cohere": (COHERE, "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", ("<|END_OF_TURN_TOKEN|>",)),
    "deepseek": (DEEPSEEK, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", ("<｜end▁of▁sentence｜>",)),
    "diffusion_gemma": (GEMMA4, "<eos>", "<bos>", ("<turn|>", "<|tool_response>")),
    "gemma4": (GEMMA4, "<eos>", "<bos>", ("<turn|>", "<|tool_response>")),
    "gemma": ("<bos> <eos> <start_of_turn> <end_of_turn> <start_of_image>", "<eos>", "<bos>", ("<end_of_turn>",)),
    "glm": (GLM, "<|endoftext|>", None, ("<|user|>", "<|observation|>")),
    "gptoss": (HARMONY, "<|return|>", "<|startoftext|>", ("<|return|>", "<|call|>")),
    "idefics3": ("<|begin_of_text|> <end_of_utterance>", "<end_of_utterance>", None, ("<end_of_utterance>",)),
    "lfm2": (LFM2, "<|im_end|>", "<|startoftext|>", ("<|im_end|>",)),
    "llama3": (LLAMA3, "<|eot_id|>", "<|begin_of_text|>", ("<|eot_id|>", "<|eom_id|>")),
    "llava": ("<s> </s>", "</s>", "<s>", ("</s>",)),
    "muse": ("<s> </s> <|start|> <|message|> <|eom|> <|eot|>", "</s>", "<s>", ("<|eot|>",)),
    "nemotron": (f"<s> </s> {CHATML}", "<|im_end|>", "<s>", ("<|im_end|>",)),
    "phi3": ("<s> <|user|> <|assistant|> <|system|> <|end|> <|endoftext|>", "<|endoftext|>", "<s>", ("<|end|>",)),
    "qwen": (f"{CHATML} <|vision_start|> <|vision_end|>", "<|im_end|>", None, ("<|im_end|>",)),
    "smolvlm": ("<|im_start|> <end_of_utterance>", "<end_of_utterance>", None, ("<end_of_utterance>",)),
}


@cache
def _files() -> dict[str, Path]:
    found = [Path(str(one.locate())) for one in files("trl") or () if "chat_templates" in one.parts]
    return {path.stem: path for path in found if path.suffix == ".jinja"}


def names() -> list[str]:
    """The published templates."""
    return sorted(name for name in _files() if not name.endswith("_training"))


def variants() -> list[str]:
    """The templates that mark what the assistant generates."""
    return sorted(name for name in _files() if re.search(r"{%-?\s*generation\b", source(name)))


@cache
def source(name: str) -> str:
    return _files()[name].read_text(encoding="utf-8")


def family_of(name: str) -> str:
    """The longest family whose name the template's begins with."""
    return max((family for family in FAMILIES if name.startswith(family)), key=len)


def ends_of(name: str) -> tuple[str, ...]:
    """The tokens one of which ends every turn of the model."""
    return FAMILIES[family_of(name)][3]


@cache
def bpe(special: tuple[str, ...]) -> Tokenizer:
    """Byte-level BPE that merges blanks and newlines with what stands before and after them, as Qwen's does."""
    inner = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(WORDS), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(LESSON * 4, trainer)
    inner.add_special_tokens(list(special))
    return inner


@cache
def pieces(special: tuple[str, ...]) -> Tokenizer:
    """SentencePiece's BPE with byte fallback, as Llama 2's: a blank is put before each stretch of text."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    lesson = [" " + line for text in LESSON for line in text.split("\n")]
    learner.train_from_iterator(lesson * 4, trainers.BpeTrainer(vocab_size=320, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    printable = [chr(code) for code in range(33, 127)]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *printable, *learnt["vocab"]]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(pair) for pair in learnt["merges"]]
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(parts)
    inner.add_special_tokens(list(special))
    return inner


@cache
def tokenizer(name: str, kind: str = "bpe", thinks: bool = True) -> Any:
    """The tokenizer of a published template. kind: bpe or pieces; thinks: whether the thinking tags are tokens."""
    special, eos, bos, _ = FAMILIES[family_of(name)]
    return made(source(name), special.split(), eos, bos, kind, thinks)


def made(
    text: str, special: list[str], eos: str, bos: str | None = None, kind: str = "bpe", thinks: bool = True
) -> Any:
    """A tokenizer with a chat template of its own. Tokens like <|this|> that the text writes are special too."""
    written = re.findall(r"<\|[\w.]+\|>|<｜[\w▁]+｜>", text)
    own = tuple(token for token in dict.fromkeys([*special, *written]) if thinks or token not in SPLIT_OPEN)
    inner = {"bpe": bpe, "pieces": pieces}[kind](own)
    out = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=eos, bos_token=bos, clean_up_tokenization_spaces=False
    )
    out.chat_template = text
    return out
