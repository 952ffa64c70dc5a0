"""Masks against those of TRL, whose training variants mark what the assistant generates.

The variants print other text than the published templates, so a variant is compared with itself, rendered whole.
"""

from __future__ import annotations

from itertools import groupby, zip_longest

import published
import pytest
from conversations import CONVERSATIONS, TOOL
from random_conversations import rendered

from mlxtune.data.chat import masking, repairs

ASSISTANT = "<|start|>assistant"
# Why a mask differs: (who alone trains it, texts).
REASONS = {
    "blank": ("theirs", {"\n"}),  # printed behind the end token
    "second end": ("theirs", {"\n<|endoftext|>"}),  # printed behind the last turn's own
    # What the prompt holds already; their marks begin before it.
    "header": (
        "theirs",
        {*["<｜Assistant｜>", "<｜tool▁outputs▁end｜>", "<|start|>assistant"], "<｜Assistant｜><think>\n"},
    ),
    "opened": ("theirs", {"<think>", "<think>\n", "<think>\n\n</think>\n\n"}),
    # A turn of calls alone, which the template drops: ours is named as damaged, theirs is an empty answer.
    "no calls": (
        "theirs",
        {"<|im_end|>\n", "<|eot_id|>", "<|end|>\n", "<|end|>\n<|endoftext|>", "<end_of_turn>\n"}
        | {"<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<｜Assistant｜><｜end▁of▁sentence｜>"}
        | {"<｜tool▁outputs▁end｜><｜end▁of▁sentence｜>"},
    ),
    "answer first": (  # nothing asks for it: its opening is prompt, as the template prints it for a plain answer
        "theirs",
        {"\n<think></think>\n", "<think></think>", "<think>\n\n</think>\n\n"}
        | {"<|start|>assistant<|channel|>final<|message|>", "<|start|>assistant to=user<|message|>"},
    ),
    "calls end": ("ours", {"<|tool_response>"}),  # what ends Gemma 4's turn of calls is left to the result by them
}
HYBRID = {"blank", "opened", "answer first"}
KNOWN: dict[str, set[str]] = {
    "cohere": {"no calls"},
    "deepseek_r1_distill": {"header", "no calls"},
    "deepseekv3": {"header"},
    "diffusion_gemma": {"blank", "calls end"},
    "gemma": {"blank", "no calls"},
    "glm4moe": {"answer first"},
    "gptoss": {"header", "answer first"},
    "idefics3": set(),
    "lfm2": {"blank"},
    "lfm2_training": {"blank", "no calls"},
    "llama3": {"no calls"},
    "llava_next": set(),
    "muse_glimmer": {"header", "answer first"},
    "nemotron": HYBRID,
    "phi3": {"blank", "second end", "no calls"},
    "qwen": {"blank"},
    "qwen2_5_vl": {"blank", "no calls"},
    "qwen3_": HYBRID,
    "qwen3_instruct": {"blank"},
    "qwen3_training": {"blank", "answer first"},
    "qwen3_vl": {"blank"},
    "smolvlm": set(),
}


def reason(conversation: str, side: str, text: str) -> str:
    if conversation == "an answer first" and text in REASONS["answer first"][1]:
        return "answer first"
    return next((name for name, (who, texts) in REASONS.items() if who == side and text in texts), f"{side}: {text}")


def differences(name: str, conversation: str) -> set[tuple[str, str]]:
    """(who alone trains it, text) for each stretch of tokens that one of the two masks has; empty too where both or
    one of them refuses the conversation, which ours names.
    """
    tokenizer = published.tokenizer(name)
    messages, with_tools = CONVERSATIONS[conversation]
    tools = [TOOL] if with_tools else None
    (row,) = rendered(tokenizer, messages, tools, {}, expand_turns="none", on_damage="keep")
    if row.dropped:
        return set()
    theirs = tokenizer.apply_chat_template(
        repairs.repaired(masking.template_of(tokenizer, {}), messages),
        tools=tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids = [int(token) for token in row.example.ids]
    assert ids[: len(theirs["input_ids"])] == theirs["input_ids"]
    masks = zip_longest(row.example.mask, theirs["assistant_masks"], fillvalue=0)
    sides = [{(1, 0): "ours", (0, 1): "theirs"}.get((int(one), int(other)), "") for one, other in masks]
    stretches = [
        (side, [token for token, _ in group])
        for side, group in groupby(zip(ids, sides, strict=True), lambda pair: pair[1])
    ]
    return {(side, tokenizer.decode(own)) for side, own in stretches if side}


@pytest.mark.parametrize("name", published.variants())
def test_masks_differ_from_trls_where_its_marks_take_in_the_header_or_what_follows_the_end(name: str) -> None:
    found = {
        reason(conversation, side, text)
        for conversation, (messages, _) in CONVERSATIONS.items()
        if all(message.get("weight", 1) for message in messages)
        for side, text in differences(name, conversation)
    }
    assert found == KNOWN[max((start for start in KNOWN if name.startswith(start)), key=len)]
