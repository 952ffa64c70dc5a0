"""What can be wrong with one row's text, and what kind of row it is: patterns, so a finding is but a suspicion."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.messages import IDLE, KNOWN

SHORT_WORDS = 3  # an answer of fewer words is very short
LONG_CHARACTERS = 200  # from this length on an answer is expected to end like a sentence


# What a code means: severity (error, warning, note), what it is, and what to do about it.
KINDS = {
    "bad": ("error", "rows that cannot be read", "mend or remove them"),
    "refused": (
        "error",
        "rows that the chat template refuses",
        "change them so that it takes them, or choose another data.template",
    ),
    "too long": (
        "error",
        "rows of which data.max_tokens leaves nothing to learn",
        "raise data.max_tokens, or split them",
    ),
    "dropped": ("error", "rows that teach nothing", "give them an answer to learn, or remove them"),
    "damaged": (
        "error",
        "rows of which the chat template drops something",
        "mend them, choose another data.template, or set data.on_damage",
    ),
    "leak": ("error", "rows that are both in train and valid", "remove them from one of the two"),
    "question leak": (
        "warning",
        "validation rows whose question is also in train",
        "keep a question on one side, or expect a flattered loss",
    ),
    "shortened": (
        "warning",
        "rows cut at data.max_tokens: their end is not learned",
        "raise data.max_tokens or split them",
    ),
    "unread": (
        "warning",
        "rows with message keys that nothing reads",
        "remove or rename them: `weight: 0` makes a turn context, `reasoning_content` holds its thinking",
    ),
    "special": (
        "warning",
        "rows whose messages hold tokens of the chat template",
        "remove them: the template writes its own around each message",
    ),
    "rendered": (
        "warning",
        "text rows that are rendered already: their whole text is trained on, prompts too",
        "give them as `messages` rows: of those the answers alone are trained on",
    ),
    "unused": (
        "warning",
        "of the data files or splits beside it are not used",
        "name them as a split (train, valid or test), or remove them",
    ),
    "duplicate": ("warning", "rows equal to an earlier one", "set data.dedup=exact"),
    "near duplicate": ("note", "rows nearly equal to an earlier one", "set data.dedup=near"),
    "empty": ("warning", "rows with an empty answer", "remove them, or give that message weight 0"),
    "cut off": ("warning", "rows whose last answer seems cut off", "look at their ends; a model learns to stop there"),
    "secret": (
        "warning",
        "rows that seem to hold a key or password",
        "remove it: models repeat what they were tuned on",
    ),
    "e-mail": ("note", "rows with an e-mail address", "remove addresses that are private"),
    "encoding": ("warning", "rows with broken characters", "read the source again as UTF-8"),
    "markup": ("note", "rows with HTML entities", "unescape them, unless the answers are HTML"),
    "refusal": ("note", "rows whose answer is a refusal", "keep them only if the model is meant to refuse these"),
    "short": (
        "note",
        f"rows whose answers all have fewer than {SHORT_WORDS} words",
        "fine for labels; else look at them",
    ),
    "system": (
        "warning",
        "rows without a system prompt, while others have one",
        "give all of them what the model will see in use",
    ),
    "no end": (
        "warning",
        "rows: the chat template ends answers with no token of its own",
        "choose a template that ends turns",
    ),
}
SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|gh[pousr]_\w{36}|github_pat_\w{30,}|\bsk-[A-Za-z0-9_-]{20,}|AIza[\w-]{35}|xox[baprs]-[\w-]{10,}"
    r"|\bhf_[A-Za-z0-9]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY-----|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
    r"|(?i:\b(?:password|passwd|api_key|secret_key)\b\s*[=:]\s*['\"][^'\"\s]{8,}['\"])"
)
# Each part has a longest length, and begins where no part can have begun before: else a long text without a match is
# searched once more from each of its letters.
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?!example\.)[\w-]{1,63}\.(?!example\b)[A-Za-z]{2,24}")
# UTF-8 read as Latin-1 or Windows-1252; the replacement character; control characters that no text has.
ENCODING = re.compile(r"\ufffd|Ã[\x80-\xbf©¨¼¶¤±³¡ª«­®¯²]|â€[™œ\x9d“”˜¦]|Â[\xa0»«°·]|[\x00-\x08\x0b\x0e-\x1f]")
MARKUP = re.compile(r"&(?:amp|lt|gt|quot|nbsp|#\d+);")
REFUSAL = re.compile(
    r"\s*(?:i['’]?m sorry|i am sorry|sorry|i apologi[sz]e)?\W{0,3}(?:but )?"
    r"(?:(?:as an ai\b|i(?:['’]m| am) (?:unable|not able)|i (?:cannot|can['’]?t|won['’]?t|do not have the ability))|"
    r"i['’]?m sorry, but)",
    re.IGNORECASE,
)
# A token that is markup, such as <|im_end|> or [INST]; thinking inside of an answer is text that templates look for.
LIKE_MARKUP = re.compile(r"(?!</?think(?:ing)?>)[<\[｜].*[>\]｜]", re.DOTALL)
PATTERNS = (("secret", SECRETS, ""), ("e-mail", EMAIL, "@"), ("encoding", ENCODING, ""), ("markup", MARKUP, "&"))
TASKS = {
    "explain": r"explain|describe|why\b|how (?:do|does|did|can|is|are)|what (?:does|do) .* mean|tell me about",
    "summarise": r"summari[sz]e|summary|tl;?dr|shorten|condense",
    "classify": r"classify|categori[sz]e|sentiment|label\b|which (?:category|class)|is (?:this|the following) .* or",
    "compare": r"compare|contrast|difference(?:s)? between|versus|\bvs\b|pros and cons",
    "generate": r"write|create|generate|compose|draft|suggest|come up with|brainstorm|imagine|design",
    "debug": r"debug|fix (?:the|this|my)|what(?:'s| is) wrong with|error message|traceback|bug\b",
    "rewrite": r"rewrite|rephrase|paraphrase|edit (?:the|this|my)|improve|correct (?:the|this)|proofread",
    "translate": r"translate|translation|in (?:french|german|spanish|chinese|japanese|english)\b",
    "extract": r"extract|identify|find (?:all|the)|list (?:all|the)|name (?:all|the|three|five|two)",
    "calculate": r"calculate|compute|solve|how (?:many|much)|what is \d|percent|total\b|equation",
    "code": r"python|javascript|function\b|sql\b|\bcode\b|regex|program\b|script\b|algorithm",
    "answer": r"^\s*(?:what|who|when|where|which|is|are|can|does|do)\b",
}
SCRIPTS = {
    "Latin": "A-Za-z\u00c0-\u024f",
    "Cyrillic": "\u0400-\u04ff",
    "Greek": "\u0370-\u03ff",
    "Arabic": "\u0600-\u06ff",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f",
    "Kana": "\u3040-\u30ff",
    "Hangul": "\uac00-\ud7af",
    "Han": "\u4e00-\u9fff\u3400-\u4dbf",
}
_ENDS = tuple(".!?…\"'”’)]}>`*_|~:;。！？」』】）；：।؟\u200d") + tuple("0123456789")


def codes(record: Record) -> Iterator[str]:
    """What is to say about one row by itself."""
    texts = [record.text or "", *(str(message.get("content") or "") for message in record.messages or [])]
    whole = "\n".join(texts)
    for message in record.messages or []:
        whole += "".join(f"\n{message[key]}" for key in ("reasoning_content", "tool_calls") if message.get(key))
    for code, pattern, needed in PATTERNS:
        if needed in whole and pattern.search(whole):
            yield code
    answers = [message for message in record.messages or [] if message["role"] == "assistant"]
    spoken = [str(message["content"]) for message in answers if not message.get("tool_calls")]
    if any(not text.strip() for text in spoken):
        yield "empty"
    elif spoken and len(spoken) == len(answers) and all(len(text.split()) < SHORT_WORDS for text in spoken):
        yield "short"
    if spoken and spoken[-1] is answers[-1]["content"] and seems_cut_off(spoken[-1]):
        yield "cut off"
    if any(REFUSAL.match(text) for text in spoken):
        yield "refusal"


class Markup:
    """What a tokenizer's chat template makes of messages: the special tokens that it writes, and the keys it names."""

    def __init__(self, tokenizer: Any) -> None:
        self.source = str(tokenizer.chat_template or "")
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.start, self.end = str(tokenizer.bos_token or ""), str(tokenizer.eos_token or "")
        written = {token for token in added if token in self.source}
        written |= {self.start} if "bos_token" in self.source else set()
        written |= {self.end} if "eos_token" in self.source else set()
        found = sorted((token for token in written if LIKE_MARKUP.fullmatch(token)), key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, found)) or r"(?!)")

    def codes(self, record: Record) -> Iterator[tuple[str, str]]:
        """(code, what was found) of one row."""
        if record.text is not None:
            inner = record.text.strip().removeprefix(self.start).removesuffix(self.end)
            if tokens := self._found(inner):
                yield "rendered", tokens
            return
        messages = record.messages or []
        said = [str(message.get(key) or "") for message in messages for key in ("content", "reasoning_content")]
        if tokens := self._found("\n".join(said)):
            yield "special", tokens
        for key in sorted({key for message in messages for key in message} - KNOWN - IDLE):
            if not re.search(rf"\b{re.escape(key)}\b", self.source):
                yield "unread", key

    def _found(self, text: str) -> str:
        return ", ".join(sorted(set(self._tokens.findall(text))))


def seems_cut_off(answer: str) -> bool:
    """An open code block, or a long text whose last line ends inside a sentence."""
    text = answer.rstrip()
    if text.count("```") % 2:
        return True
    last = text.rpartition("\n")[2]
    prose = len(last) > 40 and not re.match(r"\s*(?:[-*#|•>]|\d+[.)])", last)
    return len(text) >= LONG_CHARACTERS and prose and not text.endswith(_ENDS) and ord(text[-1]) < 0x2000


def task_of(record: Record) -> str:
    """What the first question asks for: a name of TASKS, or "other"."""
    asked = next((str(m["content"]) for m in record.messages or [] if m["role"] == "user"), "")
    return next((name for name, pattern in TASKS.items() if re.search(pattern, asked[:400], re.IGNORECASE)), "other")


def scripts_of(text: str) -> list[str]:
    """The scripts that a text is written in."""
    if text.isascii():
        return ["Latin"]
    return [name for name, letters in SCRIPTS.items() if re.search(f"[{letters}]", text)]
