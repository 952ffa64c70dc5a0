"""Whether an answer is in the chunk that it was made from: what is not is called unfounded, and does not stay.

    chunk       Orders can be returned within 30 days of delivery to our warehouse in Leipzig.
    question    Where are returned orders sent to?
    answer      To the warehouse in Leipzig.      founded: Leipzig is in the chunk
                To the warehouse in Hamburg.      a name that is in neither chunk nor question
                Within 14 days.                   a number
                By courier.                       a short answer, and no word of it is there

Numbers and names are what models invent, and what can be found again. A number counts in any form (`numbers_said`). A
name is a capitalized word: anywhere but where a sentence begins; there too where another one follows, or who it is was
asked. German begins every noun with a capital letter: behind an article or an adjective it is none. Scripts without
capital letters show no names; of them a share of the answer's letters must be in the chunk.

An answer that uses the chunk's own words wrongly is not found out: nobody but a reader or a judge can tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from mlxtune.evaluate.checks.languages import COMMON, language_of, script_of
from mlxtune.evaluate.checks.words import plain, words_of
from mlxtune.make.documents.asking import Pair
from mlxtune.make.documents.numbers_said import MONTH_OF, months_said, numbers_said, ones_said

LEAST_QUOTE = 3  # words: two may be anywhere
SHORT = 4  # words of an answer, up to which more than half of them must be in the chunk or the question
OF_LETTERS = 0.4  # share of the pairs of letters that must be, in scripts without capitals
CASELESS = ("Han", "Kana", "Hangul", "Thai", "Arabic", "Hebrew", "Devanagari")
YES_OR_NO = frozenset(["yes", "no", "ja", "nein", "oui", "non", "sí", "no", "sì", "non", "sim", "não", "да", "нет"])
# Marks of one meaning that are written in several ways; models change them when they copy.
_MARKS = str.maketrans(
    {"’": "'", "‘": "'", "‚": "'", "“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "–": "-", "—": "-"}
)

_SOURCE = "text|passage|document|article|excerpt|paragraph|chapter|section|author|context|snippet"
_SAYS = "say|mention|state|describe|tell|give|list|explain|discuss|refer|claim|provide|talk|suggest|define|recommend"
# What a question says that can only be asked of who has the text at hand.
POINTING = re.compile(
    rf"\b(?:in|from|by|per|of|to|on|with) (?:the|this) (?:(?:above|given|following|provided|present) )?(?:{_SOURCE})\b"
    r"(?! (?:editor|field|box|message|file|input|of|\w+ing)\b)"
    rf"|\b(?:the|this) (?:{_SOURCE}) (?:{_SAYS})|\bdo(?:es)? (?:the|this) (?:{_SOURCE})\b"
    r"|\b(?:mentioned|described|stated|given|shown|listed|quoted|provided) (?:above|below|here)\b|\bthe above\b"
    r"|\b(?:im|aus dem|laut dem|laut|nach dem|der|dieser|dieses|diesem|des) (?:obigen |vorliegenden |folgenden )?"
    r"(?:Texte?s?|Abschnitte?s?|Dokumente?s?|Artikels?|Auszuge?s?|Passage)\b"
    r"|\b(?:oben|unten) (?:genannt|erwähnt|beschrieben)"
    r"|\b(?:dans|selon|d'après|de) (?:le|ce|l'|cet) ?(?:texte|passage|document|article|extrait)\b|\bci-dessus\b"
    r"|\b(?:en|según|del?) (?:el|este)? ?(?:texto|pasaje|documento|artículo|fragmento)\b"
    r"|\bmencionad[oa]s? (?:arriba|antes)\b"
    r"|\b(?:nel|secondo il|dal|del) (?:testo|brano|documento)\b"
    r"|(?:根据|文中|本文|上文|这段|该文)|(?:本文|この文章|上記)",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
# Ends of English, German, French, Spanish and Italian words that are hardly ever names.
_ORDINARY = re.compile(
    r"(?:ly|ing|ed|tion|tions|sion|ment|ments|ness|ity|ers|ees|able|ful|ous|ung|ungen|heit|keit|schaft|ement|ción|mente"
    r"|zione)$"
)
_STARTER_WORDS = """
contact call email mail visit write ask phone send see take use return bring follow tell pay thank
because since although while during within under over every each both all only after before until unless once
through without however therefore thus instead besides neither either several most many few another such anyone
everyone nobody people customers children one two three
weil da obwohl während innerhalb binnen jeder jede jedes alle kunden beide mehrere
parce car chaque tous toutes pendant avant après plusieurs
cada todos todas porque aunque durante antes después
"""
_STARTERS = frozenset(_STARTER_WORDS.split())
_ARTICLE_WORDS = "the a an der die das den dem ein eine einen le la les l un une el los las il lo gli"
_ARTICLES = frozenset(_ARTICLE_WORDS.split())
_TITLE_WORDS = "mr mrs ms dr prof st herr herrn frau hr fr nr no mme mlle monsieur madame sr sra don sig"
_TITLES = frozenset(_TITLE_WORDS.split())
# A question whose answer is likely to begin with a name.
ASKS_WHO = re.compile(r"\W*(?:who|wer|qui|quién|chi|quem|kto|vem|kim|siapa|кто|хто)\b", re.IGNORECASE)
# German words behind which a capitalized word is a noun.
_DETERMINERS = """
der die das den dem des ein eine einen einem einer eines kein keine keinen keinem keiner mein dein sein ihr unser
ihre ihren ihrem ihrer seine seinen seinem seiner dieser diese dieses diesen diesem jeder jede jedes jeden jedem
alle allen aller zum zur im am beim vom ins ans und oder pro je ohne
"""
_GERMAN_ENDS = ("e", "en", "em", "er", "es")  # of adjectives
_GERMAN_BEFORE = frozenset(_DETERMINERS.split())


@dataclass(frozen=True)
class Fault:
    """Why a pair does not stay."""

    # A code of `reasons.REASONS`.
    reason: str
    # What of it.
    detail: str = ""


def fault_of(pair: Pair, chunk: str) -> Fault | None:
    """Why a pair is not founded in its chunk, or asks what only makes sense beside it; None where all is well."""
    for text in (pair.question, pair.answer):
        if found := POINTING.search(text):
            return Fault("pointing", found[0])
    quote = folded(pair.quote).strip("\"'. ")
    if len(_units(quote)) < LEAST_QUOTE:
        return Fault("short quote", pair.quote)
    if quote not in folded(chunk):
        return Fault("not quoted", pair.quote)
    return unfounded(pair.question, pair.answer, chunk)


def folded(text: str) -> str:
    """With one space between words, and one form of each mark."""
    return plain(text.translate(_MARKS))


def unfounded(question: str, answer: str, chunk: str) -> Fault | None:
    """What of an answer is neither in the chunk nor in the question: a number, a name, or most of a short answer."""
    known = f"{chunk}\n{question}"
    values = {value for said in numbers_said(known) for value in said} | months_said(known) | ones_said(known)
    for said in numbers_said(answer):
        if not said & values:
            return Fault("unfounded number", str(float(min(said))).removesuffix(".0"))
    words = _Known(known)
    language = language_of(known)
    for name in _names(answer, question, language, words):
        is_month = name.lower() in MONTH_OF and Fraction(MONTH_OF[name.lower()]) in values
        if not is_month and not words.has(name):
            return Fault("unfounded name", name)
    return _without_words(answer, words, frozenset(COMMON.get(language, "").split()))


def _without_words(answer: str, known: _Known, common: frozenset[str]) -> Fault | None:
    """common: words that say nothing by themselves: of "You have 30 days." the last two words tell."""
    units = _units(answer)
    if set(units) <= YES_OR_NO:
        return None
    there = sum(known.has(unit) for unit in units)
    telling = [unit for unit in units if unit not in common]
    tells = bool(telling) and sum(known.has(unit) for unit in telling) * 2 > len(telling)
    if len(units) <= SHORT and there * 2 <= len(units) and not tells:
        return Fault("unfounded", answer)
    if script_of(answer) in CASELESS and there < OF_LETTERS * len(units):
        return Fault("unfounded", answer)
    return None


def _units(text: str) -> list[str]:
    """Its words; where none stand between spaces, its pairs of letters."""
    words = words_of(text)
    if script_of(text) not in ("Han", "Kana", "Thai"):
        return words
    return [one + other for one, other in pairwise(words)] or words


class _Known:
    """The words of a text, and whether it has another one in some form."""

    def __init__(self, text: str) -> None:
        self._words = frozenset(words_of(text))
        self._text = "".join(words_of(text))  # for pairs of letters, and parts of joined words
        self._numbers = {value for said in numbers_said(text) for value in said}
        self._is_cyrillic = script_of(text) == "Cyrillic"

    def has(self, word: str) -> bool:
        """The word, or one that differs from it by an ending; a number in any form."""
        parts = words_of(word)
        return all(self._has_part(part) for part in parts)

    def _has_part(self, word: str) -> bool:
        if word in self._words or (script_of(word) in CASELESS and word in self._text):
            return True
        if any(said & self._numbers for said in numbers_said(word)):
            return True
        return len(word) >= 4 and any(self._is_form(word, other) for other in self._words if len(other) >= 4)

    def _is_form(self, one: str, other: str) -> bool:
        """Vertrags and Vertrag, Germany's and Germany; Москва and Москве, whose endings are exchanged."""
        short, long = sorted((one, other), key=len)
        if len(long) - len(short) > 3:
            return False
        end = 2 if self._is_cyrillic else 0  # letters of the shorter word that may be others
        stem = short[: max(4, len(short) - end)]
        return long.startswith(stem)


