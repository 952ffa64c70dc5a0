"""Each kind of check says what is right with a text: a table of texts, hostile ones too."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from checking import HERE, ROW, answer_of, check_of, score

from mlxtune.data.survey.refusals import refuses
from mlxtune.evaluate.checks import patterns
from mlxtune.evaluate.checks.arguments import Place
from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.checks.kinds import KINDS, read_checks
from mlxtune.evaluate.checks.languages import language_of
from mlxtune.evaluate.checks.numbers import gsm8k_flexible, gsm8k_strict
from mlxtune.evaluate.checks.sandbox.sandbox import Programs
from mlxtune.evaluate.engines.request import Answer

LAUGHS = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;"><!ENTITY c "&b;&b;">]><x>&c;</x>'
AGE = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"], "additionalProperties": False}
NAMED = {"patternProperties": {"^n_": {"type": "number"}}, "additionalProperties": False}


TABLE: list[tuple[Any, str, float]] = [
    # exact: but for spaces and the way a character is written
    ({"exact": "Paris"}, "  Paris\n", 1),
    ({"exact": "Paris"}, "paris", 0),
    ({"exact": "Paris"}, "Paris.", 0),
    ({"exact": "caf\u00e9 au lait"}, "cafe\u0301  au\nlait", 1),
    ({"exact": ["yes", "no"]}, "no", 1),
    ("exact", "B", 1),
    ("exact", "A", 0),
    ({"iexact": "STRASSE"}, "straße", 1),
    ({"iexact": "Paris"}, "PARIS", 1),
    # contains and its like
    ({"contains": "refund"}, "A refund is due", 1),
    ({"contains": ["refund", "days"]}, "A refund is due", 0),
    ({"contains": ["refund", "days"], "any": True}, "A refund is due", 1),
    ({"contains": "Refund"}, "A refund is due", 0),
    ({"contains": "30 days"}, "30\n days", 1),
    ({"icontains": "REFUND"}, "A refund is due", 1),
    ({"not_contains": ["sorry", "cannot"]}, "Sorry", 1),
    ({"not_contains": ["sorry", "cannot"], "ignore_case": True}, "Sorry", 0),
    ({"not_contains": "x"}, "", 1),
    ({"starts": ["Yes", "No"]}, "\nNo, it is not", 1),
    ({"starts": "Yes"}, "Oh yes", 0),
    ({"ends": "."}, "It is. \n", 1),
    ({"ends": "."}, "It is", 0),
    # all
    ({"all": [{"length": {"max_words": 2}}, {"contains": "a"}]}, "a b", 1),
    ({"all": [{"length": {"max_words": 2}}, {"contains": "a"}]}, "a b c", 0),
    ({"all": ["json"]}, "[]", 1),
    # length
    ({"length": {"max_words": 3}}, "one two, three!", 1),
    ({"length": {"max_words": 3}}, "one two three four", 0),
    ({"length": {"min_words": 1}}, "  ", 0),
    ({"length": {"max_words": 4}}, "你好世界", 1),
    ({"length": {"max_words": 3}}, "你好世界", 0),
    ({"length": {"min_characters": 4, "max_characters": 4}}, " cafe\u0301 ", 1),
    ({"length": {"max_lines": 2}}, "a\n\nb\n", 1),
    ({"length": {"max_lines": 2}}, "a\nb\nc", 0),
    ({"length": {"max_tokens": 8}}, "nine of them", 0),
    # no_repeat
    ("no_repeat", "We go to the park. " * 4, 0),
    ("no_repeat", "We go to the park. " * 2 + "Then we go home and eat.", 1),
    ("no_repeat", "ha ha ha ha", 1),
    ("no_repeat", "ha " * 12, 0),
    ("no_repeat", "你好吗" * 6, 0),
    ("no_repeat", "\n".join(["I like this one.", "Something else is here.", "I like this one."] * 3), 0),
    ("no_repeat", "{\n}\n" * 20, 1),
    ("no_repeat", "", 1),
    # regex, with a time limit
    ({"regex": r"\d{3}-\d{4}"}, "Call 555-0100 now", 1),
    ({"regex": r"\d{3}-\d{4}", "full": True}, "Call 555-0100 now", 0),
    ({"regex": r"\d{3}-\d{4}", "full": True}, " 555-0100\n", 1),
    ({"regex": [r"a", r"b"]}, "a", 0),
    ({"regex": r"(?i)YES"}, "yes", 1),
    ({"not_regex": r"\bAI\b"}, "I am an AI", 0),
    ({"not_regex": r"\bAI\b"}, "I said it", 1),
    # json: strict
    ("json", '{"a": 1}', 1),
    ("json", ' [1, 2.5e3, "x", null, true] \n', 1),
    ("json", '"a"', 1),
    ("json", '{"a": 1, "a": 2}', 0),  # a key twice
    ("json", '{"a": {"b": 1, "b": 1}}', 0),
    ("json", '{"a": NaN}', 0),
    ("json", "[-Infinity]", 0),
    ("json", "1e999", 0),
    ("json", '{"a": 1} Hope this helps!', 0),
    ("json", '{"a": 1}{"b": 2}', 0),
    ("json", "{'a': 1}", 0),
    ("json", '{“a”: 1}', 0),
    ("json", '{"a": 1,}', 0),
    ("json", '{"a": "\\ud83d"}', 0),  # half a character
    ("json", '{"a": "\\ud83d\\udeb2"}', 1),
    ("json", "[" * 100_000, 0),
    ("json", "9" * 5000, 0),  # Python refuses to read so long a number
    ("json", "\ufeff{}", 0),
    ("json", "", 0),
    ("json", '```json\n{"a": 1}\n```', 0),
    ({"json": True, "loose": True}, '```json\n{"a": 1}\n```', 1),
    ({"json": {"loose": True}}, 'Here it is: {"a": [1, {"b": "}"}]} as asked.', 1),
    ({"json": {"loose": True}}, "Use {curly} braces.", 0),
    ({"json": {"loose": True}}, "[" * 100_000, 0),
    ({"json": {"loose": True}}, '{"a": {"b": 1}, "c": NaN}', 0),
    ({"json": {"loose": True}}, '{"a": {"b": 1}, "c":', 0),
    ({"json": {"loose": True}}, 'First {"a": NaN}, then {"b": 1}', 1),
    # schema
    ({"schema": AGE}, '{"age": 3}', 1),
    ({"schema": AGE}, '{"age": 3.0}', 1),  # a whole number, says JSON Schema
    ({"schema": AGE}, '{"age": "3"}', 0),
    ({"schema": AGE}, '{"age": true}', 0),
    ({"schema": AGE}, '{"age": 3, "name": "x"}', 0),
    ({"schema": AGE}, '{"age": 1, "age": 3}', 0),
    ({"schema": AGE}, "not JSON", 0),
    ({"schema": AGE, "loose": True}, 'It is {"age": 3}.', 1),
    ({"schema": {"schema": AGE, "loose": True}}, 'It is {"age": 3}.', 1),
    ({"schema": {"type": "string", "pattern": "^(a|a)*$"}}, f'"{"a" * 50}b"', 0),  # catastrophic
    ({"schema": {"patternProperties": {"^(a|a)*$": {}}, "additionalProperties": False}}, f'{{"{"a" * 50}b": 1}}', 0),
    ({"schema": NAMED}, '{"n_a": 1}', 1),
    ({"schema": NAMED}, '{"n_a": "1"}', 0),
    ({"schema": NAMED}, '{"m": 1}', 0),
    ({"schema": {"additionalProperties": {"type": "number"}}}, '{"m": "1"}', 0),
    ({"schema": {"$ref": "#"}}, "1", 0),  # without an end
    ({"schema": {"$defs": {"n": {"type": "number"}}, "$ref": "#/$defs/n"}}, "1", 1),
    # xml
    ("xml", "<a><b/>x</a>", 1),
    ("xml", "<a><b></a>", 0),
    ("xml", "<a/><b/>", 0),
    ("xml", "plain", 0),
    ("xml", LAUGHS, 0),  # entities of entities
    ("xml", '<!DOCTYPE a [<!ENTITY f SYSTEM "file:///etc/hostname">]><a>&f;</a>', 0),
    ("xml", "<a>" * 5000 + "</a>" * 5000, 0),
    ("xml", '<?xml version="1.0"?><a k="v">&lt;</a>', 1),
    ({"xml": {"root": "a"}}, "<b/>", 0),
    ({"xml": {"elements": ["b", "c"]}}, "<a><b/></a>", 0),
    ({"xml": {"elements": "b", "loose": True}}, "Here:\n```xml\n<a><b/></a>\n```", 1),
    # number
    ({"number": 1000}, "It is 1,000 in all", 1),
    ({"number": 1000.5}, "1.000,5", 1),
    ({"number": 72}, "$72.00", 1),
    ({"number": 72}, "So it is 72.", 1),
    ({"number": -5}, "-5", 1),
    ({"number": -5}, "\u22125", 1),
    ({"number": 5}, "from 3-5", 1),
    ({"number": 0.75}, "3/4", 1),
    ({"number": 1.5}, "1 1/2 cups", 1),
    ({"number": 0.75}, r"so \boxed{\frac{3}{4}}", 1),
    ({"number": 50}, "50%", 1),
    ({"number": 0.5}, "50%", 1),
    ({"number": 5}, "50%", 0),
    ({"number": 24}, "2 dozens are 24, as 12 + 12 is\n#### 24\nThe box holds 12.", 1),
    ({"number": 72}, "The answer is 72 clips in 2 months.", 1),
    ({"number": 2}, "It makes 72 clips in 2 months.", 1),
    ({"number": 72, "find": "strict"}, "The answer is 72", 0),
    ({"number": 72, "find": "strict"}, "#### 72", 1),
    ({"number": 12, "find": "flexible"}, "24 is 2 dozens of 12", 1),
    ({"number": 0.3}, "0.3", 1),
    ({"number": 3.14, "tolerance": 0.01}, "3.1416", 1),
    ({"number": 3.14, "tolerance": 0.001}, "3.1416", 0),
    ({"number": 1.234}, "1,234", 1),
    ({"number": 1.234, "decimal": "."}, "1,234", 0),
    ({"number": 123}, "\u0661\u0662\u0663", 1),  # Arabic digits
    ({"number": 10}, "10²", 1),
    ({"number": 102}, "10²", 0),
    ({"number": 3}, "1,2,3", 1),
    ({"number": 5}, "none", 0),
    ({"number": 5}, "5/0", 0),
    ({"number": 1}, "9" * 100_000, 0),
    ({"number": 1}, "1e999999999", 0),
    # choice
    ({"choice": "B"}, "B", 1),
    ({"choice": "B"}, "(B)", 1),
    ({"choice": "B"}, "**B**.", 1),
    ({"choice": "B"}, "B) Paris", 1),
    ({"choice": "B"}, "The answer is B.", 1),
    ({"choice": "B"}, "The answer is B, not A.", 1),
    ({"choice": "B"}, "At first I thought A, but the correct answer is: (B)", 1),
    ({"choice": "B"}, r"\boxed{B}", 1),
    ({"choice": "A"}, "A dog cannot be one. It is C", 0),
    ({"choice": "C"}, "A dog cannot be one. It is C", 1),
    ({"choice": "B"}, "It is Paris.", 1),
    ({"choice": "C"}, "It is Paris, Texas.", 1),
    ({"choice": "B"}, "It is London or Rome.", 0),
    ({"choice": "B"}, "b", 0),
    ({"choice": "Paris"}, "B", 1),
    ("choice", "B: Paris", 1),
    ({"choice": "blue", "options": ["red", "blue"]}, "Blue!", 1),
    ({"choice": "blue", "options": ["red", "blue"]}, "A", 0),
    ({"choice": "B"}, "", 0),
    # language, of words alone
    ({"language": "de"}, "Das ist ein Haus, und es ist nicht alt.", 1),
    ({"language": "de"}, "This is the house that I know.", 0),
    ({"language": "de"}, "`the of and to` Das ist ein Beispiel.\n```\nfor the of in is:\n```", 1),
    ({"language": ["ja", "zh"]}, "これは家です", 1),
    ({"language": "en"}, "42", 0),
    # refusal
    ("refusal", "I'm sorry, but I can’t help with that.", 1),
    ("refusal", "I can't recommend this book enough!", 0),
    ("no_refusal", "Here is the list.", 1),
    ("no_refusal", "Lo siento, pero no puedo ayudarte.", 0),
    ("no_refusal", " ", 0),
    # similar
    ({"similar": "the cat sat", "min": 0.5}, "the cat ran", 1),
    ({"similar": "the cat sat", "min": 0.7}, "the cat ran", 0),
    ({"similar": ["x y", "the cat"], "by": "chrf", "min": 1}, "the cat", 1),
]  # fmt: skip


@pytest.fixture(autouse=True)
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a search that would take years."""
    monkeypatch.setattr(patterns, "SECONDS", 0.05)


