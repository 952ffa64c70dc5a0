"""The numbers that a text says, in digits or in words, whatever form they have.

    "2.5 million"    "2,500,000"       "2 500 000"        the same number
    "thirty days"    "30 days"         "dreißig Tage"     the same
    "2021-03-05"     "05.03.2021"                         the same three; "5 March 2021" has two of them and a month
    "half a day"     "zweieinhalb"                        nothing is known of these

A number that may be read in two ways ("1.234") has both values, as in `checks.numbers`.
"""

from __future__ import annotations

import re
from fractions import Fraction

from mlxtune.evaluate.checks.numbers import numbers_in
from mlxtune.evaluate.checks.words import words_of

# Words for whole numbers. Not those for 1, which are articles and pronouns as well.
WORDS = {
    "en": "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen",
    "de": "zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn"
    " achtzehn neunzehn",
    "fr": "deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize",
    "es": "dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince",
    "it": "due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici quindici sedici",
}
TENS = {
    "en": "twenty thirty forty fifty sixty seventy eighty ninety",
    "de": "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig",
    "fr": "vingt trente quarante cinquante soixante",
    "es": "veinte treinta cuarenta cincuenta sesenta setenta ochenta noventa",
    "it": "venti trenta quaranta cinquanta sessanta settanta ottanta novanta",
}
AMBIGUOUS = ("sei", "once")  # Italian's 6 is also "you are", Spanish's 11 is English too
# 2nd to 10th, as far as they are no other number of WORDS with an ending.
ORDINALS = (
    "second zweite zweiten zweiter deuxième segundo segunda secondo seconda",
    "third dritte dritten dritter troisième tercero tercera terzo terza",
    "fourth vierte vierten vierter quatrième cuarto cuarta quarto quarta",
    "fifth fünfte fünften fünfter cinquième quinto quinta",
    "sixth sechste sechsten sechster sixième sexto sexta sesto sesta",
    "seventh siebte siebten siebter septième séptimo séptima settimo settima",
    "eighth achte achten achter huitième octavo octava ottavo ottava",
    "ninth neunte neunten neunter neuvième noveno novena nono nona",
    "tenth zehnte zehnten zehnter dixième décimo décima decimo decima",
)
# Words for 1: articles and pronouns as well, so that a text in which one stands may say 1, and need not.
ONES = (
    "one single ein eine einen einem einer eines un une uno una um uma een één jeden jedna jedno jedną ett en bir satu"
    " один одна одно одну одного одной одним одну"
)
DOZEN = "dozen dutzend douzaine docena dozzina dúzia dozijn tuzin dussin düzine lusin дюжина дюжины дюжину"
SCALES = {
    12: DOZEN,
    10**2: "hundred hundert cent cien cento",
    10**3: "thousand tausend mille mil mila",
    10**6: "million millions millionen millón millones milione milioni mio",
    10**9: "billion billions milliarde milliarden milliard milliards miliardo miliardi",
}
MONTHS = (
    "january januar janvier enero gennaio",
    "february februar février febrero febbraio",
    "march märz mars marzo",
    "april avril abril aprile",
    "may mai mayo maggio",
    "june juni juin junio giugno",
    "july juli juillet julio luglio",
    "august août agosto",
    "september septembre septiembre settembre",
    "october oktober octobre octubre ottobre",
    "november novembre noviembre",
    "december dezember décembre diciembre dicembre",
)
_DOTTED = re.compile(r"(?<![\d.])(\d{1,4})\.\s?(\d{1,2})\.\s?(\d{1,4})(?![\d.])")  # 05.03.2021, 5. 3. 2021
_HOUR = re.compile(r"(?<![\d:])(\d{1,2}):00(?![\d:])")  # 22:00 is 22 Uhr
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d.,]?\d)")  # 3 000, as French and others write it
_SCALE = "|".join(sorted(" ".join(SCALES.values()).split(), key=len, reverse=True))
_SCALED = re.compile(rf"(\d[\d.,]*)[\s-]?({_SCALE})\b", re.IGNORECASE)


def _values_of_words() -> dict[str, int]:
    found: dict[str, int] = {}
    for words in WORDS.values():
        found |= {word: value for value, word in enumerate(words.split(), 2)}
    for words in TENS.values():
        found |= {word: value for value, word in zip(range(20, 100, 10), words.split(), strict=False)}
    for value, words in enumerate(ORDINALS, 2):
        found |= dict.fromkeys(words.split(), value)
    found |= dict.fromkeys(DOZEN.split(), 12)  # "a dozen" alone
    return {word: value for word, value in found.items() if word not in AMBIGUOUS}


VALUES = _values_of_words()
SCALE_OF = {word: scale for scale, words in SCALES.items() for word in words.split()}
MONTH_OF = {word: number for number, words in enumerate(MONTHS, 1) for word in words.split()}


def numbers_said(text: str) -> list[set[Fraction]]:
    """Each number of a text with everything that it may mean, without its sign: a dash may be one or not."""
    found: list[set[Fraction]] = []
    plain = _HOUR.sub(r"\1", _DOTTED.sub(r"\1 . \2 . \3", text))
    plain = _GROUPED.sub(lambda grouped: grouped[0].replace(" ", ""), plain)
    for scaled in _SCALED.finditer(plain):
        for values in numbers_in(scaled[1].rstrip(".,")):
            found.append({value * SCALE_OF[scaled[2].lower()] for value in values})
    plain = _SCALED.sub(" ", plain)
    found += [{abs(value) for value in values} for values in numbers_in(plain)]
    found += [{Fraction(value)} for value in _in_words(words_of(text))]
    return found


def _in_words(words: list[str]) -> list[int]:
    """The numbers that words say: "two hundred" is 200, "twenty five" (of "twenty-five") is 25; "vingt-quatre" too."""
    values = []
    total = 0  # of the words in a row that say one number
    for word in [*words, ""]:
        value = VALUES.get(word) or _joined(word)
        scale = SCALE_OF.get(word, 0)
        if value and (not total or (value < 10 and total % 10 == 0 and total % 100)):
            total += value
        elif scale and total:
            total *= scale
        else:
            if total:
                values.append(total)
            total = value
    return values


def _joined(word: str) -> int:
    """German writes 25 as fünfundzwanzig; 0 for what is no number."""
    unit, _, ten = word.partition("und")
    if not ten:
        return 0
    ones = 1 if unit == "ein" else VALUES.get(unit, 0)
    tens = VALUES.get(ten, 0)
    return ones + tens if 0 < ones < 10 and tens >= 20 else 0


def months_said(text: str) -> set[Fraction]:
    """The numbers of the months that a text names."""
    return {Fraction(MONTH_OF[word]) for word in words_of(text) if word in MONTH_OF}


def ones_said(text: str) -> set[Fraction]:
    """1, where a text has a word for it."""
    return set() if frozenset(ONES.split()).isdisjoint(words_of(text)) else {Fraction(1)}