def _names(answer: str, question: str, language: str, known: _Known) -> Iterator[str]:
    """The capitalized words of an answer that may be names. language: of what it was made from; a short answer alone
    seldom tells its own.
    """
    common = frozenset(COMMON.get(language, "").split())
    found = list(_WORD.finditer(answer))
    for place, match in enumerate(found):
        word = match[0]
        if not word[0].isupper():
            continue
        begins = _begins(answer, found, place)
        if begins and not _is_name_at_the_start(answer, found, place, common, known):
            asks_who = place == 0 and ASKS_WHO.match(question) is not None
            if not asks_who or _is_ordinary(found, place, common):
                continue
        if language == "de" and not begins and _is_noun(found[place - 1][0].lower(), word):
            continue
        yield word


def _begins(text: str, found: Sequence[re.Match[str]], place: int) -> bool:
    """Whether a sentence begins with this word. None does behind "Mrs." or "J."."""
    if place == 0:
        return True
    before = found[place - 1]
    between = text[before.end() : found[place].start()]
    if between.strip() == "." and (len(before[0]) == 1 or before[0].lower() in _TITLES):
        return False
    return re.search(r"[.!?:;\n•]", between) is not None


def _is_name_at_the_start(
    text: str, found: Sequence[re.Match[str]], place: int, common: frozenset[str], known: _Known
) -> bool:
    """Whether a word that begins a sentence is likely a name. Any word may stand there with a capital letter: it is an
    abbreviation, or a capitalized word follows it, as in Paul Weber.
    """
    word = found[place][0]
    if word.isupper() and len(word) > 1:
        return True
    if _low(word) in common | _STARTERS or place + 1 == len(found):
        return False
    follows = found[place + 1][0]
    if not follows[0].isupper() or _begins(text, found, place + 1):
        return False
    if follows.lower() in common | _TITLES:  # Wenden Sie sich; Thank Mrs. Okafor
        return False
    is_german_adjective = "der" in common and word.endswith(_GERMAN_ENDS) and known.has(follows)  # Neue Schlüssel
    return not is_german_adjective


def _is_ordinary(found: Sequence[re.Match[str]], place: int, common: frozenset[str]) -> bool:
    """Whether the first word of who is meant is likely no name: a common word, its form, or what an article follows,
    as in "Ask the office".
    """
    low = _low(found[place][0])
    is_followed_by_article = place + 1 < len(found) and found[place + 1][0].lower() in _ARTICLES
    return low in common | _STARTERS or _ORDINARY.search(low) is not None or is_followed_by_article


def _low(word: str) -> str:
    return word.lower().partition("'")[0].partition("’")[0]


def _is_noun(before: str, word: str) -> bool:
    """Whether a capitalized German word inside a sentence is a noun by what stands before it: an article or an
    adjective. Not behind a number: six weeks out of a text that has a six, but no weeks, are unfounded. Abbreviations
    are names.
    """
    if word.isupper() and len(word) > 1:
        return False
    is_described = before.endswith(_GERMAN_ENDS) and len(before) > 4
    return before in _GERMAN_BEFORE or is_described or _ORDINARY.search(word.lower()) is not None