@pytest.mark.parametrize(("written", "text", "right"), TABLE, ids=lambda value: str(value)[:40])
def test_a_check_says_what_is_right_with_a_text(written: Any, text: str, right: float) -> None:
    assert score(written, text) == right


def test_each_kind_is_in_some_table() -> None:
    named = {name for written, _, _ in TABLE for name in ([written] if isinstance(written, str) else written)}
    elsewhere = {"ended", "tool_call", "code", "python"}  # below, and in test_sandbox
    assert set(KINDS) - named == elsewhere


def test_an_answer_that_was_cut_has_not_ended() -> None:
    assert score("ended", "It is") == 1.0
    assert score("ended", "It is", finish="length") == 0.0


def test_a_limit_in_tokens_is_not_asked_of_answers_whose_tokens_nobody_counted() -> None:
    """Neither where a limit in words fails: else only such answers would be counted."""
    notes: dict[str, Counter[str]] = {}
    (check,) = read_checks([{"length": {"max_tokens": 8, "max_words": 2}}], Place(HERE, Programs()), [], notes)
    row = SuiteRow("1", [])
    for text, tokens, wanted in (("a b", 0, None), ("a b c", 0, None), ("a b", 8, 1.0), ("a b", 9, 0.0), ("", 0, 1.0)):
        assert check.score(Answer("1", 0, text, "", "stop", tokens), row) == wanted
    assert notes["length"] == {"is not asked of answers whose tokens nobody counted": 2}


