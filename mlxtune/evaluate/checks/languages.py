"""Which language a text is written in, by its letters and its commonest words.

That is enough to see whether an answer is in the language that it should be in. It is no judge of single words: a text
that holds too few of the words below is of no known language.
"""

from __future__ import annotations

import re
from collections import Counter

from mlxtune.data.survey.subjects import SCRIPTS
from mlxtune.errors import did_you_mean
from mlxtune.evaluate.checks.arguments import Arguments, CheckError, Kind, Place
from mlxtune.evaluate.checks.blocks import without_blocks
from mlxtune.evaluate.checks.check import Rule, Score, SuiteRow
from mlxtune.evaluate.checks.words import words_of
from mlxtune.evaluate.engines.request import Answer

UNKNOWN = "holds too few common words to tell its language: counted as failed"
# ISO 639-1 code -> words that are frequent in it; several languages may share one.
COMMON = {
    "en": "the of and a to in is you that it he was for on are as with his they i at be this have from or had by"
    " but what"
    " we can there an your which their if will not do how about has more would so no my than been who its now did get"
    " yes please hello here just like should when where why could me us these those them our any some",
    "de": "der die das und ist in den von zu mit sich des auf für nicht im dem ein eine als auch es an werden"
    " aus er hat"
    " dass sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur oder aber vor zur"
    " bis mehr"
    " durch man kann wenn ihr wir ich du mir mich sein ihre ihnen bitte ja nein hier was wo warum diese dieser dieses",
    "fr": "le la les de des du et un une est en que qui dans pour pas sur au aux avec il elle ils ce cette ces"
    " se son sa"
    " ses par plus ne ou mais nous vous je tu on sont être avoir fait comme tout leur si bien peut aussi votre notre"
    " mon ma mes oui non où quand pourquoi comment très été était cela c'est l' d'",
    "es": "el la los las de del y en que un una es por con para se no lo su sus al como más pero le ya o este esta fue"
    " son está son entre cuando muy sin sobre también me hasta hay donde quien desde todo nos durante ni yo tú usted"
    " si sí porque qué cómo puede ser tiene había eso esto mi tu nuestro",
    "it": "il lo la i gli le di del della dei delle e è in che un una uno per con non si da al alla sono come ma"
    " più su"
    " nel nella anche se ha ho questo questa quello o ci mi ti vi io tu lui lei noi voi loro essere avere fare può"
    " quando dove perché cosa suo sua molto tutto tutti sì dal dalla sul sulla",
    "pt": "o a os as de do da dos das e é em que um uma para com não se por no na nos nas mais como mas ao à foi"
    " ele ela"
    " seu sua ou ser quando muito há já está eu também só pelo pela até isso isto entre era depois sem mesmo você nós"
    " meu minha são sim porque onde pode tem este esta",
    "nl": "de het een en van ik te dat die in is niet op zijn aan met er voor maar als was bij uit ook naar om dan of"
    " wel nog wat haar hij ze je u wij we hebben heeft kan kunnen worden wordt deze dit door over geen meer zo hoe"
    " waar waarom ja nee mijn jouw uw hun onze",
    "pl": "i w na z do nie się to jest że o jak ale po co za od już tak przez dla był była było są być może ten ta te"
    " który która które przy oraz lub czy tylko jeszcze gdy bardzo mnie mi ja ty on ona my wy oni jego jej ich tym",
    "sv": "och i att det som en på är av för med den till inte har de om ett han men var jag sig från vi så kan när du"
    " hon dem skulle efter eller under vid mot hur vad där här man alla finns också mycket mer ni min din ja nej",
    "tr": "ve bir bu da de için ile çok ne olarak daha gibi var olan o en kadar sonra ya ben sen biz siz onlar"
    " mi mı mu"
    " değil ama şey her evet hayır nasıl neden nerede olduğu olur hem veya ki göre bana sana",
    "id": "yang dan di itu dengan untuk tidak ini dari dalam akan pada juga saya ke karena bisa ada mereka kamu"
    " kita anda"
    " oleh adalah atau sudah lebih seperti hanya apa bagaimana mengapa jika saat telah",
    "ru": "и в не на что я с он а как это по но они мы она к у из за то все так его же от бы для вы о или если когда"
    " только уже мне было есть ещё нет да где почему может этот быть",
    "uk": "і в не на що я з він а як це по але вони ми вона до у із за то всі так його же від би для ви про або якщо"
    " коли тільки вже мені було є ще ні та де чому може цей бути й",
}
# ISO 639-1 code -> its script; two of one script are told apart by COMMON.
SCRIPT_OF = {
    **dict.fromkeys(("en", "de", "fr", "es", "it", "pt", "nl", "pl", "sv", "tr", "id"), "Latin"),
    **dict.fromkeys(("ru", "uk"), "Cyrillic"),
    "el": "Greek",
    "ar": "Arabic",
    "he": "Hebrew",
    "hi": "Devanagari",
    "th": "Thai",
    "ja": "Kana",
    "ko": "Hangul",
    "zh": "Han",
}
LEAST = 2  # common words that tell a language, in a text of more than SHORT
SHORT = 4  # words of a text of which one is enough
_WORDS = {code: frozenset(text.split()) for code, text in COMMON.items()}
_LETTERS = {name: re.compile(f"[{letters}]") for name, letters in SCRIPTS.items()}
_LEFT_OUT = re.compile(r"`[^`\n]*`|https?://\S+|(?<!\S)\S+@\S+")  # code, addresses: of no language
_SIGNS = {  # letters that some of these languages have and the others hardly: each counts as a word
    "de": "ßäöü",
    "fr": "çœêù",
    "es": "ñ¿¡",
    "pt": "ãõ",
    "pl": "łąęśźżć",
    "sv": "åäö",
    "tr": "ışğ",
    "uk": "іїєґ",
    "ru": "ыэъё",
}


