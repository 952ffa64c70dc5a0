"""What can be wrong with an answer that an engine made, told by rules: no model is asked.

To add a filter, add a line to FILTERS: its code and a function of the answer that tells whether it is so; and its
sentence to `reasons`. Then plant an answer that has it, and no other, in tests/test_made_answers.py.

The filters that training rows are looked at with (`data.survey.lint`) come first. Each is left out where the prompt
asks for what it forbids: HTML entities in an answer about HTML, `[Name]` in a template that was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from mlxtune.data.survey import lint
from mlxtune.data.survey.lint import RowTexts
from mlxtune.data.survey.refusals import refuses
from mlxtune.data.survey.words import LETTERS, UNSPACED, WORDS
from mlxtune.evaluate.checks.blocks import without_blocks
from mlxtune.evaluate.checks.languages import SHORT, language_of, script_of
from mlxtune.evaluate.checks.words import words_of
from mlxtune.evaluate.engines.request import Answer, Messages

MOST_WORDS = 1_500  # of an answer; a longer one is hardly what a person would write
COPIED_WORDS = 4  # of a prompt, from which on an answer that begins with all of it repeats it

# What stands where the writer was meant to put something: [Your Name], <insert date>, TODO, lorem ipsum.
PLACEHOLDER = re.compile(
    r"(?<!\w)\[(?:(?i:your|insert|enter|add|recipient|company|customer|client|sender)\b[^\]\n]{0,40}"
    r"|(?:Name|Date|Address|Email|Phone|Title|City|Link|URL|Number|Amount|Topic|Subject|Signature|NAME|DATE|CITY))\]"
    r"(?!\()"
    r"|<(?i:your|insert|enter)\b[^>\n]{0,40}>|\bTODO\b(?=\s*[:(\]>])|[#/\[<(]\s*TODO\b|\bTBD\b|(?i:\blorem ipsum\b)"
)
SELF_TALK = re.compile(  # an answer that speaks of what wrote it
    r"(?i)\bas (?:an?|your) (?:ai|artificial intelligence|large language model|language model|virtual assistant)\b"
    r"|\bals (?:ki|künstliche intelligenz)\b|\ben tant qu['’](?:ia|intelligence artificielle)\b"
    r"|\bcomo (?:una? )?(?:ia|inteligencia artificial|modelo de lenguaje)\b|作为(?:一个|一名)?(?:人工智能|AI|语言模型)"
)
# How chat templates write the borders of messages, and an answer that goes on as the next speaker.
TEMPLATE = re.compile(
    r"<\|[\w ]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>|</?think>|\A<s>|</s>\s*\Z"
    r"|^###\s*(?:Instruction|Response|Input|Human|Assistant)\b",
    re.MULTILINE,
)
NEXT_SPEAKER = re.compile(r"^(?:Human|User|Assistant)\s*:", re.MULTILINE)
A_DIALOGUE = re.compile(  # a prompt that asks for what several say
    r"(?i)\b(?:dialog\w*|dialogue\w*|diálogo\w*|conversations?|transcripts?|chat ?logs?|chats?|interviews?|scripts?"
    r"|role-?play\w*|exchange between|gespräch\w*|gesprek|rozmow\w*|conversación|conversazione|диалог\w*|разговор\w*)\b"
    r"|对话|對話|会話|대화|حوار|संवाद"
)
# A password in an example that is plainly none.
NO_SECRET = re.compile(
    r"(?i)your|example|placeholder|change.?me|insert|dummy|sample|redacted|secret_here|\bmy_?|password['\"]?\Z|x{4}|\*{4}"
    r"|\.{3}|<\w|\$\{|\{\{|123456"
)
HTML = re.compile(r"(?i)\b(?:html|xml|svg|entit(?:y|ies)|escap)")
A_FORM = re.compile(r"(?i)\b(?:templates?|placeholders?|fill[- ]in|boilerplate|todo|vorlage|modèle|plantilla)\b")
# A prompt that may ask for another language than its own: it translates, or names a language.
A_LANGUAGE = re.compile(
    r"(?i)translat|\b(?:english|french|german|spanish|italian|portuguese|dutch|polish|swedish|turkish|russian|ukrainian"
    r"|chinese|mandarin|cantonese|japanese|korean|arabic|hindi|hebrew|greek|thai|latin|persian|farsi|vietnamese"
    r"|indonesian|malay|hungarian|czech|slovak|romanian|bulgarian|serbian|croatian|finnish|danish|norwegian|bengali"
    r"|tamil|telugu|urdu|punjabi|swahili|catalan|icelandic|irish|welsh|gaelic|basque|georgian|armenian|sanskrit"
    r"|nepali|burmese|khmer|lao|mongolian|tagalog|filipino|yiddish|esperanto|languages?)\b"
    r"|übersetz|englisch|deutsch|französisch|spanisch|italienisch|russisch|chinesisch|japanisch|arabisch|griechisch"
    r"|tradu[cizs]|anglais|français|allemand|espagnol|chinois|japonais|inglés|español|francés|alemán|inglese|francese"
    r"|inglês|português|vertaal|engels|oversæt|översätt|oversett|engelsk|przet[łl]umacz|angielsk|přelož|anglick|fordít"
    r"|angol|çevir|ingilizce|türkçe|terjemah|bahasa|dịch|tiếng|перев[еёо]д|переклад|превед|\bпо-\w+ск[иі]\b"
    r"|(?:английск|русск|французск|немецк|испанск|китайск|японск)(?:ом|ий|ого|ая|ую)\b|англійськ|українськ"
    r"|翻[译譯訳]|[英法德日韩俄汉]语|[英法德日韓韩俄中漢]文|语言|[英国本スツア]語|번역|영어|한국어|일본어|중국어|(?:프랑스|독일|스페인)어"
    r"|แปล|ภาษา|ترجم|إنجليزي|انجليزي|عربية|انگلیسی|فارسی|अनुवाद|अंग्रेज|हिंदी|हिन्दी|অনুবাদ|μετ[αά]φρα|αγγλικ|ελληνικ"
    r"|תרגמ|תרגם|אנגלית|עברית"
)
# A prompt that asks for words which somebody says to another, or to decline something.
A_LETTER = re.compile(
    r"(?i)\b(?:letters?|e-?mails?|mails?|(?:write|draft|send|compose|polite|kind|short)\b.{0,40}\bmessages?|sms"
    r"|repl(?:y|ies) (?:to|for)|(?:a|the) reply|respond to|response to|declin\w*|refus\w*|reject\w*|turn(?:ing)? down"
    r"|excuses?|apolog\w*|invitations?|(?:einen?|den|dem) brief|nachricht|antwortschreiben|absage\w*|sage? .{0,40} ab"
    r"|ablehn\w*|entschuldigung\w*|einladung|lettre|courriel|réponds? à|refuser|décliner|excuses|carta|correo|mensaje"
    r"|rechazar|rechaza|declinar|lettera|messaggio|rifiut\w*|mensagem|recus\w*|afwijz\w*|wiadomość|mejla?"
    r"|odmów\w*|brev|письмо|ответ на|отказ\w*|сообщение)\b|邮件|信件|回信|婉拒|拒绝|拒絕|メール|手紙|断[りる]|返信"
    r"|이메일|편지|거절|답장"
    r"|رسالة|بريد|पत्र|ईमेल"
)
# A refusal that no user says.
AN_ENGINE = re.compile(
    r"(?i)\b(?:can ?not|can['’]t|won['’]t|will not|unable to|not able to)\b[^.?!\n]{0,20}"
    r"\b(?:help|assist|comply|fulfill?|generate|create|write|provide) (?:you )?(?:with )?(?:that|this)\b(?! \w+ \w+)"
    r"|\b(?:damit|dabei) kann ich (?:\w+ ){0,3}nicht (?:helfen|dienen)\b"
)
_ONE_SCRIPT = dict.fromkeys(("Han", "Kana"), "Japanese and Chinese")  # 東京 answers a question with kana
CODE = re.compile(r"```|^\s*(?:def|class|import|from|function|const|SELECT)\b", re.MULTILINE)


@dataclass(frozen=True)
class Made:
    """An answer, and what it answers."""

    prompt: Messages  # the conversation before it
    answer: Answer  # as the engine gave it
    least_words: int = 1  # that it may have
    most_words: int = MOST_WORDS  # that it may have
    may_refuse: bool = False  # a refusal is what is wanted
    is_of_user: bool = False  # it is said in the place of a user

    @cached_property
    def question(self) -> str:
        """The last thing that was said to the model."""
        return str(self.prompt[-1].get("content") or "")

    @property
    def told(self) -> list[str]:
        """What says in which language is answered: the last thing said, and the system prompt."""
        systems = [str(one.get("content") or "") for one in self.prompt[:-1] if one.get("role") == "system"]
        return [self.question, *systems]

    @cached_property
    def texts(self) -> RowTexts:
        """The answer as `data.survey.lint` looks at rows; the prompt is not the engine's fault."""
        return RowTexts(self.answer.text, [self.answer.text], ends_with_answer=True)


