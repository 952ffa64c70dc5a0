"""The number that an answer comes to, and whether it is the right one.

Numbers are exact fractions, so that 0.1 + 0.2 is 0.3. What one text may mean in two ways is read in both, and one of
them must be right: "50%" is 50 or 0.5, "1,234" is 1234 in English and 1.234 in German.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from mlxtune.evaluate.checks.arguments import Arguments, CheckError, Kind, Place
from mlxtune.evaluate.checks.check import Meanings, Rule, Score, SuiteRow
from mlxtune.evaluate.engines.request import Answer

LONGEST = 200  # digits of a number, and the largest exponent
INVALID = "[invalid]"  # what GSM8K's two ways give where they find nothing
# GSM8K's two ways to find the answer, as lm-evaluation-harness has them (tasks/gsm8k/gsm8k.yaml, version 3.0).
STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
WAYS = ["marked", "strict", "flexible"]
DECIMALS = [".", ",", "either"]

_MINUS = str.maketrans(dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"))
_SPACES = "\u00a0\u2009\u202f"  # that French, and the SI, put between groups of three digits
_DIGITS = rf"\d(?:[\d_'’{_SPACES}]*\d)?(?:[.,]\d[\d_'’{_SPACES}]*)*|[.,]\d+"
# A sign that is no dash between two words or numbers; a currency; the digits; what may follow.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)])[-+]\s?)?(?P<money>[$€£¥]\s?)?(?P<after_money>(?<=[$€£¥])-)?"
    rf"(?P<digits>{_DIGITS})"
    rf"(?:[eE](?P<exponent>[-+]?\d+)(?![\w]))?"
    rf"(?P<rest>(?P<mixed>\s+\d+)?\s?[/\u2044]\s?(?P<below>\d+)(?![\d/]))?"
    rf"(?P<percent>\s?%|\s?percent\b)?"
)
_WHOLE = re.compile(rf"\d{{1,{LONGEST}}}")
_DATE = re.compile(r"(?<![\d/])(\d+)/(\d+)/(\d+)(?![\d/])")
_FRACTION = re.compile(r"(-?)\s*\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(-?\d+)\s*\}")
_MARKS = (  # where an answer says which number it comes to, the plainer first
    re.compile(r"#{3,}[ \t]*([^\n]+)"),
    re.compile(r"(?i)\b(?:final )?answer(?:\s+is)?\s*(?:[:=]|\bis\b)\**\s*([^\n]+)"),
)


def gsm8k_strict(text: str) -> str:
    """What stands behind the first `#### `, as lm-evaluation-harness's strict-match finds it."""
    match = STRICT.search(text)
    return match[1].strip() if match else INVALID


def gsm8k_flexible(text: str) -> str:
    """The last thing that looks like a number, as its flexible-extract finds it: of "is 2 dozens of 12" the 12."""
    found = [one or other for one, other in FLEXIBLE.findall(text)]
    return found[-1].strip() if found else INVALID


def marked(text: str) -> str:
    """What an answer says that it comes to: behind `####`, in the last `\\boxed{}`, behind "answer is"; else all of it.

    The number is the last one in it, but the first one behind a mark: "The answer is 72 clips in 2 months".
    """
    boxed = _last_boxed(text)
    if boxed:
        return boxed
    for mark in _MARKS:
        parts = mark.findall(text)
        for part in reversed(parts):
            first = _NUMBER.search(_plain(part))
            if first:
                return first[0]
    return text


def _last_boxed(text: str) -> str:
    r"""What stands in the last \boxed{...}, whose braces are balanced; "" for none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    begin, depth = start + len("\\boxed{"), 1
    for place in range(begin, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[begin:place]
    return ""


def numbers_in(text: str, decimal: str = "either") -> list[set[Fraction]]:
    """The numbers of a text in their order, each with everything that it may mean. decimal: the sign before decimal
    places, "." or ","; "either" where it must be told from the number.
    """
    text = _plain(text)
    found = []
    for match in _NUMBER.finditer(text):
        values = _values(match, decimal)
        if values:
            found.append(values)
        elif "," in match["digits"]:  # several numbers: 1,2,3
            found += [{Fraction(part)} for part in match["digits"].split(",") if _WHOLE.fullmatch(part)]
    return found


def _plain(text: str) -> str:
    r"""The text with one minus sign, digits of ASCII, and \frac{3}{4} as 3/4."""
    text = text.translate(_MINUS).replace("{,}", ",").replace("\\%", "%").replace("\\$", "$").replace("\\!", "")
    text = _FRACTION.sub(r" \1\2/\3 ", text)
    text = _DATE.sub(r"\1 \2 \3", text)
    if text.isascii():
        return text
    return "".join(_ascii(character) for character in text)


def _ascii(character: str) -> str:
    """A digit of any script as ASCII's; superscripts are none."""
    return str(unicodedata.decimal(character, character))


