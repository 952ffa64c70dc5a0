"""A conversation of several turns: what each prompt holds, what is said where, and a terminal that it survives in."""

from __future__ import annotations

import json
import os
import pty
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import masks
import mlx.core as mx
import pytest
import talk
import tiny

from mlxtune.cli.talk import Talk
from mlxtune.errors import UserError
from mlxtune.evaluate import generate
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.evaluate.generate import Refused, answer
from mlxtune.model.load import Loaded, load

T, C = "Let me see.", "It is so."
# What a model says, and the fields of the message that it is.
SAID = {
    "harmony": (
        f"<|channel|>analysis<|message|>{T}<|end|><|start|>assistant<|channel|>final<|message|>{C}<|return|>",
        {"content": C, "thinking": T},
    ),
    "opened": (f"{T}\n</think>\n\n{C}<|im_end|>", {"content": C, "reasoning_content": T}),
    "qwen": (f"<think>\n{T}\n</think>\n\n{C}<|im_end|>", {"content": C, "reasoning_content": T}),
    "deepseek": (f"{T}\n</think>\n\n{C}<｜end▁of▁sentence｜>", {"content": C}),
    "channel": (f"<|channel>thought\n{T}\n<channel|>{C}<turn|>", {"content": C}),
    "strict": (f"{C}<end_of_turn>", {"content": C}),
    "mistral": (f" {C}</s>", {"content": C}),
}


def loaded(tokenizer: Any) -> Loaded:
    """A tokenizer without a model; its words are put in its mouth."""
    return Loaded(None, tokenizer, {"vocab_size": 100_000}, Path("model"), mx.float32, mx.float32)  # type: ignore[arg-type]


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that sets the model's words; the list of the prompts it was given comes with it."""
    seen: list[list[int]] = []

    def says(words: str, interrupt: bool = False) -> list[list[int]]:
        def stream(_: Loaded, ids: list[int], sampling: Sampling) -> Iterator[str]:
            seen.append(ids)
            yield from words
            if interrupt:
                raise KeyboardInterrupt

        monkeypatch.setattr(generate, "stream", stream)
        return seen

    yield says


@pytest.mark.parametrize("name", SAID)
def test_the_third_prompt_is_that_of_the_parsed_messages(name: str, prompts: Any, capfd: Any) -> None:
    tokenizer = talk.tokenizer_for(name)
    text, message = SAID[name]
    seen = prompts(text)
    conversation = Talk(loaded(tokenizer), None, Sampling())
    messages: list[dict[str, Any]] = []
    for question in ("One?", "Two?", "Three?"):
        messages.append({"role": "user", "content": question})
        assert conversation.ask(question)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert seen[-1] == list(ids)
        messages.append({"role": "assistant", **message})
    out, err = capfd.readouterr()
    assert out == f"{C}\n" * 3  # nothing of the template, and no thought
    assert err.count(T) == (3 if T in text else 0)
    assert "<" not in err


def test_ctrl_c_keeps_what_was_said_so_far(prompts: Any, capfd: Any) -> None:
    tokenizer = talk.tokenizer_for("qwen")
    seen = prompts("<think>\nHm.\n</think>\n\nIt is", interrupt=True)
    conversation = Talk(loaded(tokenizer), None, Sampling())
    assert not conversation.ask("One?")
    assert capfd.readouterr().out == "It is\n"
    prompts(C)
    conversation.ask("Two?")
    assert "assistant\nIt is<|im_end|>\n<|im_start|>user\nTwo?" in tokenizer.decode(seen[-1])


def test_a_refused_system_prompt_is_one_line_and_changes_nothing(prompts: Any) -> None:
    tokenizer = talk.tokenizer_for("strict")
    seen = prompts(C)
    conversation = Talk(loaded(tokenizer), None, Sampling())
    conversation.ask("One?")
    with pytest.raises(Refused, match="refuses a system prompt: System role not supported") as caught:
        conversation.instruct("Be brief.")
    assert caught.value.system
    conversation.ask("Two?")
    assert "One?" in tokenizer.decode(seen[-1])
    assert "brief" not in tokenizer.decode(seen[-1])


def test_a_refused_message_is_dropped_and_the_conversation_goes_on(prompts: Any) -> None:
    tokenizer = talk.tokenizer_for("qwen")
    guard = "{%- for m in messages if 'bad' in m.content %}{{- raise_exception('no such\nword') }}{% endfor %}"
    tokenizer.chat_template = guard + tokenizer.chat_template
    seen = prompts(C)
    conversation = Talk(loaded(tokenizer), None, Sampling())
    conversation.ask("One?")
    with pytest.raises(UserError, match="refuses this conversation: no such word") as caught:
        conversation.ask("a bad one")
    assert "\n" not in caught.value.message
    conversation.ask("Two?")
    text = tokenizer.decode(seen[-1])
    assert "One?" in text
    assert C in text
    assert "bad" not in text


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (
            "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}:",
            "the text of a message of the user",
        ),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}:", "a system prompt"),
    ],
)
def test_a_template_that_leaves_a_text_out_is_refused(template: str, what: str, prompts: Any) -> None:
    """Vision models' templates print only lists of parts; others know no system prompt and say nothing."""
    tokenizer = talk.tokenizer_for("bare")
    tokenizer.chat_template = template
    prompts(C)
    conversation = Talk(loaded(tokenizer), None, Sampling())
    with pytest.raises(UserError, match=f"the chat template leaves out {what}"):
        conversation.instruct("Be brief.")


