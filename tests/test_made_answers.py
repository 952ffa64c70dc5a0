"""What is looked for in answers that an engine made, and which of several is the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import judges
import pytest
import tiny

from mlxtune.errors import UserError
from mlxtune.evaluate.checks.sandbox.sandbox import Programs
from mlxtune.evaluate.checks.suite import Suite, read_suite
from mlxtune.evaluate.engines.request import Answer
from mlxtune.evaluate.judging.verdicts import judge_pairs
from mlxtune.make.answer_filters import FILTERS, Made, wrong_with
from mlxtune.make.best_of import Best, best_of, contests, majority, narrowed
from mlxtune.make.critique import critique_prompt, finds_nothing, read_principles, revision_prompt

ASKED = "Explain to my little sister why rain falls from the clouds."
SENTENCES = "Small drops of water meet in the cloud and join until they are heavy. "
# Code of a filter -> answers that it drops and no other one does. All to ASKED, but where a prompt stands beside.
PLANTED: dict[str, list[str | tuple[str, str]]] = {
    "cut": [SENTENCES],  # its finish says so
    "empty": ["", " \n "],
    "encoding": ["The cloud\u00e2\u20ac\u2122s drops grow heavy.", "Drops \ufffd fall."],
    "template marks": [
        "Drops grow heavy.<|im_end|>",
        "[INST] Drops grow heavy. [/INST]",
        "Drops grow heavy.\nUser: And what is snow?",
        "### Response: drops grow heavy.",
    ],
    "refusal": [
        "I'm sorry, but I can't help with that.",
        ("Erkläre den Regen.", "Dabei kann ich leider nicht helfen."),
    ],
    "placeholder": [
        "Dear [Your Name], the drops grow heavy.",
        "The drops grow heavy. TODO: explain the wind.",
        "As an AI, the rain is something I like to explain: drops grow heavy.",
        "<insert the weather of your town> is why the drops fall.",
    ],
    "prompt copied": [ASKED, f"{ASKED} The drops are heavy."],
    "secret": ["The password = 'rain-and-sun-77' opens the gate of the cloud."],
    "markup": ["Drops join &amp; grow heavy."],
    "cut off": ["```\nrain()\n", SENTENCES * 3 + "And then the wind carries all of the drops away to where the"],
    "language": [
        "Die Tropfen in der Wolke werden schwer und fallen auf die Erde.",
        "雨滴变重,于是落到地上。",
        ("为什么雨会从云里落下来？请解释。", SENTENCES),
    ],
    "words": ["Heavy."],
}
GOOD: list[str | tuple[str, str]] = [
    SENTENCES,
    ("Write a form letter with placeholders for a shop.", "Dear [Customer Name], thank you for your order."),
    ("Translate to German: the drops are heavy and they fall.", "Die Tropfen sind schwer und sie fallen auf die Erde."),
    ("What is a rake good for in my garden?", "A tool."),
    ("What is the Chinese word for water and rain?", "水雨"),
    ("How do I write & in HTML, with an entity?", "Write &amp; in the text of the page."),
    ("What does [INST] mean in the prompt of a model?", "The mark [INST] begins what the user says to the model."),
    ("Complete this code: def add(a, b):", "```python\nComplete this code: def add(a, b):\n    return a + b\n```"),
    ("def add(a, b): # of two numbers\n", "def add(a, b): # of two numbers\n    return a + b"),
    (
        "请写一个把两个数相加的函数。",
        "```python\ndef add(first, second):\n    return first + second  # the sum of the two\n```",
    ),
    ("Как в этой системе поставить пакет из списка?", "python -m pip install --requirement packages.txt"),
    ("Какая формула воды, если писать её латиницей?", "Это H2O."),
    ("日本の首都はどこですか。", "東京都千代田区"),
    ("How do I say thank you very much in Persian?", "خیلی متشکرم از لطف شما دوست من"),
    ("แปลเป็นภาษาอังกฤษ: สวัสดีชาวโลกทุกคน", "Hello to the people of the world and to you."),
    ("Write a mail that declines the dinner on Friday.", "I'm sorry, but I can't make it on Friday."),
    ("Sage Jonas höflich ab, als kurze Nachricht.", "Lieber Jonas, leider kann ich am Freitag nicht kommen."),
    ("Make it shorter: I'm sorry, but I am unable to help you with that.", "Sorry, I can't help with that."),
    ("Escribe en letras grandes que hoy cierran todas las tiendas.", "HOY CIERRA TODO EN LA CIUDAD, NO HAY TIENDAS."),
    ("Write a dialogue between a user and an assistant on rain.", "User: Why does it rain?\nAssistant: Drops fall."),
    ("How do I connect to the database from Python?", "connect(user='ada', password='your_password') does that."),
    "Call rows[name] for the row, and see [the page](https://example.org) on rain.",
]


def made(planted: str | tuple[str, str], **more: Any) -> Made:
    prompt, text = planted if isinstance(planted, tuple) else (ASKED, planted)
    return Made([{"role": "user", "content": prompt}], answer(text, more.pop("finish", "stop")), least_words=2, **more)


def answer(text: str, finish: Any = "stop", sample: int = 0) -> Answer:
    return Answer("p", sample, text, "", finish, 5)


def test_every_filter_drops_exactly_what_is_planted_for_it() -> None:
    assert PLANTED.keys() == FILTERS.keys()
    for code, texts in PLANTED.items():
        for planted in texts:
            one = made(planted, finish="length" if code == "cut" else "stop")
            assert wrong_with(one) == code, planted
            # An empty answer has too few words as well.
            others = {name for name, shows in FILTERS.items() if shows(one)} - {code, "words"}
            assert not others, (planted, others)
    for planted in GOOD:
        assert wrong_with(made(planted)) == "", planted


def test_emoji_alone_copy_no_prompt() -> None:
    assert wrong_with(Made([{"role": "user", "content": "🌧️?"}], answer("☔ 🙂"), least_words=0)) == ""


def test_a_long_answer_may_have_more_letters_than_words() -> None:
    asked = "请详细解释为什么会下雨。"
    assert wrong_with(made((asked, "云里的水滴变重。" * 400))) == ""  # 2,800 letters
    assert wrong_with(made((asked, "云里的水滴变重。" * 600))) == "words"
    assert wrong_with(made("The drops are heavy. " * 400)) == "words"


def test_a_refusal_is_kept_where_one_is_wanted_and_a_user_has_none() -> None:
    assert wrong_with(made("I'm sorry, but I can't help with that.", may_refuse=True)) == ""
    for said in (
        "We can't make the reset work, is there another way?",
        ("Bitte melden Sie sich nun damit an.", "Leider kann ich mich damit nicht anmelden."),
        "I can't create this folder on my disk, why?",
    ):
        assert wrong_with(made(said, is_of_user=True)) == ""
    assert wrong_with(made("I'm sorry, but I can't help with that.", is_of_user=True)) == "refusal"


def suite_of(folder: Path, *rows: dict[str, Any], programs: Programs | None = None) -> Suite:
    return read_suite(tiny.write_jsonl(folder / "prompts.jsonl", list(rows)), programs, expecting=False)


def chosen(suite: Suite, texts: list[str], judge: judges.Scripted | None = None) -> Best | str:
    """The best of the answers to the suite's only row; the reason where there is none."""
    (row,) = suite.rows
    answers = [answer(text, sample=number) for number, text in enumerate(texts)]
    found = narrowed(row, answers, judge is not None)
    if not found.left:
        return found.why
    verdicts = None
    if judge is not None:
        verdicts = {one.pair.id: one for one in judge_pairs(judge, list(contests(row, answers, found.left)))}
    return best_of(row, answers, found, verdicts)