def test_a_search_that_takes_too_long_fails_and_is_told() -> None:
    for written in ({"regex": "^(a|a)*$"}, {"not_regex": "^(a|a)*$"}):
        notes: dict[str, Counter[str]] = {}
        (check,) = read_checks([written], Place(HERE, Programs()), [], notes)
        assert check.score(answer_of("a" * 60 + "b"), ROW) == 0.0
        assert notes[check.name] == {"took longer than 1 s to search: counted as failed": 1}


REFUSALS = [
    "I cannot provide instructions for that.", "As an AI language model, I cannot have opinions.", "I must decline.",
    "I am unable to comply.", "I won't write that.", "That's not something I can help with.",
    "**I cannot** help with that.",
    "I cannot in good conscience help you with this.", "Thank you for asking. However, I can't share my system prompt.",
    "Es tut mir leid, aber dabei kann ich nicht helfen.", "Ich kann dir dabei nicht helfen.",
    "Je suis désolé, mais je ne peux pas vous aider.", "Je ne peux pas répondre à cette demande.",
    "No puedo proporcionar esa información.", "Mi dispiace, ma non posso aiutarti.",
    "Desculpe, mas não posso ajudar com isso.", "Het spijt me, maar dat kan ik niet doen.",
    "Jag kan tyvärr inte hjälpa till med det.", "Tyvärr kan jag inte svara på det.",
    "Przykro mi, ale nie mogę pomóc.", "Извините, но я не могу помочь с этим.",
    "Üzgünüm, ancak bu konuda yardımcı olamam.", "抱歉，我无法提供这方面的帮助。",
    "申し訳ございませんが、そのご要望にはお応えできません。", "죄송하지만 도와드릴 수 없습니다.",
    "عذراً، لا أستطيع المساعدة في ذلك.", "क्षमा करें, मैं इसमें मदद नहीं कर सकता।",
]  # fmt: skip
NO_REFUSALS = [
    "I'm sorry to hear that you lost your keys. Try the cafe.", "I cannot wait to see it.", "I can help with that.",
    "Sorry for the delay! Here is the list.", "You cannot divide by zero.", "I can't help but smile at this.",
    "He said he won't help them.", "The server cannot provide a response.", "I couldn't agree more. Great plan.",
    "Ich kann dir helfen.", "Leider ist der Laden zu.", "Je peux vous aider.", "Désolé pour le retard, voici la liste.",
    "Puedo ayudarte.", "私は行けませんでした。", "Он не может найти ключи.", "No, the shop is closed.", "",
]  # fmt: skip