def test_a_template_that_makes_nothing_of_a_conversation_is_said(prompts: Any) -> None:
    tokenizer = talk.tokenizer_for("bare")
    tokenizer.chat_template = "{% if false %}{{ messages }}{% endif %}"
    prompts(C)
    conversation = Talk(loaded(tokenizer), None, Sampling())
    with pytest.raises(UserError, match="nothing to answer: the chat template makes nothing of this conversation"):
        conversation.ask("One?")


def test_an_answer_that_the_template_does_not_take_back_is_not_kept(prompts: Any, capfd: Any) -> None:
    """An empty one, here; the conversation goes on without it."""
    tokenizer = talk.tokenizer_for("qwen")
    guard = "{%- for m in messages if not m.content %}{{- raise_exception('empty') }}{% endfor %}"
    tokenizer.chat_template = guard + tokenizer.chat_template
    seen = prompts("<|im_end|>")
    conversation = Talk(loaded(tokenizer), None, Sampling())
    conversation.ask("One?")
    assert "question and answer are not kept" in capfd.readouterr().err
    conversation.ask("Two?")
    assert "One?" not in tokenizer.decode(seen[-1])


def test_variables_and_day_of_a_run_are_those_of_its_prompts(prompts: Any, tmp_path: Path) -> None:
    """Harmony prints the day; the run was made on another one."""
    (tmp_path / "config.yaml").write_text("data: {date: '2024-02-29', template_kwargs: {enable_thinking: false}}\n")
    seen = prompts(C)
    for name, expected in (("harmony", "Current date: 2024-02-29"), ("opened", "<think>\n\n</think>\n\n")):
        tokenizer = talk.tokenizer_for(name)
        Talk(loaded(tokenizer), tmp_path, Sampling()).ask("One?")
        assert expected in tokenizer.decode(seen[-1])


@pytest.mark.parametrize("kind", [masks.byte_tokenizer, masks.piece_tokenizer])
def test_the_pieces_are_the_text_of_the_tokens(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indented lines, characters of several bytes, special tokens; against decoding all tokens at once."""
    tokenizer = masks.family("mistral", kind)
    text = "Look:\n    one 😀\n        two 中国\n[TOOL_CALLS] é"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(generate, "tokens", lambda *_: iter(ids))
    pieces = list(generate.stream(loaded(tokenizer), [], Sampling()))
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "    one 😀\n        two 中国" in "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("talk") / "model")


def with_tokenizer(weights: Path, folder: Path, name: str) -> Path:
    shutil.copytree(weights, folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    talk.tokenizer_for(name).save_pretrained(folder)
    return folder


def in_a_terminal(*args: str | Path, lines: list[str]) -> tuple[int, str]:
    """(exit status, what the screen showed) of a command that reads lines at its prompt."""
    mine, theirs = pty.openpty()
    process = tiny.started(*args, streams=(theirs, theirs, theirs))
    os.close(theirs)
    shown, waiting, limit = "", list(lines), time.monotonic() + 300
    while time.monotonic() < limit:
        try:
            new = os.read(mine, 4096).decode(errors="replace")
        except OSError:  # the terminal has closed
            break
        shown += new
        if waiting and shown.rpartition("\n")[2].endswith("> "):
            os.write(mine, (waiting.pop(0) + "\n").encode())
            shown += "\n"
    process.wait(60)
    os.close(mine)
    return process.returncode, shown


@pytest.mark.parametrize("name", ["harmony", "opened", "strict", "mistral"])
def test_three_turns_in_a_terminal_end_well(name: str, weights: Path, tmp_path: Path) -> None:
    """A random model's words, whatever they are, and a system prompt on the way that one template refuses."""
    model = with_tokenizer(weights, tmp_path / name, name)
    lines = ["one", "two", "/system Be brief.", "three", "/quit"]
    code, shown = in_a_terminal("chat", "--model", model, "--max-tokens", "12", "--temperature", "1", lines=lines)
    assert code == 0, shown
    assert "Traceback" not in shown
    assert shown.count("> ") >= len(lines)
    refused = "error: the chat template refuses a system prompt: System role not supported (it stays as it was)"
    assert (refused in shown.replace("\r\n", "")) == (name == "strict"), shown
    assert ("system prompt: Be brief." in shown) == (name != "strict")


def test_generate_refuses_a_system_prompt_in_one_line(weights: Path, tmp_path: Path) -> None:
    model = with_tokenizer(weights, tmp_path / "model", "strict")
    for command in (("generate", "--prompt", "hi"), ("chat",)):
        result = tiny.mlxtune(*command, "--model", model, "--system", "Be brief.")
        tiny.one_clear_line(result, "refuses a system prompt: System role not supported", "Leave out --system")


def test_sample_prompts_are_asked_on_the_day_of_the_run(weights: Path, data: Path, tmp_path: Path) -> None:
    """A template that ends prompts with the day. Against the untrained model's own answers on that day and another."""
    model = with_tokenizer(weights, tmp_path / "model", "qwen")
    dated = "{%- if add_generation_prompt %}{{- strftime_now('%Y-%m-%d') }}{%- endif %}"
    (model / "chat_template.jinja").write_text(masks.source("qwen") + dated)
    settings = ("train.steps=1", "train.sample_prompts=['Why?']", "data.date=2024-02-29", "lora.rank=2")
    run = tiny.trained(model, data, tmp_path / "run", *settings)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    first = next(event for event in events if event["kind"] == "eval")
    base, ask = load(str(model)), [{"role": "user", "content": "Why?"}]
    answers = [answer(base, ask, Sampling(max_tokens=128), {}, day) for day in ("2024-02-29", "2031-12-25")]
    assert answers[0] != answers[1]
    assert first["samples"] == [{"prompt": "Why?", "answer": answers[0]}]
