"""Answers of a server, and recorded ones: what they do in silence is said, and what is wrong is one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from fake_server import FakeServer

from mlxtune.errors import UserError
from mlxtune.evaluate.checks.tool_calls import Call, calls_in
from mlxtune.evaluate.engines.opening import replayed
from mlxtune.evaluate.engines.replay import Replay
from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.evaluate.engines.server import Server

REQUESTS = [Request(f"r{n}", [{"role": "user", "content": f"hello {n}"}]) for n in range(6)]


def answered(server: Server) -> list[Answer]:
    plan = server.plan(REQUESTS)
    assert [place for places in plan for place in places] == list(range(6))
    return [answer for places in plan for answer in server.answers([REQUESTS[place] for place in places])]


def test_a_server_is_asked_with_the_conversation_and_the_sampling() -> None:
    with FakeServer() as fake:
        engine = Server(f"{fake.url}#mine", Sampling(max_tokens=7))
        answers = answered(engine)
        assert answers[3] == Answer("r3", 0, "You said hello 3", "", "stop", 4)
        assert engine.name == f"{fake.url}#mine" and engine.notes == []
        (asked,) = [one for one in fake.asked if one["messages"][0]["content"] == "hello 3"]
        assert asked["messages"] == REQUESTS[3].messages
        assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("mine", 7, 0.0)
        assert set(fake.paths) == {"/v1/chat/completions"}


def test_each_answer_by_chance_has_a_seed_of_its_own_that_the_seed_decides() -> None:
    with FakeServer() as fake:
        texts = {}
        for seed in (0, 0, 1):
            engine = Server(fake.url, Sampling(temperature=0.7, top_p=0.9, seed=seed))
            texts.setdefault(seed, []).append([answer.text for answer in answered(engine)])
            assert engine.notes == []
        assert texts[0][0] == texts[0][1] != texts[1][0]
        assert len({text.split()[-1] for text in texts[0][0]}) == 6
        assert fake.asked[0]["top_p"] == 0.9


@pytest.mark.parametrize(
    ("habits", "sampling", "note"),
    [
        ({"renames": "other-7b"}, Sampling(), "was asked for tiny, and says that other-7b answered"),
        ({"ignores_seed": True}, Sampling(temperature=1.0), "ignores the seed"),
        ({"most_tokens": 2}, Sampling(), "cuts answers before --max-tokens 512"),
    ],
)
def test_what_a_server_does_in_silence_is_said(habits: dict[str, Any], sampling: Sampling, note: str) -> None:
    with FakeServer(**habits) as fake:
        engine = Server(fake.url, sampling)
        answered(engine)
        assert len(engine.notes) == 1 and note in engine.notes[0]


@pytest.mark.parametrize("where", ["apart", "tags"])
def test_a_servers_thought_is_parted_from_its_answer(where: str) -> None:
    with FakeServer(thinks=where) as fake:
        answer = answered(Server(fake.url, Sampling()))[0]
        assert (answer.thought, answer.text) == ("Hm.", "You said hello 0")


def test_a_servers_calls_of_tools_are_its_answer() -> None:
    """With arguments as the protocol has them, as some servers give them, and as no model should write them."""
    calls = ({"name": "f", "arguments": '{"a": "\u00e9"}'}, {"name": "g", "arguments": {"b": [1]}})
    with FakeServer(calls=(*calls, {"name": "h", "arguments": '{"c": '}), thinks="apart") as fake:
        answer = answered(Server(fake.url, Sampling()))[0]
    assert calls_in(answer.text) == [Call("f", {"a": "\u00e9"}), Call("g", {"b": [1]})]
    assert answer.text.count("\n") == 2 and '"h"' in answer.text and answer.thought == "Hm."
    with FakeServer(calls=({"arguments": "{}"},)) as fake, pytest.raises(UserError, match="in another form"):
        answered(Server(fake.url, Sampling()))


def test_a_key_is_sent_only_where_its_variable_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of-another-service")
    with FakeServer() as fake:
        Server(fake.url, Sampling())
        monkeypatch.setenv("MLXTUNE_API_KEY", "secret")
        Server(fake.url, Sampling())
        assert fake.keys == [None, "Bearer secret"]


def test_no_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeServer() as fake, FakeServer() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        Server(fake.url, Sampling())
        assert len(fake.paths) == 1 and proxy.paths == []


@pytest.mark.parametrize(
    ("habits", "message"),
    [
        ({"status": 500, "reply": b"out of\nmemory"}, "500 Internal Server Error: out of memory"),
        ({"status": 401}, "401 Unauthorized"),
        ({"reply": b"<html>hello</html>"}, "replies with what is no JSON"),
        ({"reply": b"[1]"}, "replies with what is no JSON object"),
        ({"reply": b'{"choices": []}'}, "in another form than OpenAI's"),
        ({"reply": b'{"choices": [{"message": {"content": 5}}]}'}, "in another form than OpenAI's"),
        ({"leads_to": "http://192.0.2.1/v1"}, "leads to http://192.0.2.1/v1"),
    ],
)
def test_what_goes_wrong_at_a_server_is_one_clear_line(habits: dict[str, Any], message: str) -> None:
    with FakeServer(**habits) as fake, pytest.raises(UserError) as error:
        answered(Server(f"{fake.url}#tiny", Sampling()))
    assert message in error.value.message and "\n" not in error.value.message


def test_a_server_with_several_models_or_none_must_be_told_which() -> None:
    with FakeServer(models=("a", "b")) as fake, pytest.raises(UserError) as error:
        Server(fake.url, Sampling())
    assert "several models" in error.value.message and "a, b" in error.value.hint
    with FakeServer(models=()) as fake, pytest.raises(UserError, match="names no model"):
        Server(fake.url, Sampling())


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://192.0.2.1:8080/v1#m", "192.0.2.1 is another machine"),
        ("http://127.0.0.1.example.org/v1#m", "is another machine"),
        ("http://user@127.0.0.1:1/v1#m", "is no address"),
        ("http://127.0.0.1:99999/v1#m", "is no address"),
        ("http:///v1#m", "is no address"),
        ("http://127.0.0.1:1/v1#m", "no server answers at http://127.0.0.1:1/v1"),
    ],
)
def test_prompts_leave_this_machine_only_where_that_is_allowed(address: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        answered(Server(address, Sampling()))
    assert message in error.value.message
    assert Server("http://192.0.2.1:8080/v1#m", Sampling(), allow_remote=True).model == "m"


def test_a_server_takes_no_repetition_penalty() -> None:
    with pytest.raises(UserError, match="no repetition penalty"):
        Server("http://127.0.0.1:1/v1#m", Sampling(repetition_penalty=1.1))


def test_recorded_answers_are_given_back(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": f"r{n}", "text": f"answer {n}", "finish": "stop"} for n in range(5)]
    rows.append({"id": "r5", "text": "cut", "thought": "Hm.", "finish": "length", "tokens": 9})
    engine = Replay(tiny.write_jsonl(tmp_path / "answers.jsonl", [*reversed(rows)]))
    answers = engine.answers([REQUESTS[place] for place in engine.plan(REQUESTS)[0]])
    assert [answer.text for answer in answers] == [row["text"] for row in rows]
    assert answers[5] == Answer("r5", 0, "cut", "Hm.", "length", 9)
    assert engine.notes == []


def test_what_recorded_answers_do_not_say_is_said(tmp_path: Path) -> None:
    rows = [{"id": request.id, "text": "x"} for request in REQUESTS]
    engine = Replay(tiny.write_jsonl(tmp_path / "answers.jsonl", [*rows, {"id": "r9", "text": "y"}]))
    engine.plan(REQUESTS)
    assert "7 answers do not say whether they were cut" in engine.notes[0]
    assert "1 answers belong to no prompt" in engine.notes[1]


def test_a_side_of_an_evaluations_answers_is_given_back_once_it_is_named(tmp_path: Path) -> None:
    rows = [
        {"side": side, "id": one.id, "text": side, "finish": "stop"} for side in ("base", "tuned") for one in REQUESTS
    ]
    file = tiny.write_jsonl(tmp_path / "answers.jsonl", rows)
    with pytest.raises(UserError, match="line 7: answers of a second side") as error:
        Replay(*replayed(f"replay:{file}"))
    assert f"replay:{file}#tuned" in error.value.hint
    for side in ("base", "tuned"):
        engine = Replay(*replayed(f"replay:{file}#{side}"))
        assert {answer.text for answer in engine.answers(REQUESTS)} == {side} and engine.notes == []
    tiny.write_jsonl(file, rows[:6])
    assert Replay(*replayed(f"replay:{file}")).answers(REQUESTS[:1])[0].text == "base"
    with pytest.raises(UserError, match="no answers of the side tuned"):
        Replay(*replayed(f"replay:{file}#tuned"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"}', "line 6: no id"),
        ('{"id": "r5"}', "line 6: text is no text"),
        ('{"id": "r0", "text": "again"}', "line 6: a second answer to prompt r0"),
        ('{"id": "r5", "text": "x", "finish": "end"}', "finish must be one of stop, length"),
        ('{"id": "r5", "text": "x", "tokens": -1}', "tokens must be a whole number"),
        ('{"id": "r5", "text": "x", "sample": true}', "sample must be a whole number"),
        ("{", "line 6"),
        ('{"id": "r7", "text": "x"}', "has no answer to prompt r5"),
    ],
)
def test_recorded_answers_that_are_none_are_one_clear_line(line: str, message: str, tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "answers.jsonl", [{"id": f"r{n}", "text": "x"} for n in range(5)])
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(UserError) as error:
        Replay(file).plan(REQUESTS)
    assert message in error.value.message


def test_an_id_may_be_a_number(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"id": 1, "text": "one"}))
    assert Replay(file).answers([Request("1", [])])[0].text == "one"
