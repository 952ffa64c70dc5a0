"""Turns as they are asked for, at the edges: joined turns, limits, caches, call ids, damage, ends of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import masks
import published
import pytest
import tiny
from conversations import answer, call, result, user
from random_conversations import rendered
from reading import all_of
from targets import runs_of

from mlxtune.config.schema import DataSection
from mlxtune.data.chat import masking, repairs
from mlxtune.data.chat.renderer import Renderer
from mlxtune.data.rows.formats import Record
from mlxtune.data.template.rendering import Remembered


def said(rows: list[Any], tokenizer: Any) -> list[str]:
    """What is trained, in the order of the examples."""
    return [tokenizer.decode(run.ids[run.start : run.end]) for row in rows if row.example for run in runs_of(row)]


def made(tokenizer: Any, messages: list[dict[str, Any]], **section: Any) -> list[Any]:
    renderer = Renderer(tokenizer, DataSection(**{"max_tokens": 1 << 20, **section}))
    return renderer.rows([Record("file.jsonl", 1, "messages", messages, None, None, {})])


def test_a_weight_of_zero_keeps_a_joined_turn_untrained_when_the_last_turn_alone_is_trained() -> None:
    tokenizer = published.tokenizer("gemma4_v5")
    messages = [user("Q"), answer("hidden", weight=0), answer("shown")]
    for train_on in ("all", "last"):
        rows = made(tokenizer, messages, train_on=train_on)
        assert said(rows, tokenizer) == []
        assert ("joined, untrained", 2) in rows[0].kinds


def test_turns_beyond_the_limit_are_named_and_the_others_trained_as_before() -> None:
    """Qwen3 gives an example for each of 60 turns; of those that begin beyond the limit most are never tokenized."""
    tokenizer = published.tokenizer("qwen3")
    turns = [(f"Question {number}? " * 6, f"Answer {number}. " * 6) for number in range(60)]
    messages = [message for asked, told in turns for message in (user(asked), answer(told))]
    whole = made(tokenizer, messages)
    limit = 1500
    cut = made(tokenizer, messages, max_tokens=limit)
    learned = [row for row in whole if row.starts[0] < limit]
    assert 5 < len(learned) < 50
    assert len(cut) == len(whole) == 60
    assert [row.part for row in cut if row.example] == [row.part for row in learned]
    for row, before in zip([row for row in cut if row.example], learned, strict=True):
        assert list(row.example.ids) == list(before.example.ids[:limit])
        assert list(row.example.mask) == list(before.example.mask[:limit])
    dropped = [row for row in cut if not row.example]
    assert {row.dropped for row in dropped} == {f"no supervised token in the first {limit} tokens"}
    assert all(("cut", 2 * row.part - 1) in row.kinds for row in dropped)


def test_a_long_row_tokenizes_no_prompt_that_is_surely_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxtune.data.chat import borders

    tokenizer = published.tokenizer("qwen3")
    messages = [message for at in range(60) for message in (user(f"Question {at}? " * 9), answer(f"Answer {at}. " * 9))]
    seen: list[int] = []
    real = borders.Borders.tokens
    monkeypatch.setattr(
        borders.Borders, "tokens", lambda self, texts: seen.append(sum(map(len, texts))) or real(self, texts)
    )
    made(tokenizer, messages)
    whole, seen[:] = sum(seen), []
    made(tokenizer, messages, max_tokens=1000)
    assert sum(seen) < whole / 5


def test_another_end_token_in_the_generation_config_is_not_answered_from_the_cache(tmp_path: Path) -> None:
    """The template prints two end tokens behind an answer; the model's files say which of them ends it."""
    two = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    two += "{{ '<|im_end|><|endoftext|>' }}{% endfor %}"
    two += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"messages": [user("Q"), answer("A")]}])
    folder = tmp_path / "model"
    tiny.make_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(two)
    cache = tmp_path / "cache"

    def targets() -> str:
        done = tiny.done("data", "show", "--model", folder, "--data", path, "--json")
        row = json.loads(done.stdout)
        from mlxtune.data.template.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(folder)
        (example,) = all_of(path, tokenizer, cache=str(cache))
        (stored,) = masks.runs(tokenizer, example)
        shown = [token for token, flag in zip(row["ids"], row["mask"], strict=True) if flag]
        assert tokenizer.decode(shown) == stored
        return stored

    assert targets() == "A<|im_end|>"
    from mlxtune.data.template.tokenizer import load_tokenizer

    both = load_tokenizer(folder).convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": both}))
    assert targets() == "A<|im_end|><|endoftext|>"
    nested = '{"a":' * 100_000 + "1" + "}" * 100_000  # which Python refuses to read: the file names no end then
    (folder / "generation_config.json").write_text(nested)
    assert targets() == "A<|im_end|>"