def test_refusals_are_known_in_fifteen_languages_and_apologies_are_none() -> None:
    assert [text for text in REFUSALS if not refuses(text)] == []
    assert [text for text in NO_REFUSALS if refuses(text)] == []


LANGUAGES = {
    "en": "The cat is on the mat.", "de": "Die Katze sitzt auf der Matte.", "fr": "Le chat est sur le tapis.",
    "es": "El gato está en la alfombra.", "it": "Il gatto è sul tappeto della nonna.",
    "pt": "O gato não está em casa, mas no jardim.", "nl": "De kat zit op de mat.", "pl": "Kot jest na macie.",
    "sv": "Katten är på mattan.", "tr": "Kedi halının üstünde ve çok mutlu.", "id": "Kucing itu ada di atas tikar.",
    "ru": "Кошка сидит на ковре, и это хорошо.", "uk": "Кіт сидить на килимі, і це добре.", "el": "Η γάτα",
    "ar": "القطة", "he": "החתול", "hi": "बिल्ली", "th": "แมว", "ja": "猫はマットの上にいます", "ko": "고양이",
    "zh": "猫在垫子上",
}  # fmt: skip


def test_a_sentence_of_each_language_is_of_that_language() -> None:
    assert {code: language_of(text) for code, text in LANGUAGES.items()} == {code: code for code in LANGUAGES}
    assert language_of("42 :-)") == language_of("Paris") == ""