def _as_in_rows(code: str) -> Callable[[Made], bool]:
    """A finding of `data check` that a row's own text shows. code: a key of `lint.KINDS`."""
    shows = lint.KINDS[code].shows
    assert shows is not None

    def is_so(made: Made) -> bool:
        return shows(made.texts)

    return is_so


def _refuses(made: Made) -> bool:
    """A letter that declines an invitation refuses nothing that was asked, nor does what a refusal is changed into.
    A user who cannot do something does not refuse; an engine that will not play the user says so in its own words.
    """
    if made.is_of_user:
        return AN_ENGINE.search(made.answer.text) is not None
    if made.may_refuse or A_LETTER.search(made.question) or refuses(made.question):
        return False
    return refuses(made.answer.text)


def _has_entities(made: Made) -> bool:
    return _as_in_rows("markup")(made) and not HTML.search(made.question) and not CODE.search(made.answer.text)


def _copies(made: Made) -> bool:
    """It is the prompt, or begins with all of it. Code is completed with its beginning in front, which is no copy."""
    asked, said = words_of(made.question), words_of(made.answer.text)
    if asked == said:
        return bool(asked)  # no words are in signs and emoji
    is_begun = len(asked) >= COPIED_WORDS and said[: len(asked)] == asked
    return is_begun and not CODE.search(made.question)


