"""Pairs and rated answers, shown, checked and rewritten: nothing of a pair is lost, and what it may teach is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from mlxtune.cli.data import convert
from mlxtune.data.rows import formats, rewriting
from mlxtune.data.rows.formats import Record
from mlxtune.data.survey import lint, sampling
from mlxtune.errors import UserError
from mlxtune.report import data_page

TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
CALL = {"id": "call00100", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def pair(prompt: Any, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


SHORT = pair("Hi", "Hello!", "What?", source="me")
TALK = {
    "prompt": [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello."), user("Why?")],
    "chosen": [assistant("Because.")],
    "rejected": [assistant("No idea, sorry about that.")],
}
CALLING = {
    "prompt": [user("1 + 1?")],
    "chosen": [assistant("", tool_calls=[CALL])],
    "rejected": [assistant("3")],
    "tools": [TOOL],
}
LONG_SIDE = {
    "prompt": [user("1 + 1?")],
    "chosen": [
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": "2", "tool_call_id": "call00100"},
        assistant("2"),
    ],
    "rejected": [assistant("3")],
    "tools": [TOOL],
}
TARGETS = ("pairs", "pairs-implicit", "openai", "llama-factory")


def read(path: Path) -> list[Any]:
    return list(formats.read(path, preferences=True))


def rewritten(rows: list[Any], target: str, folder: Path, **more: Any) -> rewriting.Rewritten:
    given = tiny.write_jsonl(folder / "given.jsonl", rows)
    return rewriting.rewrite(iter(read(given)), target, folder / "out.jsonl", **more)


def known(record: Record) -> tuple[Any, ...]:
    """What a pair means; ids of calls are made anew where a format has none."""
    text = json.dumps([record.messages, record.tools], sort_keys=True)
    for message in record.messages or []:
        for call in message.get("tool_calls", []):
            text = text.replace(call["id"], "ID")
    return record.side, record.prompt, text, dict(record.fields)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("row", [SHORT, TALK, CALLING])
def test_a_pair_survives_the_way_to_another_format_and_back(row: dict[str, Any], target: str, tmp_path: Path) -> None:
    done = rewritten([row], target, tmp_path)
    assert (done.written, done.left_out, done.rejected) == (1, [], 0)
    before, after = read(tmp_path / "given.jsonl"), read(tmp_path / "out.jsonl")
    assert len(before) == 2 and [known(one) for one in before] == [known(one) for one in after]


@pytest.mark.parametrize("target", ["pairs", "pairs-implicit", "kto"])
def test_a_side_of_several_messages_survives_where_it_can_stand(target: str, tmp_path: Path) -> None:
    rewritten([LONG_SIDE], target, tmp_path)
    before, after = read(tmp_path / "given.jsonl"), read(tmp_path / "out.jsonl")
    assert [one.messages for one in before] == [one.messages for one in after]


def test_a_pair_becomes_two_rated_rows_that_stay_what_they_are(tmp_path: Path) -> None:
    done = rewritten([TALK, SHORT], "kto", tmp_path)
    assert done.written == 4
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [True, False, True, False]
    assert lines[2] == {"source": "me", "prompt": [user("Hi")], "completion": [assistant("Hello!")], "label": True}
    first = read(tmp_path / "out.jsonl")
    again = rewriting.rewrite(iter(first), "kto", tmp_path / "again.jsonl")
    assert again.written == 4 and [known(a) for a in read(tmp_path / "again.jsonl")] == [known(a) for a in first]


@pytest.mark.parametrize(
    ("row", "target", "said"),
    [
        (LONG_SIDE, "openai", "OpenAI's preference rows have one message of the assistant on each side, not 3"),
        (LONG_SIDE, "llama-factory", "LLaMA-Factory's pairs have one message of the assistant on each side, not 3"),
        (
            {**CALLING, "chosen": [assistant("Let me see.", tool_calls=[CALL])]},
            "llama-factory",
            "no place for an answer that has text and calls tools",
        ),
        (
            {**LONG_SIDE, "rejected": [*LONG_SIDE["chosen"][:2], assistant("3")]},
            "pairs-implicit",
            "both answers begin with the same messages",
        ),
        ({"messages": [user("Hi"), assistant("Hello!")]}, "pairs", "it has one answer, and a pair has two"),
        ({"messages": [user("Hi"), assistant("Hello!")]}, "kto", "its answer is not rated"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_name(
    row: dict[str, Any], target: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        rewritten([row], target, tmp_path)
    assert not (tmp_path / "out.jsonl").exists()


def test_of_pairs_the_chosen_answers_alone_become_conversations_and_that_is_said(tmp_path: Path) -> None:
    given, out = tiny.write_jsonl(tmp_path / "pairs.jsonl", [TALK, SHORT]), tmp_path / "sft.jsonl"
    tiny.one_clear_line(
        tiny.mlxtune("data", "convert", given, out), "a pair has two answers, a row of messages has one"
    )
    said = tiny.done("data", "convert", given, out, "--drop")
    assert "the rejected answers of 2 pairs are left out" in said.stderr and "2 rows" in said.stdout
    first, second = (json.loads(line)["messages"] for line in out.read_text().splitlines())
    assert second == [user("Hi"), assistant("Hello!")]
    assert [message.get("weight", 1) for message in first] == [1, 1, 0, 1, 1]  # the earlier answer is context


def test_the_command_offers_every_target() -> None:
    (option,) = (one for one in convert.params if one.name == "target")
    assert tuple(option.type.choices) == rewriting.TARGETS  # type: ignore[attr-defined]


# data show.


def test_the_prompt_is_shown_once_and_the_sides_are_told_apart_by_a_sign(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    rows = [TALK, pair("Hi", "Same.", "Same.")]
    path = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    asked = ("data", "show", "--model", tokenizer_folder, "--data", path)
    text = tiny.done(*asked).stdout
    head, rest = text.split("+ chosen: 9 tokens trained on\n")
    assert "a pair, " in head and head.count("Why?") == 1 and "Why?" not in rest
    chosen, rest = rest.split("- rejected: 27 tokens trained on\n")
    assert chosen.startswith("⟦Because.") and rest.startswith("⟦No idea, sorry about that.")
    assert "line 2: a pair, dropped (" in rest
    assert tiny.done(*asked, "--limit", "1").stdout.count("- rejected") == 1  # a pair is one row
    lines = [json.loads(line) for line in tiny.done(*asked, "--json").stdout.splitlines()]
    assert [(line["row"], line["side"]) for line in lines] == [
        (n, side) for n in (1, 2) for side in ("chosen", "rejected")
    ]
    assert "dropped" in lines[2] and "dropped" in lines[3]


def test_ratings_are_shown_as_such_with_the_recipe_that_learns_from_them(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    rows = [{"messages": [user(f"Ask {n}"), assistant("Yes.")], "label": n == 0} for n in range(2)]
    path = tiny.write_jsonl(tmp_path / "rated.jsonl", rows)
    asked = ("data", "show", "--model", tokenizer_folder, "--data", path)
    lines = [json.loads(line) for line in tiny.done(*asked, "-c", "kto", "--json").stdout.splitlines()]
    assert [line["side"] for line in lines] == ["good", "bad"]
    without = [json.loads(line) for line in tiny.done(*asked, "--json").stdout.splitlines()]
    assert "ids" in without[0] and "-c kto" in without[1]["dropped"]
    file = tmp_path / "c.yaml"
    file.write_text(f"preference: {{loss: kto}}\ndata: {{path: {path}}}\nmodel: {{path: {tokenizer_folder}}}\n")
    of_file = tiny.done("data", "show", "-c", file, "--json").stdout
    assert [json.loads(line) for line in of_file.splitlines()] == lines


# data check.


def survey(tokenizer: Path, path: Path, *settings: str) -> dict[str, Any]:
    words = [word for setting in settings for word in ("--set", setting)]
    done = tiny.done("data", "check", "--model", tokenizer, "--data", path, "--json", *words)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def rows_by_code(told: dict[str, Any]) -> dict[str, Any]:
    return {finding["code"]: finding["rows"] or finding["count"] for finding in told["findings"]}


EVEN = [pair(f"Say {n}.", f"The number {n} it is.", f"It is the number {n}.") for n in range(24)]  # of equal lengths
ODD = [
    pair("Which?", "The first one, surely.", "The second of the two."),  # 25
    pair("Which?", "The second of the two.", "The first one, surely."),  # 26 contradicts it
    pair("Which?", "The second of the two.", "The third of those here."),  # 27: neither contradicted, nor contradicting
    pair("Which?", "The third of those here.", "I do not know which."),  # 28: what 27 rejects is chosen
    pair("Same?", "Yes, the same.", "Yes, the same."),  # 29
    EVEN[0],  # 30
    pair("Code?", "Here it is: print(1)", "Here it is:\n```python\nprint(1)"),  # 31
    pair("Who?", "Nobody you know.", "Write to jane@firm.org and ask."),  # 32
    pair("Do it.", "I'm sorry, but I cannot do that for you.", "Here it is, all of it."),  # 33
    pair(
        "Do it now.", "Here it is, all of it.", "I'm sorry, but I cannot do that for you."
    ),  # 34: refused by the worse one
    pair("Story?", "Once upon a time.", "On " * 99 + "on."),  # 35
    pair("Empty?", "Not at all.", ""),  # 36
    pair(None, "No prompt at all.", "Nor here."),  # 37
]


def test_each_trouble_of_pairs_is_found_in_its_own_row(tokenizer_folder: Path, tmp_path: Path) -> None:
    told = survey(tokenizer_folder, tiny.write_jsonl(tmp_path / "d.jsonl", [*EVEN, *ODD]), "data.max_tokens=250")
    found = rows_by_code(told)
    assert found["contradiction"] == [25, 26] and found["both ways"] == [27, 28]
    assert found["dropped"] == [29, 36] and found["duplicate"] == [30] and found["too long"] == [35]
    assert found["rejected cut off"] == [31] and "cut off" not in found
    assert found["e-mail"] == [32] and found["refusal"] == [33] and found["bad"] == [37]
    facts = told["splits"]["train"]
    assert facts["rows"] == 37 and facts["outcomes"]["used"] == 33
    assert facts["preferences"]["pairs"] == 36 and facts["preferences"]["pairs_used"] == 33
    assert facts["answers_per_row"] == {"1": 36}  # a pair counts once
    assert "longer" not in found and "shorter" not in found


def test_tokens_of_pairs_are_counted_as_they_are_computed(tokenizer_folder: Path, tmp_path: Path) -> None:
    told = survey(tokenizer_folder, tiny.write_jsonl(tmp_path / "d.jsonl", [pair("Hi", "Yes.", "Never.")]))
    facts = told["splits"]["train"]
    # <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n and an answer with its end, one token a letter.
    prompt = 1 + 5 + 2 + 1 + 1 + 1 + 10
    whole = [prompt + 5 + 1, prompt + 7 + 1]  # and the line's end after it
    assert facts["tokens"] == facts["preferences"]["tokens"] == sum(whole)
    assert facts["preferences"]["computed_tokens"] == sum(whole) - (prompt - 1)  # the last one predicts either answer
    assert (facts["preferences"]["chosen_tokens"], facts["preferences"]["rejected_tokens"]) == (5, 7)


@pytest.mark.parametrize(("long", "code"), [(14, "longer"), (10, ""), (6, "shorter")])
def test_lengths_that_tell_which_answer_is_chosen_are_a_finding(
    long: int, code: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    both = ("A rather long answer it is.", "A short one.")
    rows = [pair(f"Say {n}.", *(both if n < long else both[::-1])) for n in range(20)]
    told = survey(tokenizer_folder, tiny.write_jsonl(tmp_path / "d.jsonl", rows))
    found = {finding["code"]: finding for finding in told["findings"]}
    assert {"longer", "shorter"} & found.keys() == ({code} if code else set())
    assert told["splits"]["train"]["preferences"]["chosen_longer"] == long / 20
    if code == "longer":
        (reason,) = found[code]["reasons"]
        assert reason.startswith("the chosen answer is longer in 70% of them (")


def test_rated_answers_of_one_kind_and_rows_of_several_kinds_are_findings(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    def thumb(text: str, label: bool) -> dict[str, Any]:
        return {"prompt": "Which one?", "completion": text, "label": label}

    path = tiny.write_jsonl(tmp_path / "d.jsonl", [thumb("The first one here.", True), thumb("The other one.", True)])
    told = survey(tokenizer_folder, path, "preference.loss=kto")
    assert rows_by_code(told)["one-sided"] == 2
    assert told["splits"]["train"]["preferences"]["good"] == 2
    tiny.write_jsonl(
        path, [thumb("The first one here.", True), thumb("The first one here.", False), thumb("No.", False)]
    )
    found = rows_by_code(survey(tokenizer_folder, path, "preference.loss=kto"))
    assert found["contradiction"] == [1, 2] and "one-sided" not in found


def test_rows_of_several_kinds_in_one_split_are_an_error(tokenizer_folder: Path, tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "train-0.jsonl", EVEN[:3])
    tiny.write_jsonl(tmp_path / "train-1.jsonl", [{"messages": [user("Which?"), assistant("The first one here.")]}])
    (found,) = (one for one in survey(tokenizer_folder, tmp_path)["findings"] if one["code"] == "mixed")
    assert (found["severity"], found["count"]) == ("error", 1)
    assert list(found["reasons"]) == ["pairs: 3", "conversations: 1"]


def test_rows_that_the_objective_is_not_for_are_an_error(tokenizer_folder: Path, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", EVEN[:3])
    told = survey(tokenizer_folder, path, "preference.loss=kto")
    (found,) = (one for one in told["findings"] if one["code"] == "objective")
    assert found["count"] == 3 and list(found["reasons"]) == ["kto is not for pairs"]
    assert "rated answers with kto or apo" in found["fix"]
    assert "objective" not in rows_by_code(survey(tokenizer_folder, path, "preference.loss=apo"))


def test_the_page_and_the_terminal_show_a_pair_with_its_signs(tokenizer_folder: Path, tmp_path: Path) -> None:
    key = "AKIAABCDEFGHIJKLMNOP"
    path, page = (
        tiny.write_jsonl(tmp_path / "d.jsonl", [pair(f"<b>{key}</b>", "Yes.", "No, never.")]),
        tmp_path / "c.html",
    )
    told = tiny.done("data", "check", "--model", tokenizer_folder, "--data", path, "--html", page).stdout
    assert "1, of which 1 are used" in told and "tokens of both sides" in told
    text = page.read_text()
    assert "+ chosen: " in text and "- rejected: " in text and key not in text and "<b>" not in text
    assert data_page.KINDS["error"] == "bad"


def test_a_sample_takes_both_sides_of_a_pair_or_none(tmp_path: Path) -> None:
    records = read(tiny.write_jsonl(tmp_path / "d.jsonl", EVEN))
    some = sampling.sample(records, 10, seed=0)
    assert (some.taken, some.read, len(some.rows)) == (10, 24, 20)
    assert all(one.row == other.row for one, other in zip(some.rows[::2], some.rows[1::2], strict=True))


def test_what_may_be_wrong_with_any_text_is_a_kind_that_rows_show() -> None:
    assert all(lint.KINDS[code].shows is not None for code in lint.OF_ANY_TEXT)