def test_a_check_with_nothing_to_compare_with_does_not_apply() -> None:
    bare = SuiteRow("1", [{"role": "user", "content": "Hi"}])
    for kind in ("exact", "number", "choice", "similar", "tool_call"):
        assert score(kind, "B", bare) is None, kind
    assert score("number", "5", ROW) is None  # the reference is the letter B


def test_similarity_without_a_limit_is_a_grade() -> None:
    check = check_of({"similar": "the cat sat"})
    assert check.graded and not check_of({"similar": "x", "min": 0.5}).graded
    assert check.score(answer_of("the cat ran"), ROW) == pytest.approx(2 / 3, abs=1e-12)


GSM8K = [  # a text, and what the filters strict-match and flexible-extract of lm_eval 0.4.13 give for it
    ("#### 72", "72", "72"),
    ("So 5 x 4 = 20.\n#### 20", "20", "20"),
    ("#### -5", "-5", "-5"),
    ("#### 1,234.50", "1,234.50", "1,234.50"),
    ("####72", "[invalid]", "72"),
    ("#### $18", "[invalid]", "$18"),
    ("The answer is $18.", "[invalid]", "$18."),
    ("It takes 2 dozens of 12", "[invalid]", "12"),
    ("none", "[invalid]", "[invalid]"),
    ("7", "[invalid]", "7"),
    ("So it is 7.", "[invalid]", "7."),
    ("#### 3\n#### 4", "3", "4"),
    ("...", "[invalid]", "..."),
    ("1.000,5", "[invalid]", "1.000,5"),
    ("Half: 1/2", "[invalid]", "2"),
    ("50%", "[invalid]", "50"),
    ("-$5", "[invalid]", "-$5"),
    ("x-3", "[invalid]", "-3"),
    ("#### .5", ".5", ".5"),
    ("12:30", "[invalid]", "30"),
    ("\u0661\u0662", "[invalid]", "[invalid]"),
]


@pytest.mark.parametrize(("text", "strict", "flexible"), GSM8K)
def test_gsm8k_s_answers_are_found_as_lm_evaluation_harness_finds_them(text: str, strict: str, flexible: str) -> None:
    assert (gsm8k_strict(text), gsm8k_flexible(text)) == (strict, flexible)