def _values(match: re.Match[str], decimal: str) -> set[Fraction]:
    digits = re.sub(rf"[_'’{_SPACES}]", "", match["digits"])
    exponent = int(match["exponent"] or 0) if len(match["exponent"] or "") < 6 else LONGEST + 1
    if len(digits) > LONGEST or abs(exponent) > LONGEST or len(match["below"] or "") > LONGEST:
        return set()
    values = {Fraction(text) * Fraction(10) ** exponent for text in _decimals(digits, decimal)}
    if match["below"]:
        below = int(match["below"])
        if below == 0:
            return set()
        if match["mixed"]:
            part = Fraction(int(match["mixed"]), below)
            values = {value + part for value in values}
        else:
            values = {value / below for value in values}
    if match["percent"]:
        values |= {value / 100 for value in values}
    if (match["sign"] or "").startswith("-") or match["after_money"]:
        values = {-value for value in values}
    return values


def _decimals(digits: str, decimal: str) -> set[str]:
    """What digits with points and commas may mean, a point before decimal places: 1.000,5 is {"1000.5"}."""
    points, commas = digits.count("."), digits.count(",")
    if decimal == "either" and points and commas:
        decimal = max(".,", key=digits.rfind)  # the later one
    if decimal != "either":
        group = "," if decimal == "." else "."
        return {digits.replace(group, "").replace(decimal, ".")} if digits.count(decimal) <= 1 else set()
    sign = "." if points else ","
    if points + commas == 0:
        return {digits}
    grouped = re.fullmatch(rf"[1-9]\d{{0,2}}(?:\{sign}\d{{3}})+", digits) is not None
    found = set()
    if grouped and (sign == "," or points > 1):
        found.add(digits.replace(sign, ""))
    if points + commas == 1:
        found.add(digits.replace(sign, "."))
    if grouped and sign == "." and points == 1:
        found.add(digits.replace(sign, ""))
    return found


def _number(arguments: Arguments, place: Place) -> Rule:
    """The answer comes to the number, or to that of the reference, within `tolerance`. `find` says where it stands:
    `marked` behind ####, in \\boxed{} or behind "answer is", else the last number; `strict` and `flexible` are GSM8K's.
    """
    way = arguments.word("find", WAYS, "marked")
    decimal = arguments.word("decimal", DECIMALS, "either")
    tolerance = Fraction(str(arguments.number("tolerance", 0, least=0)))
    given: Fraction | None = None
    if arguments.has("number"):
        given = _given(arguments, decimal)

    def judge(answer: Answer, row: SuiteRow) -> Score:
        expected = {given} if given is not None else _one(row.reference or "", "marked", decimal)
        if not expected:
            return None
        values = _one(answer.text, way, decimal)
        return float(any(abs(value - other) <= tolerance for value in values for other in expected))

    def meanings(answer: Answer, row: SuiteRow) -> Meanings:
        return frozenset(str(value) for value in _one(answer.text, way, decimal))

    return Rule(judge, of_reference=given is None, meanings=meanings)


def _given(arguments: Arguments, decimal: str) -> Fraction:
    value = arguments.given["number"]
    if isinstance(value, str):
        values = numbers_in(value, decimal)
        if len(values) == 1 and len(values[0]) == 1:
            return next(iter(values[0]))
        raise CheckError(f"number is {value[:60]!r}, which is not one number", "Write it as a number: 0.5, not 50%.")
    return Fraction(str(arguments.number("number", None)))


def _one(text: str, way: str, decimal: str) -> set[Fraction]:
    """What the number of an answer may be; nothing where it has none."""
    if way == "strict":
        text = gsm8k_strict(text)
    elif way == "flexible":
        text = gsm8k_flexible(text)
    else:
        text = marked(text)
    found = numbers_in(text, decimal)
    return found[-1] if found else set()


KINDS = {"number": Kind(_number, ("tolerance", "find", "decimal"))}
