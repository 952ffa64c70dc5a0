"""Self-Instruct: each filter drops what it is for and nothing else, in every script; what is made can be trained on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from made import CUT, Scripted, lines, making, opened, reasons

from mlxtune.errors import UserError
from mlxtune.evaluate.engines.request import Request
from mlxtune.make import filters
from mlxtune.make.filters import Limits
from mlxtune.make.folder import Making
from mlxtune.make.guard import Guard
from mlxtune.make.instructions import SelfInstruct
from mlxtune.make.parsing import examples_in
from mlxtune.make.prompts import MORE
from mlxtune.make.seeds import Example, Seed, languages

SEEDS = [
    Seed("s0", "Name three fruits that grow on trees in winter.", (Example("", "None do."),), False),
    Seed("s1", "Tell whether the tweet is angry.", (Example("I hate this!", "angry"),), True),
    Seed("s2", "Put the sentence into the past tense.", (Example("I go home.", "I went home."),), False),
]
GUARDED = "Which planet of our solar system has the most moons?"
# Of the first prompt, in its order: a task, and the code it is dropped for; "" where it stays.
FIRST = [
    ("Name three fruits that grow on trees in summer.", "near duplicate"),
    ("Explain tides to me.", ""),
    ("Explain tides.", "too short"),
    ("Repeat " + "very " * 149 + "often.", "too long"),
    ("- Give the steps of making bread at home.", "first character"),
    ("Draw a horse that stands on a hill.", "blacklisted"),
    ("Write a program that adds two numbers.", "program"),
    (GUARDED, "guarded"),
]
# Of the second one; the answer is cut in its last item.
SECOND = [
    ("Explain the tides to me.", "near duplicate"),
    ("Écris un poème sur la mer du Nord.", ""),
    ("¿Qué hora es en Tokio cuando es mediodía?", ""),
    ("列出三种颜色", ""),
    ("اشرح كيف تعمل الساعة الرملية", ""),
    ("Объясни, почему небо голубое.", ""),
    ("Judge whether the reply is polite or rude.", ""),
    ("Describe how a mapping differs from a list", "cut"),
]
# What is written as the examples of some tasks: an input, an output, and the code it is dropped for.
EXAMPLES: dict[str, list[tuple[str, str, str]]] = {
    "Explain tides to me.": [
        ("", "The moon pulls at the sea.", ""),
        ("", "", "empty"),
        ("", "They are:", "unfinished"),
    ],
    "Écris un poème sur la mer du Nord.": [("vagues", "vagues", "copied"), ("sel", "Le sel chante.", "")],
    "列出三种颜色": [("", "红、黄、蓝", ""), ("", "红、黄、蓝", "duplicate")],
    "Judge whether the reply is polite or rude.": [
        ("Go away!", "rude", ""),
        ("Well then.", "polite", "contradiction"),
        ("Well then.", "rude", "contradiction"),
        ("", "polite", "no input"),
        ("Please sit down.", "polite", "cut"),
    ],
    "اشرح كيف تعمل الساعة الرملية": [("", "ينزل الرمل ببطء", "")],
    "Объясни, почему небо голубое.": [("", f"Look here: {GUARDED}", "guarded")],
}
LABELLED = "Judge whether the reply is polite or rude."
# Codes that take more than one text, or an answer, to tell.
OTHERS = ("near duplicate", "guarded", "cut", "unparseable", "no instance", "duplicate", "contradiction", "no input")
UNREADABLE = "¿Qué hora es en Tokio cuando es mediodía?"  # examples of it come in no form
LOST = ("Объясни, почему небо голубое.", UNREADABLE)  # without an example that is left


def task_of(request: Request) -> str:
    """The task that a prompt is about."""
    return re.findall(r"^Task: (.*)$", request.messages[0]["content"], re.MULTILINE)[-1]


def written(task: str) -> str:
    """The examples of a task, as an engine writes them."""
    if task == UNREADABLE:
        return "Son las nueve de la noche."
    text = ""
    for number, (given, output, code) in enumerate(EXAMPLES.get(task, [("", "As you like.", "")]), 1):
        first, second = ("Label", "Input") if task == LABELLED else ("Input", "Output")
        given = given or "(none)"
        one, other = (output, given) if task == LABELLED else (given, output)
        text += f"**Example {number}**\n{first}: {one}\n{second}: {other}\n\n"
        if code == "cut":
            text = text.rstrip() + CUT
    return text


def answers(request: Request) -> str:
    kinds = {"1": FIRST, "2": SECOND}
    if request.id.endswith(" kind"):
        return "Yes." if task_of(request) == LABELLED else "No, it is open."
    if request.id.endswith(" examples"):
        return written(task_of(request))
    tasks = kinds.get(request.id.removeprefix("round 1 prompt "))
    if tasks is None:
        return "I cannot think of any."
    numbered = [f"{number}. **{task}**" for number, (task, _) in enumerate(tasks, 1)]
    return "Here they are:\n" + "\n".join(numbered) + (CUT if tasks[-1][1] == "cut" else "")


def made(out: Path, engine: Scripted, count: int = 99, seeds: list[Seed] = SEEDS, **settings: Any) -> dict[str, Any]:
    """What came of a making with three prompts a round."""
    with making(out, engine, "instructions", **settings) as one:
        maker = SelfInstruct(one, seeds, Limits(languages=languages(seeds)), Guard([GUARDED]), 3, 0)
        return maker.run(count)


def test_each_filter_drops_exactly_its_planted_rows(tmp_path: Path) -> None:
    document = made(tmp_path, Scripted(answers))
    rejected = reasons(tmp_path)
    expected: dict[str, list[str]] = {}
    for task, code in [*FIRST, *SECOND]:
        expected.setdefault(code, []).append(task)
    for examples in EXAMPLES.values():
        for given, output, code in examples:
            expected.setdefault(code, []).append(given + output)
    kept = [task for task in expected.pop("") if task not in LOST and any(task == one for one, _ in FIRST + SECOND)]
    found = {
        code: [line.get("input", "") + line["output"] if "output" in line else line["instruction"] for line in some]
        for code, some in rejected.items()
        if code not in ("unparseable", "no instance")
    }
    assert {code: sorted(some) for code, some in found.items()} == {c: sorted(some) for c, some in expected.items()}
    assert sorted(line["instruction"] for line in rejected["no instance"]) == sorted(LOST)
    assert [line.get("instruction", line["answer"]) for line in rejected["unparseable"]] == [
        *("I cannot think of any.", UNREADABLE),
        *["I cannot think of any."] * 9,  # of the rounds after it
    ]
    assert set(rejected) == {*filters.INSTRUCTION, *filters.EXAMPLE, *OTHERS}
    rows = lines(tmp_path / "train.jsonl")
    assert sorted({row["messages"][0]["content"].split("\n\n")[0] for row in rows}) == sorted(kept)
    assert document["kept"] == len(kept) == 5 and "3 rounds" in document["stopped"]


def test_what_is_wrong_with_answers_is_wrong_with_outputs(tmp_path: Path) -> None:
    planted = {
        "refusal": "I'm sorry, but I can't help with that.",
        "placeholder": "Dear [Your Name], the tides come and go.",
        "template marks": "The sea does.<|im_end|>",
        "encoding": "The m\ufffd\ufffdn does.",
        "secret": "It is AKIAIOSFODNN7REALKEY.",
    }
    task = "Explain tides to me."

    def answer(request: Request) -> str:
        if request.id.endswith(" examples"):
            return "".join(f"Example {n}\nOutput: {text}\n\n" for n, text in enumerate(planted.values(), 1))
        return f"1. {task}" if request.id == "round 1 prompt 1" else "No."

    assert made(tmp_path, Scripted(answer))["kept"] == 0
    found = {code: [one["output"] for one in some if "output" in one] for code, some in reasons(tmp_path).items()}
    assert {code: outputs for code, outputs in found.items() if outputs} == {c: [text] for c, text in planted.items()}


def test_an_output_may_have_lines_that_look_like_fields() -> None:
    letter = "A form:\nInput: your name\nLabel: red"
    headed = f"Example 1\nInput: a form\nOutput: {letter}\nExample 2\nOutput: b\n\nOutput: c"
    assert examples_in(headed) == [Example("a form", letter), Example("", "b"), Example("", "c")]
    labelled = "Example 1\nLabel: rude\nInput: Go!\nLabel: no\nExample 2\nClass label: kind\nInput: Sit."
    assert examples_in(labelled) == [Example("Go!\nLabel: no", "rude"), Example("Sit.", "kind")]
    assert examples_in("Input: a\nOutput: b\nInput: c\nOutput: d") == [Example("a", "b"), Example("c", "d")]


def test_a_row_is_a_question_with_its_answer_and_tells_its_parents(tmp_path: Path) -> None:
    made(tmp_path, Scripted(answers))
    by_task = {row["messages"][0]["content"]: row for row in lines(tmp_path / "train.jsonl")}
    row = by_task[f"{LABELLED}\n\nGo away!"]
    assert row["messages"][1] == {"role": "assistant", "content": "rude"}
    assert row["made"]["id"] == "round 1 prompt 2 task 7"
    assert sorted(row["made"]["parents"]) == ["s0", "s1", "s2"]
    assert row["made"]["scores"]["nearest"] == pytest.approx(2 * 3 / (8 + 6), abs=1e-4)  # "whether the is" of s1


def test_later_rounds_show_two_made_tasks_and_all_prompts_of_a_round_begin_alike(tmp_path: Path) -> None:
    engine = Scripted(answers)
    seeds = [Seed(f"s{n}", f"Describe the {n}th thing you see.", (Example("", "A lamp."),), None) for n in range(9)]
    made(tmp_path, engine, seeds=seeds)
    prompts = {request.id: str(request.messages[0]["content"]) for request in engine.asked}
    shown = {id: text.removeprefix(MORE) for id, text in prompts.items() if text.startswith(MORE)}
    assert len(shown) == 12 == sum(" prompt " in id and " task " not in id for id in prompts)
    for id, text in shown.items():
        old = len(re.findall(r"^\d\. Describe the \dth", text, re.MULTILINE))
        assert (old, text.count("\n") + 1) == ((8, 8) if id.startswith("round 1 ") else (6, 8))
    assert len(set(shown.values())) == 12


def test_a_larger_count_goes_on_where_a_smaller_one_ended_and_a_failing_batch_loses_itself(tmp_path: Path) -> None:
    def refusing(request: Request) -> str:
        if request.id == "round 1 prompt 3":
            raise UserError("no memory is left")
        if request.id.endswith("prompt 2 task 6 examples"):
            raise UserError("no memory is left")
        return answers(request)

    few = Scripted(refusing, at_once=1)
    document = made(tmp_path / "one", few, count=2)
    assert (document["kept"], document["stopped"]) == (2, "")
    more = Scripted(refusing, at_once=1)
    document = made(tmp_path / "one", more)
    assert more.asked[0].id.startswith("round 2 ") and document["kept"] == 5
    assert document["failed"] == 2 and "unparseable" in document["rejected"]
    assert [line["instruction"] for line in reasons(tmp_path / "one")["failed"]] == ["Объясни, почему небо голубое."]
    made(tmp_path / "two", Scripted(refusing, at_once=1))
    for name in ("train.jsonl", "rejected.jsonl", "journal.jsonl", "card.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_seeds_of_other_scripts_are_compared_counted_and_filtered_in_their_own(tmp_path: Path) -> None:
    seeds = [
        Seed("a", "请用一句话介绍你最喜欢的季节。", (Example("", "我喜欢秋天。"),), None),
        Seed("b", "把下面的句子翻译成英文。", (Example("你好", "Hello"),), None),
    ]
    tasks = {
        "请用一句话介绍你最喜欢的食物。": "near duplicate",
        "为什么天空是蓝色的？": "",
        "你好": "too short",
        "请画一张北京地图。": "blacklisted",
        "编写一个程序计算圆的面积。": "program",
        "》天空是蓝色": "first character",
    }

    def chinese(request: Request) -> str:
        if request.id.endswith(" kind"):
            return "no"
        if request.id.endswith(" examples"):
            return "Output: 因为阳光在空气中散射。"
        return "\n".join(f"{number}、{task}" for number, task in enumerate(tasks, 1))

    with making(tmp_path, Scripted(chinese), "instructions") as one:
        SelfInstruct(one, seeds, Limits(languages=languages(seeds)), Guard(), 1, 0).run(5)
    assert languages(seeds) == {"zh"}
    found = {}
    for line in lines(tmp_path / "rejected.jsonl"):
        found.setdefault(line["instruction"], line["reason"])  # those after it are of rounds that say all again
    assert {row["messages"][0]["content"] for row in lines(tmp_path / "train.jsonl")} == {"为什么天空是蓝色的？"}
    assert found == {**tasks, "为什么天空是蓝色的？": "near duplicate"}


def test_a_model_that_goes_on_with_a_text_is_read_from_where_the_text_stopped(tmp_path: Path) -> None:
    seeds = [Seed(f"s{n}", f"Describe the {n}th thing you see.", (Example("", "A lamp."),), None) for n in range(9)]

    def goes_on(request: Request) -> str:
        if request.id.endswith(" kind"):
            return " no\n"
        if request.id.endswith(" examples"):
            return "Input: two eggs\nOutput: An omelette.\nExample 2\nOutput: Soup, then"
        return " Cook something for a friend.\n10. Why do leaves turn red?" + CUT

    engine = Scripted(goes_on)
    with Making(tmp_path, {"how": "instructions"}, opened(engine, chats=False)) as one:
        SelfInstruct(one, seeds, Limits(), Guard(), 1, 0).run(1)
    prompts = [str(request.messages[0]["content"]) for request in engine.asked]
    assert prompts[0].startswith("Come up with a series of tasks:\n1. ") and prompts[0].endswith("\n9.")
    assert prompts[2].endswith("Task: Cook something for a friend.\nExample 1\n")
    questions = [row["messages"][0]["content"] for row in lines(tmp_path / "train.jsonl")]
    assert questions == ["Cook something for a friend.\n\ntwo eggs", "Cook something for a friend."]
    assert [line["instruction"] for line in reasons(tmp_path)["cut"]] == ["Why do leaves turn red?"]
