"""What can be wrong with a row: every kind of finding, and how those that a row's own text shows are found.

To add a finding, add an entry to KINDS: its code, how grave it is, what it is, what to do about it, and `shows`, which
tells from the texts of one row (`RowTexts`) whether it has it. Then add a row that has it, and no other, to ODD in
tests/test_check.py. Nothing else changes. A pattern on any text of the row is `text_has(pattern)`.

Kinds without `shows` need more than one row's text: `survey`, `markup` and `SplitSurvey` find them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mlxtune.config.preference import OF_PAIRS, OF_RATED
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.two_sides import TwoSides
from mlxtune.data.survey.refusals import refuses
from mlxtune.data.survey.words import word_count

SHORT_WORDS = 3  # an answer of fewer words is very short
FEW_ROWS = 500  # conversations below which a model learns a form, and soon the rows by heart
LONG_CHARACTERS = 200  # from this length on an answer is expected to end like a sentence
PROSE_CHARACTERS = 40  # a last line beyond this length is prose, not a heading or an item
# Of a password that is assigned, all before it is in the group `assigned`. What may be long, as the parts of a web
# token, begins where none can have begun before: else a long text is searched once more from each beginning.
SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|gh[pousr]_\w{36}|github_pat_\w{30,}|\bsk-[A-Za-z0-9_-]{20,}|AIza[\w-]{35}|xox[baprs]-[\w-]{10,}"
    r"|\bhf_[A-Za-z0-9]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|(?<![\w-])eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
    # Quotes may be escaped, as where JSON stands in a string of JSON: {\"password\": \"...\"}.
    r"|(?P<assigned>(?i:\b(?:password|passwd|api_key|secret_key)\b)(?:\\{0,3}['\"])?\s*[=:]\s*\\{0,3}['\"])"
    r"[^'\"\s]{7,}[^'\"\s\\]\\{0,3}['\"]"
)
# Each part has a longest length, and begins where no part can have begun before: else a long text without a match is
# searched once more from each of its letters.
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?!example\.)[\w-]{1,63}\.(?!example\b)[A-Za-z]{2,24}")
# UTF-8 read as Latin-1 or Windows-1252; the replacement character; control characters that no text has.
ENCODING = re.compile(r"\ufffd|Ã[\x80-\xbf©¨¼¶¤±³¡ª«­®¯²]|â€[™œ\x9d“”˜¦]|Â[\xa0»«°·]|[\x00-\x08\x0b\x0e-\x1f]")
MARKUP = re.compile(r"&(?:amp|lt|gt|quot|nbsp|#\d+);")
# Thai and Lao end a sentence with a space, as they part words: nothing shows that one is cut off.
_WITHOUT_END = re.compile("[\u0e00-\u0eff]")
_ENDS = tuple(".!?…\"'”’)]}>`*_|~:;。！？」』】）；：।॥؟۔\u200d።፧។៕။۝༎།։՜՞᠃") + tuple("0123456789")


@dataclass(frozen=True)
class RowTexts:
    """What one row says."""

    whole: str  # all of its texts, thoughts and tool calls
    answers: list[str] = field(default_factory=list)  # of the assistant; of those that only call tools none
    calls: bool = False  # some assistant turns only call tools
    ends_with_answer: bool = False  # the last assistant turn is an answer, not a call

    @staticmethod
    def of(record: Record) -> RowTexts:
        messages = record.messages or []
        texts = [record.text or ""]
        for message in messages:
            texts.append(str(message.get("content") or ""))
        for message in messages:
            for key in ("reasoning_content", "tool_calls"):
                if message.get(key):
                    texts.append(str(message[key]))
        turns = [message for message in messages if message["role"] == "assistant"]
        answers = [str(message["content"]) for message in turns if not message.get("tool_calls")]
        ends_with_answer = bool(turns) and not turns[-1].get("tool_calls")
        whole = "\n".join(texts)
        return RowTexts(whole, answers, len(answers) < len(turns), ends_with_answer)


@dataclass(frozen=True)
class Kind:
    """A kind of finding."""

    severity: str  # error, warning, note
    what: str  # it is: said after the number of rows
    fix: str  # what to do about it
    shows: Callable[[RowTexts], bool] | None = None  # whether a row has it; None: its text alone does not tell


def text_has(pattern: re.Pattern[str], needed: str = "") -> Callable[[RowTexts], bool]:
    """Whether a pattern is in any text of a row. needed: a character of every match, which is looked for first."""
    return lambda texts: needed in texts.whole and pattern.search(texts.whole) is not None


def has_empty_answer(texts: RowTexts) -> bool:
    return any(not answer.strip() for answer in texts.answers)


def has_short_answers(texts: RowTexts) -> bool:
    """All of its answers are; an empty one is a finding of its own."""
    if texts.calls or not texts.answers or has_empty_answer(texts):
        return False
    return all(word_count(answer) < SHORT_WORDS for answer in texts.answers)


def has_cut_answer(texts: RowTexts) -> bool:
    return texts.ends_with_answer and seems_cut_off(texts.answers[-1])


def has_refusal(texts: RowTexts) -> bool:
    return any(refuses(answer) for answer in texts.answers)


def seems_cut_off(answer: str) -> bool:
    """An open code block, or a long text whose last line ends inside a sentence."""
    text = answer.rstrip()
    if text.count("```") % 2:
        return True
    last = text.rpartition("\n")[2]
    prose = len(last) > PROSE_CHARACTERS and not re.match(r"\s*(?:[-*#|•>]|\d+[.)])", last)
    if _WITHOUT_END.match(text[-1:]):
        return False
    return len(text) >= LONG_CHARACTERS and prose and not text.endswith(_ENDS) and ord(text[-1]) < 0x2000


KINDS = {  # by code; a row's own are told in this order
    "bad": Kind(
        "error",
        "rows that cannot be read",
        "mend or remove them",
    ),
    "refused": Kind(
        "error",
        "rows that the chat template refuses",
        "change them so that it takes them, or choose another data.template",
    ),
    "too long": Kind(
        "error",
        "rows of which data.max_tokens leaves nothing to learn",
        "raise data.max_tokens, or split them",
    ),
    "dropped": Kind(
        "error",
        "rows that teach nothing",
        "give them an answer to learn, or remove them",
    ),
    "rated": Kind(
        "warning",
        "rows rated bad: left out, for without -c kto good answers alone are learned",
        "train with -c kto, which learns from both ratings, or leave it at that",
    ),
    "unrated": Kind(
        "warning",
        "rows that nobody rated, with null as their label: left out",
        "rate them (of a chat's log: mlxtune rate), or remove the label of rows that are to be learned",
    ),
    "label": Kind(
        "warning",
        "rows with a label that may be a rating or a class (0, 1, a word): learned whatever it is",
        "-c kto if it rates the answer: else bad answers are learned too",
    ),
    "damaged": Kind(
        "error",
        "rows of which the chat template drops something",
        "mend them, choose another data.template, or set data.on_damage",
    ),
    "leak": Kind(
        "error",
        "rows that are both in train and valid",
        "remove them from one of the two",
    ),
    "question leak": Kind(
        "warning",
        "validation rows whose question is also in train",
        "keep a question on one side, or expect a flattered loss",
    ),
    "shortened": Kind(
        "warning",
        "rows cut at data.max_tokens: their end is not learned",
        "raise data.max_tokens or split them",
    ),
    "unread": Kind(
        "warning",
        "rows with message keys that nothing reads",
        "remove or rename them: `weight: 0` makes a turn context, `reasoning_content` holds its thinking",
    ),
    "special": Kind(
        "warning",
        "rows whose messages hold tokens of the chat template",
        "remove them: the template writes its own around each message",
    ),
    "rendered": Kind(
        "warning",
        "text rows that are rendered already: their whole text is trained on, prompts too",
        "give them as `messages` rows: of those the answers alone are trained on",
    ),
    "mixed": Kind(
        "error",
        "rows of another kind than most: conversations, pairs and rated answers are trained in different ways",
        "give each kind a data set of its own",
    ),
    "objective": Kind(
        "error",
        "rows that preference.loss does not train",
        f"train pairs with {', '.join(OF_PAIRS)}, rated answers with {' or '.join(OF_RATED)}, conversations without it",
    ),
    "contradiction": Kind(
        "warning",
        "rows that another row contradicts: of one prompt, the same answer is better here and worse there",
        "decide which is right, and remove the others",
    ),
    "both ways": Kind(
        "note",
        "rows with an answer that is chosen here and rejected elsewhere",
        "fine where answers were ranked; else look at them",
    ),
    "longer": Kind(
        "warning",
        "rows in which lengths tell which answer is chosen: a model learns to be long from them",
        "add pairs whose better answer is the shorter one, or set preference.length_normalised=true",
    ),
    "shorter": Kind(
        "note",
        "rows in which lengths tell which answer is chosen: a model learns to be short from them",
        "fine if that is wanted; else add pairs whose better answer is the longer one",
    ),
    "one-sided": Kind(
        "warning",
        "rated rows: without the other thumb nothing says what to prefer",
        "add rows of the other rating; good ones alone can be trained as conversations",
    ),
    "unused": Kind(
        "warning",
        "of the data files or splits beside it are not used",
        "name them as a split (train, valid or test), or remove them",
    ),
    "duplicate": Kind(
        "warning",
        "rows equal to an earlier one",
        "set data.dedup=exact",
    ),
    "near duplicate": Kind(
        "note",
        "rows nearly equal to an earlier one",
        "set data.dedup=near",
    ),
    "system": Kind(
        "warning",
        "rows without a system prompt, while others have one",
        "give all of them what the model will see in use",
    ),
    "own system": Kind(
        "note",
        "rows without a system prompt, before which the chat template puts one of its own",
        "ask the model with the same template, or give the rows the system prompt that is meant",
    ),
    "few": Kind(
        "warning",
        f"rows to learn from, fewer than {FEW_ROWS}: enough for a form, not for knowledge, and soon known by heart",
        "add rows, or train few epochs and watch the validation loss (train.patience)",
    ),
    "style": Kind(
        "warning",
        "rows of a source that is written otherwise than the first",
        "bring the sources to one style, unless both are meant",
    ),
    "no end": Kind(
        "warning",
        "rows: the chat template ends answers with no token of its own",
        "choose a template that ends turns",
    ),
    "secret": Kind(
        "warning",
        "rows that seem to hold a key or password",
        "remove it: models repeat what they were tuned on",
        text_has(SECRETS),
    ),
    "e-mail": Kind(
        "note",
        "rows with an e-mail address",
        "remove addresses that are private",
        text_has(EMAIL, "@"),
    ),
    "encoding": Kind(
        "warning",
        "rows with broken characters",
        "read the source again as UTF-8",
        text_has(ENCODING),
    ),
    "markup": Kind(
        "note",
        "rows with HTML entities",
        "unescape them, unless the answers are HTML",
        text_has(MARKUP, "&"),
    ),
    "empty": Kind(
        "warning",
        "rows with an empty answer",
        "remove them, or give that message weight 0",
        has_empty_answer,
    ),
    "short": Kind(
        "note",
        f"rows whose answers all have fewer than {SHORT_WORDS} words",
        "fine for labels; else look at them",
        has_short_answers,
    ),
    "cut off": Kind(
        "warning",
        "rows whose last answer seems cut off",
        "look at their ends; a model learns to stop there",
        has_cut_answer,
    ),
    "rejected cut off": Kind(
        "note",
        "rows whose rejected answer seems cut off",
        "fine if that is what is wrong with it; a model that sees many of them learns to end, and little else",
    ),
    "refusal": Kind(
        "note",
        "rows whose answer is a refusal",
        "keep them only if the model is meant to refuse these",
        has_refusal,
    ),
}


# Kinds that may be wrong with a rejected answer as with any text; what else is wrong with it may be why it is rejected.
OF_ANY_TEXT = ("secret", "e-mail", "encoding", "markup")
# What a finding says of several rows -> of one.
OF_ONE = (
    ("rows", "row"),
    ("that teach ", "that teaches "),
    ("that are ", "that is "),
    ("that seem ", "that seems "),
    (": their ", ": its "),
)


def counted(count: int, what: str) -> str:
    """A number of rows and what a finding says of them, in words: "1 row that teaches nothing"."""
    if count == 1:
        for several, one in OF_ONE:
            what = what.replace(several, one, 1)
    return f"{count:,} {what}"


def codes(record: Record) -> Iterator[str]:
    """The kinds that one row's own texts show."""
    texts = RowTexts.of(record)
    for code, kind in KINDS.items():
        if kind.shows is not None and kind.shows(texts):
            yield code


def codes_of_pair(pair: TwoSides) -> Iterator[str]:
    """The same of a pair: what its chosen side shows, and what must not stand in either."""
    yield from codes(pair.chosen)
    for code in codes(pair.rejected):
        if code in OF_ANY_TEXT:
            yield code
        elif code == "cut off":
            yield "rejected cut off"