def language_of(text: str) -> str:
    """The code of the language that a text is written in; "" where it cannot be told."""
    text = _LEFT_OUT.sub(" ", without_blocks(text))
    script = script_of(text)
    if script in ("Latin", "Cyrillic"):
        return _by_words(text, script)
    return next((code for code, name in SCRIPT_OF.items() if name == script), "")


def script_of(text: str) -> str:
    """The script of most letters, a name of SCRIPTS; Japanese is what has kana, whatever else it has. "" for none."""
    counts = {name: len(letters.findall(text)) for name, letters in _LETTERS.items()}
    if counts["Kana"] * 10 >= counts["Kana"] + counts["Han"] and counts["Kana"]:
        counts["Kana"] += counts.pop("Han")
    most = max(counts, key=lambda name: counts[name])
    return most if counts[most] else ""


def _by_words(text: str, script: str) -> str:
    """The language of a script whose common words are most of the text's words; "" where two are as likely."""
    words = words_of(text)
    scores: Counter[str] = Counter()
    for code, common in _WORDS.items():
        if SCRIPT_OF[code] == script:
            hits = sum(word in common for word in words)
            signs = sum(text.lower().count(sign) for sign in _SIGNS.get(code, ""))
            scores[code] = hits + signs if hits or len(words) <= SHORT else 0
    (first, most), (_, second) = scores.most_common(2)
    needed = 1 if len(words) <= SHORT else LEAST
    return first if most >= needed and most > second else ""


def _language(arguments: Arguments, place: Place) -> Rule:
    """The answer is written in the language (ISO 639-1: de); code and addresses do not count."""
    wanted = arguments.texts("language")
    for code in wanted:
        if code not in SCRIPT_OF:
            raise CheckError(f"language {code!r} is not known", did_you_mean(code, sorted(SCRIPT_OF)))

    def judge(answer: Answer, row: SuiteRow) -> Score:
        found = language_of(answer.text)
        if not found:
            arguments.notes[UNKNOWN] += 1
        return float(found in wanted)

    return Rule(judge)


KINDS = {"language": Kind(_language)}