IDS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}{% endfor %}"
    "{% if m.role == 'tool' and m.tool_call_id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% for c in m.tool_calls or [] %}{{ c.id + ':' + c.function.name }}{% endfor %}"
    "{{ (m.tool_call_id or '') + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_demands_short_call_ids_gets_them_and_results_keep_their_calls(tokenizer: Any) -> None:
    """Also where a result names no call: it answers the call before it."""
    tokenizer.chat_template = IDS
    linked = {**call(1, x=1), "id": "call_0123456789abcdef"}
    for named in ({"tool_call_id": "call_0123456789abcdef"}, {}):
        tool = {"role": "tool", "content": "five", **named}
        messages = [user("Q"), answer("", "", linked), tool, answer("It is 5.")]
        repaired = repairs.repaired(masking.template_of(tokenizer, {}), messages)
        short = repaired[1]["tool_calls"][0]["id"]
        assert len(short) == 9
        assert repaired[2]["tool_call_id"] == short
        (row,) = made(tokenizer, messages)
        assert said([row], tokenizer) == [f"{short}:look<|im_end|>", "It is 5.<|im_end|>"]


@pytest.mark.parametrize("choice", ["auto", "all"])
def test_a_row_with_a_damaged_turn_goes_whole_however_its_turns_share_examples(
    choice: str, tokenizer: Any, tmp_path: Path
) -> None:
    """The template prints no thoughts; one of the first row's three answers has one."""
    damaged = [user("a"), answer("b"), user("c"), answer("d", "a thought"), user("e"), answer("f")]
    rows = [{"messages": damaged}, {"messages": [user("g"), answer("h"), user("i"), answer("j")]}]
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    left = all_of(path, tokenizer, on_damage="drop", expand_turns=choice)
    assert {left.place(at).split(" turn")[0] for at in range(len(left))} == {"line 2"}
    assert "train: 1 rows left out: damaged by the chat template" in left.notes("train", 99)


def test_arguments_take_the_form_that_prints_an_object(tokenizer: Any) -> None:
    """Text that is printed as it stands is no object to a template that prints objects in a form of its own."""
    own = "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content }}"
    own += "{% for c in m.tool_calls or [] %}{{ ' call ' }}"
    own += "{% if c.function.arguments is mapping %}{% for k, v in c.function.arguments.items() %}{{ k + '=' + v }}"
    own += "{% endfor %}{% else %}{{ c.function.arguments }}{% endif %}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    own += "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    tokenizer.chat_template = own
    for given in ({"x": "1"}, '{"x": "1"}', json.dumps('{"x": "1"}')):
        one = {**call(1), "function": {"name": "look", "arguments": given}}
        (row,) = made(tokenizer, [user("Q"), answer("", "", one)])
        assert said([row], tokenizer) == [" call x=1<|im_end|>"]


REMINDING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% if m.role == 'assistant' %}{{ messages[0].content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("calls", [(), (call(1, x="y"),)], ids=["text", "text and a call"])
def test_a_context_text_that_a_template_prints_inside_a_turn_is_never_trained(
    calls: tuple[Any, ...], tokenizer: Any
) -> None:
    """It repeats the first message behind every answer; the answer quotes that message, so words would not tell. Asked
    for, the turn is refused by name; rendered once, its span ends where its own text does.
    """
    tokenizer.chat_template = REMINDING
    messages = [user("Be brief."), answer("Be brief.", "", *calls)]
    (row,) = made(tokenizer, messages)
    assert (row.example, row.dropped) == (None, "the chat template prints message 2 so that its place is not certain")
    (once,) = made(tokenizer, messages, expand_turns="none")
    assert said([once], tokenizer) == ["Be brief."]


def test_an_example_says_how_its_row_would_look_rendered_once() -> None:
    """Qwen3 prints an empty thought in the last turn alone, so the first of two turns would be untrue."""
    tokenizer = published.tokenizer("qwen3")
    messages = [user("Q"), answer("A"), user("R"), answer("B")]
    rows = rendered(tokenizer, messages, None, {})
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert [(row.turns, row.once, row.untrue) for row in rows] == [(1, len(whole), 1), (1, len(whole), 0)]


def test_what_was_printed_for_marks_is_forgotten_in_time_and_never_mistaken() -> None:
    remembered = Remembered()
    remembered.SHAPES, remembered.CHARACTERS = 3, 20  # type: ignore[misc]
    first = remembered.shape(0, "a")
    assert remembered.text(first, False, lambda: "first" * 10) == "first" * 10
    others = [remembered.shape(first, name) for name in "bcd"]
    assert len({first, *others, remembered.shape(0, "a")}) == 5  # forgotten, and numbered anew
    assert remembered.text(first, False, lambda: "another") == "first" * 10
    remembered.text(others[0], False, lambda: "second")
    assert remembered.text(first, False, lambda: "another") == "another"


def test_an_answer_ends_at_the_token_that_training_adds(tmp_path: Path) -> None:
    """GLM's turns are trained to end with the next header, which a folder made by hand names nowhere."""
    from mlxtune.evaluate.generate import end_ids
    from mlxtune.model.load import load

    folder = tiny.make_model(tmp_path / "model", vocab_size=640)
    tokenizer = published.tokenizer("glm4moe")
    tokenizer.save_pretrained(str(folder))
    loaded = load(str(folder), "float32")
    stops = set(tokenizer.convert_tokens_to_ids(["<|user|>", "<|observation|>"]))
    assert not stops & set(loaded.eos_ids)
    assert stops <= end_ids(loaded)
    (row,) = made(tokenizer, [user("Q"), answer("A"), user("Look"), answer("", "", call(1, x="y")), result(1, "five")])
    assert [run.ids[run.end - 1] in stops for run in runs_of(row)] == [True, True]
