"""Conversations with thumbs: kept as they come, rated later, data for training, and a share for each adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import talk
import tiny
from click.testing import CliRunner

from mlxtune.cli import chat as chats
from mlxtune.cli import cli
from mlxtune.cli.talk import Talk
from mlxtune.data.rows import formats
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.sides import Side
from mlxtune.errors import UserError
from mlxtune.evaluate import generate
from mlxtune.evaluate.chats import log
from mlxtune.evaluate.chats.log import ChatLog, Said, Speaker, read
from mlxtune.evaluate.chats.thumbs import shares
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.evaluate.statistics.proportions import wilson
from mlxtune.model.load import Loaded

SPEAKER = Speaker("model", "run", "9c0e")


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Talk]:
    """A conversation whose model says "It is so." to everything, kept in chats.jsonl."""
    monkeypatch.setattr(generate, "stream", lambda *_: iter("It is so.<|im_end|>"))
    loaded = Loaded(None, talk.tokenizer_for("qwen"), {"vocab_size": 100_000}, Path("model"), mx.float32, mx.float32)  # type: ignore[arg-type]
    conversation = Talk(loaded, None, Sampling())
    opened = ChatLog(tmp_path / "chats.jsonl", SPEAKER)
    conversation.log = opened
    yield conversation
    opened.close()


def typed(conversation: Talk, *lines: str) -> list[str]:
    """What is printed for each command; messages are asked."""
    said = []
    for line in lines:
        command, _, rest = line.partition(" ")
        if line.startswith("/"):
            said.append(chats._obeyed(conversation, command, rest))
        else:
            conversation.ask(line)
    return said


def kept(conversation: Talk) -> list[Said]:
    assert conversation.log is not None
    return read(conversation.log.path)


def test_each_answer_is_kept_with_what_was_before_it_and_its_thumb(chat: Talk) -> None:
    said = typed(chat, "/system Be brief.", "One?", "/up", "Two?", "/down", "/up", "/reset", "Three?")
    assert "thumbs up, kept in" in said[1] and "thumbs down" in said[2] and "/reset" not in said
    assert chat.log is not None and b"\n\n" not in chat.log.path.read_bytes()  # "true" is shorter than "false"
    first, second, third = kept(chat)
    assert [one.label for one in (first, second, third)] == [True, True, None]  # the last word counts
    system, answer = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "It is so."}
    assert first.prompt == [system, {"role": "user", "content": "One?"}] and first.completion == [answer]
    assert second.prompt == [*first.prompt, answer, {"role": "user", "content": "Two?"}]
    assert third.prompt == [system, {"role": "user", "content": "Three?"}]
    assert first.conversation == second.conversation != third.conversation
    assert (first.model, first.adapter, first.digest, first.whole) == ("model", "run", "9c0e", True)


def test_a_thumb_needs_an_answer_and_a_log(chat: Talk) -> None:
    assert typed(chat, "/up") == ["there is no answer yet"]
    assert typed(chat, "/help") == [f"{chats.HELP}\n{chats.THUMBS}"]
    assert kept(chat) == []
    chat.log = None
    assert typed(chat, "/down", "/help") == ["nothing is kept: begin with mlxtune chat --log FILE.jsonl", chats.HELP]


def test_an_answer_that_was_stopped_is_said_to_be(chat: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> Iterator[str]:
        yield "It"
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream", stopped)
    typed(chat, "One?")
    (one,) = kept(chat)
    assert one.text == "It" and not one.whole


def test_a_line_that_a_kill_cut_off_goes_and_the_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    first = ChatLog(path, SPEAKER)
    first.add([{"role": "user", "content": "One?"}], {"role": "assistant", "content": "Yes."}, True)
    first.close()
    path.write_bytes(path.read_bytes() + b'{"prompt": [{"role": "us')
    again = ChatLog(path, Speaker("model", None, None))
    again.add([{"role": "user", "content": "Two?"}], {"role": "assistant", "content": "No."}, True)
    again.close()
    assert [(one.text, one.adapter) for one in read(path)] == [("Yes.", "run"), ("No.", None)]


def test_other_files_and_a_log_in_use_are_left_alone(tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.conversations(2))
    before = data.read_bytes()
    with pytest.raises(UserError, match="line 1: not an answer of a chat"):
        ChatLog(data, SPEAKER)
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"my notes")
    with pytest.raises(UserError, match=r"cut\.jsonl: not a log of chats"):
        ChatLog(cut, SPEAKER)
    assert data.read_bytes() == before and cut.read_bytes() == b"my notes"
    with pytest.raises(UserError, match=r"must end in \.jsonl"):
        ChatLog(tmp_path / "chats.txt", SPEAKER)
    (tmp_path / "link.jsonl").symlink_to(data)
    with pytest.raises(UserError, match="is a link"):
        ChatLog(tmp_path / "link.jsonl", SPEAKER)
    path = written(tmp_path, [None])
    used = ChatLog(path, SPEAKER)
    with pytest.raises(UserError, match="a chat adds to"):
        ChatLog(path, SPEAKER)
    with pytest.raises(UserError, match="a chat adds to"):
        log.write(path, [])
    used.close()
    assert len(read(path)) == 1 and os.stat(path).st_mode & 0o077 == 0  # others may not read it


def test_a_log_without_an_answer_does_not_stay(tmp_path: Path) -> None:
    ChatLog(tmp_path / "chats.jsonl", SPEAKER).close()
    assert list(tmp_path.iterdir()) == []


def written(folder: Path, labels: list[bool | None], adapter: str | None = "run", name: str = "chats") -> Path:
    path = folder / f"{name}.jsonl"
    opened = ChatLog(path, Speaker("model", adapter, adapter))
    for number, label in enumerate(labels):
        before = {"role": "assistant", "content": "Earlier."}
        prompt = [{"role": "user", "content": "Hi"}, before, {"role": "user", "content": f"Question {number}?"}]
        opened.add(prompt, {"role": "assistant", "content": f"Answer {number}."}, True)
        if label is not None:
            opened.rate(label)
    opened.close()
    return path


def test_a_log_is_data_of_which_good_answers_alone_have_a_weight(tmp_path: Path) -> None:
    records = list(formats.read(written(tmp_path, [True, False, None])))
    weights = []
    for record in records:
        assert isinstance(record, Record) and record.messages is not None and record.format == "prompt-completion"
        weights.append([one.get("weight", 1) for one in record.messages if one["role"] == "assistant"])
    assert weights == [[0, 1], [0, 0], [0, 0]]  # what stands in a prompt was rated elsewhere
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False, "spam", 0)]
    plain = list(formats.read(tiny.write_jsonl(tmp_path / "kto.jsonl", rows)))
    given = [record.messages[-1].get("weight", 1) for record in plain if isinstance(record, Record) and record.messages]
    assert given == [1, 0, 1, 1]  # other columns of that name mean something else
    classed = {**tiny.conversations(1)[0], "label": "spam"}
    (of_messages,) = formats.read(tiny.write_jsonl(tmp_path / "classed.jsonl", [classed]))
    assert isinstance(of_messages, Record) and of_messages.fields == {"label": "spam"}


def test_the_thumbs_of_a_log_are_ratings_where_preferences_are_asked_for(tmp_path: Path) -> None:
    found = list(formats.read(written(tmp_path, [True, False, None]), {}, preferences=True))
    told = [(record.side, record.prompt, record.teaches_nothing) for record in found if isinstance(record, Record)]
    assert told == [(Side.GOOD, 3, ""), (Side.BAD, 3, ""), (Side.NONE, 3, "nobody rated it (label is null)")]


def test_shares_are_counted_for_each_adapter_with_wilsons_interval(tmp_path: Path) -> None:
    labels = [True] * 7 + [False] * 3 + [None] * 2
    answers = read(written(tmp_path, labels)) + read(written(tmp_path, [False], None, "base"))
    found = shares(answers)
    assert (found["rated"], found["unrated"]) == (11, 2)
    best, base = found["adapters"]
    assert (best["adapter"], best["up"], best["rated"], best["unrated"], best["share"]) == ("run", 7, 10, 2, 0.7)
    assert best["interval"] == list(wilson(7, 10)) and base["share"] == 0
    assert "not independent" in found["notes"][0]
    assert shares(answers[:12])["notes"] == []
    # The same folder with other tensors is another adapter.
    other = [replace(one, digest="other") for one in answers[:3]]
    assert len(shares([*answers, *other])["adapters"]) == 3


def test_compare_and_rate_read_logs(tmp_path: Path) -> None:
    path = written(tmp_path, [True, None, None, None])
    runner = CliRunner()
    typed_in = "+\nx\n-\nq\n"
    asked = runner.invoke(cli, ["rate", str(path)], input=typed_in)
    assert "Question 1?" in asked.output and "Answer 1." in asked.output and "2 of 3 done" in asked.output
    assert "run" not in asked.output.replace(str(tmp_path), "")  # nobody is told who answered
    assert [one.label for one in read(path)] == [True, True, False, None]
    said = json.loads(runner.invoke(cli, ["compare", str(path), "--json"]).output)
    assert said["adapters"][0]["up"] == 2 and said["adapters"][0]["rated"] == 3
    shown = runner.invoke(cli, ["rate", str(path), "--result"]).output
    assert "66.7%" in shown and "20.8% to 93.9%" in shown
    for words, wrong in (
        (["rate", str(path), "--likert"], "--likert has no effect on a log of chats"),
        (["rate", str(path), "--rater", "anna"], "--rater has no effect on a log of chats"),
        (["compare", str(path), str(tmp_path)], "is a file"),
        (["compare", str(path), str(path)], "is named twice"),
    ):
        refused = runner.invoke(cli, words)
        assert isinstance(refused.exception, UserError) and wrong in refused.exception.message


def test_the_command_keeps_a_chat(mlx_model: Path, run: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    process = tiny.started("chat", "--model", mlx_model, "--adapter", run, "--max-tokens", "4", "--log", path)
    _, told = process.communicate("What is 3?\n/down\n/quit\n")
    assert process.returncode == 0 and "thumbs down" in told, told
    (one,) = read(path)
    assert one.label is False and one.adapter == str(run) and one.digest and one.prompt[-1]["content"] == "What is 3?"
    tiny.refused(tmp_path / "x", "chat", "--model", mlx_model, "--log", tmp_path / "x", expected=("end in .jsonl",))