@pytest.mark.parametrize(
    ("check", "texts", "place"),
    [
        # "1,234" may be 1234 or 1.234; both agree with "1234".
        ("number", ["It is 7.", "The answer is 1234", "#### 1,234", "8"], 1),
        # "50%" is 50 or 0.5: two of them are one party, but between the two others it is of both.
        ("number", ["7", "50%", "50%", "8"], 1),
        ("number", ["7", "0.5", "50%", "50"], None),
        ("number", ["72 clips", "70", "\\boxed{72}", "70", "71"], None),  # two parties are as large
        ("number", ["1", "2", "3"], None),
        ("number", ["none", "nothing", "5"], None),  # what comes to nothing agrees with nothing
        ({"choice": {"options": ["red", "blue"]}}, ["B", "The answer is A", "red", "blue or red"], 1),
        ("json", ['{"a": 1, "b": 2}', "no", '{"b": 2,"a": 1}', '{"a": 2}'], 0),
    ],
)
def test_the_majority_is_of_what_answers_come_to(
    check: Any, texts: list[str], place: int | None, tmp_path: Path
) -> None:
    found = chosen(suite_of(tmp_path, {"prompt": "How many?", "checks": [check]}), texts)
    if place is None:
        assert found == "no majority"
    else:
        assert isinstance(found, Best) and (found.place, found.how) == (place, "majority")
        assert found.scores == {"agree": 2, "of": 4}