def _changes_language(made: Made) -> bool:
    """Only where both languages can be told, code left out. Some words are needed for that: "A tool." would be
    Portuguese, in which "a" is common; "H2O" answers in any script. Another script shows a change. Not so Latin, in
    which names, formulas and commands are written everywhere: it must hold words of a language.
    """
    if any(A_LANGUAGE.search(text) for text in made.told):
        return False
    asked, said = without_blocks(made.question), without_blocks(made.answer.text)
    if min(len(words_of(asked)), len(words_of(said))) <= SHORT:
        return False
    before, after = (_ONE_SCRIPT.get(script, script) for script in (script_of(asked), script_of(said)))
    if before and after and before != after and after != "Latin":
        return True
    if CODE.search(said):
        return False
    languages = language_of(asked), language_of(said)
    if before != after:
        return bool(before and languages[1])
    return before != "Japanese and Chinese" and all(languages) and languages[0] != languages[1]


def _has_placeholder(made: Made) -> bool:
    if SELF_TALK.search(made.answer.text):
        return True
    if A_FORM.search(made.question):
        return False
    return any(found[0] not in made.question for found in PLACEHOLDER.finditer(made.answer.text))


def _has_template_marks(made: Made) -> bool:
    if any(found[0] not in made.question for found in TEMPLATE.finditer(made.answer.text)):
        return True
    if A_DIALOGUE.search(made.question):
        return False
    return any(found[0] not in made.question for found in NEXT_SPEAKER.finditer(made.answer.text))


def _has_secret(made: Made) -> bool:
    """Of a password that is assigned, what stands behind the sign tells whether it is one."""
    for found in lint.SECRETS.finditer(made.answer.text):
        assigned = found["assigned"]
        if not assigned or not NO_SECRET.search(found[0][len(assigned) :]):
            return True
    return False


def _is_of_other_length(made: Made) -> bool:
    """Where letters count as words, a long answer may have more of them."""
    words = words_of(made.answer.text)
    letters = sum(UNSPACED.match(word) is not None for word in words)
    if len(words) < made.least_words:
        return True
    return len(words) - letters + letters * WORDS / LETTERS > made.most_words


# Code of `reasons.REASONS` -> whether an answer has it. The first that an answer has is its reason.
FILTERS: dict[str, Callable[[Made], bool]] = {
    "cut": lambda made: made.answer.finish == "length",
    "empty": _as_in_rows("empty"),
    "encoding": _as_in_rows("encoding"),
    "template marks": _has_template_marks,
    "refusal": _refuses,
    "placeholder": _has_placeholder,
    "prompt copied": _copies,
    "secret": _has_secret,
    "markup": _has_entities,
    "cut off": _as_in_rows("cut off"),
    "language": _changes_language,
    "words": _is_of_other_length,
}


def wrong_with(made: Made) -> str:
    """The code of the first filter that an answer does not pass; "" for a good one."""
    for code, shows in FILTERS.items():
        if shows(made):
            return code
    return ""