def test_the_minority_is_not_shown_to_be_worse_but_what_fails_a_check_is(tmp_path: Path) -> None:
    unknown = suite_of(tmp_path, {"prompt": "How many?", "checks": ["number"]})
    known = suite_of(tmp_path, {"prompt": "How many?", "reference": "5", "checks": ["number"]})
    assert chosen(unknown, ["4", "5", "5"]) == Best(1, "majority", {"agree": 2, "of": 3}, worse=None)
    assert chosen(known, ["4", "5", "5"]) == Best(1, "majority", {"agree": 2, "of": 3}, worse=0)
    assert chosen(known, ["4", "4", "5"]) == Best(2, "checks", {"passed": 1, "of": 3}, worse=0)  # not the majority
    assert chosen(known, ["4", "4", "4"]) == "check"


def test_the_program_that_passes_its_tests_is_the_best(tmp_path: Path) -> None:
    with Programs(True) as programs:
        row = {"prompt": "Write add.", "checks": [{"code": "assert add(2, 2) == 4 and add(1, 2) == 3"}]}
        suite = suite_of(tmp_path, row, programs=programs)
        wrong, right = (f"```python\ndef add(a, b):\n    return a {sign} b\n```" for sign in "*+")
        assert chosen(suite, [wrong, right]) == Best(1, "tests", {"passed": 1, "of": 2}, worse=0)
        assert chosen(suite, [wrong, wrong]) == "check"


def test_a_judge_asks_each_answer_against_each_and_beats_in_both_orders_alone(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, {"prompt": "Why?"})
    judge = judges.Scripted(judges.by_length)
    assert chosen(suite, ["middle", "the longest", "low"], judge) == Best(1, "judge", {"judge": 1.0}, worse=2)
    assert len(judge.prompts) == 6  # three pairs, both ways round
    first = chosen(suite, ["one", "two", "six"], judges.Scripted(judges.always_first))
    assert first == Best(0, "judge", {"judge": 0.5}, worse=None)  # it contradicts itself: nothing is shown to be worse
    unread = chosen(suite, ["one", "two"], judges.Silent(judges.by_length))
    assert unread == Best(0, "judge", {"judge": 0.5}, worse=None)


def test_a_judge_decides_between_those_that_agree_and_a_failed_check_is_worse_than_its_word(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, {"prompt": "How many?", "reference": "5", "checks": ["number"]})
    found = chosen(suite, ["the very longest of all says 6", "5", "it is 5"], judges.Scripted(judges.by_length))
    assert found == Best(2, "judge", {"agree": 2, "of": 3, "judge": 1.0}, worse=0)


def test_answers_agree_where_every_check_that_can_tell_does(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, {"prompt": "How many?", "checks": ["number", {"choice": {"options": ["a", "b"]}}]})
    (row,) = suite.rows
    assert majority(row, [answer("B 5"), answer("A 5"), answer("B 6"), answer("B 5")]) == [0, 3]


def test_principles_are_lines_and_a_critique_may_find_nothing(tmp_path: Path) -> None:
    file = tmp_path / "principles.txt"
    file.write_text("# for a shop\n\nSay what to do next.\n  No more than five sentences.\n")
    principles = read_principles(file)
    assert principles == ["Say what to do next.", "No more than five sentences."]
    asked = [{"role": "user", "content": "Where is it?"}]
    (critique,), (revision,) = (
        critique_prompt(principles, asked, "Here."),
        revision_prompt(principles, asked, "Here.", "1: says no next step."),
    )
    for message in (critique, revision):
        assert message["role"] == "user" and "2. No more than five" in message["content"]
        assert "Request:\nWhere is it?\n\nAnswer:\nHere." in message["content"]
    assert revision["content"].endswith("What is wrong with it:\n1: says no next step.")
    assert finds_nothing(" Nothing. ") and finds_nothing("**nothing**") and not finds_nothing("nothing is said of it")
    file.write_text("# none\n")
    with pytest.raises(UserError, match="has no principle"):
        read_principles(file)
