"""What a row is about: what its first question asks for, what kind of conversation it is, and its scripts.

What is asked for goes by English words. The earliest word of `TASKS` in the question decides:

    Compare two drinks and explain which one is better.    compare
    How do I fix this error?                               debug
    How do tides come about?                               explain: only `QUESTIONS` have something for it
    Nenne drei Städte.                                     other

Nothing is right for every row; the shares of a data set are what is told.
"""

from __future__ import annotations

import re

from mlxtune.data.rows.formats import Record
from mlxtune.data.survey.words import word_count

LOOKED_AT = 400  # characters of a question: what it asks for is said early
_MADE = (  # what can be written, and is a task of its own
    "summary|summari[sz]ation|translation|comparison|critique|explanation|function|program|script|code|query"
    "|regular expression|python|javascript|sql|html"
)
# What a question asks for -> how it is said. Of two that begin at the same place the first counts.
TASKS = {
    "summarise": r"summari[sz]|summary|tl;?dr|shorten|condense|key points|main points",
    "translate": r"translat|in(?:to)? (?:french|german|spanish|italian|chinese|japanese|arabic|english)\b",
    "classify": r"classif|categori[sz]|categories|sentiment|label\b|which (?:category|class)|decide (?:if|whether)"
    r"|is (?:this|the following) .{1,80} or\b|select [a-d],|choose (?:a|the|one|from)\b|yes or no|true or false"
    r"|(?:tell|detect|identify|predict|verify|check|determine)(?: me)? (?:if|whether)",
    "compare": r"compar|contrast|differences? between|differ from|versus|vs\b|pros and cons|(?:is|are) better",
    "critique": r"critique|critici[sz]|evaluate|assess|feedback|review (?:the|this|my)|strengths and weaknesses"
    r"|rate (?:the|this|my)|analy[sz]e|what do you think of",
    "debug": r"debug|fix (?:the|this|my|it)|what(?:'s| is) wrong|error message|syntax error|traceback|exception"
    r"|bugs?\b|(?:does|is|do)(?: not|n't) work|this error",
    "rewrite": r"rewrite|rephrase|paraphrase|edit (?:the|this|my)|improve (?:the|this|my)|correct (?:the|this)"
    r"|proofread|replace|convert|fill in",
    "extract": r"extract|identify|find (?:all|the|out)|list (?:all|the)|name (?:all|the|two|three|five)"
    r"|select (?:the|all)",
    "calculate": r"calculat|comput(?:e|ing)\b|solv(?:e|ing)\b|how (?:many|much)|what is -?\d|percent|equation"
    r"|math (?:word )?problem",
    "code": r"(?:python|javascript|typescript|rust|java|sql|html|regex|regular expression|function|code|script)\b"
    r"|c\+\+|programs?\b|algorithm",
    "explain": r"expla(?:in|nation)(?! (?:the |me )?(?:main |key )?differences?)|describe|tell me (?:about|why|how)"
    r"|definition of|elaborate",
    "generate": rf"(?:write|create|generate|make|compose|draft|give|design)\b(?! (?:\w+ ){{0,3}}?(?:{_MADE})\b)"
    r"|suggest|recommend|com(?:e|ing) up with|reply to|expand (?:the|this)|brainstorm|imagine|invent"
    r"|plan (?:a|an|the)|complete the|tell me an?\b",
}
# The same, where none of these words is there: what question words alone say.
QUESTIONS = {
    "explain": r"\bwhy\b|\bhow\b|what (?:does|do) .{1,80} mean|what is meant",
    "answer": r"^\s*(?:what|who|whom|whose|when|where|which|is|are|was|were|can|could|does|do|did|should|will)\b|\?",
}
ALL_TASKS = tuple(dict.fromkeys([*TASKS, *QUESTIONS]))

CLOSED_WORDS = 8  # an answer of at most so many words settles its question: yes, a name, a number, one of the choices
KINDS = {  # what a conversation is -> when it counts as that; it may be several of them
    "open question": f"a question with an answer of more than {CLOSED_WORDS} words",
    "closed question": f"a question with an answer of at most {CLOSED_WORDS} words",
    "reasoning": "a thought, two lines that calculate, or a question that asks for steps or a proof",
    "coding": "a block of code, or a question about code",
    "conversation": "more than one turn of the user",
    "refusal": "an answer that refuses",  # found with the findings (`lint`)
}
STEPS = re.compile(
    r"step[- ]by[- ]step|reason(?:s|ing)? (?:steps|through|about)|prove\b|proof\b|show your|intermediate steps"
    r"|think (?:it )?through|puzzle|riddle|syllogism|deduce",
    re.IGNORECASE,
)
CALCULATION = re.compile(r"[-+*/×÷] ?[$€£]?\d[\d.,]* ?%? ?=")  # 48 / 2 =


def _any_of(patterns: dict[str, str], before: str = "") -> re.Pattern[str]:
    """A pattern that finds the earliest of several, each a group of its name. before: what stands before each."""
    named = "|".join(f"(?P<{name}>{pattern})" for name, pattern in patterns.items())
    return re.compile(f"{before}(?:{named})", re.IGNORECASE)


_TASKS = _any_of(TASKS, r"\b")
_QUESTIONS = _any_of(QUESTIONS)
_QUESTION_WORD = re.compile(
    r"(?:what|who|whom|whose|when|where|which|why|how|is|are|was|were|can|could|does|do|did|should|would|will)\b",
    re.IGNORECASE,
)
_ENGLISH = re.compile(
    r"\b(?:the|and|you|your|are|with|this|these|have|has|from|what|how|why|which|who|when|where|can|could|should|would"
    r"|does|did|write|give|make|name|list|find|tell|explain|describe|create|suggest|rewrite|summari[sz]e|classify"
    r"|translate|compare|identify|generate|calculate|solve|is it|is an?)\b",
    re.IGNORECASE,
)
SCRIPTS = {  # name -> the letters of its Unicode blocks
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


def task_of(record: Record) -> str:
    """What the first question asks for: one of ALL_TASKS, or "other"."""
    return task_in(first_question(record))


def task_in(question: str) -> str:
    """The same of a question's text."""
    looked_at = question[:LOOKED_AT]
    found = _TASKS.search(looked_at) or _QUESTIONS.search(looked_at)
    return str(found.lastgroup) if found else "other"


def is_english(question: str) -> bool:
    """Whether a question is likely English, so that `task_in` can tell anything of it: it has a word that English has
    alone of the languages with its letters.
    """
    return _ENGLISH.search(question[:LOOKED_AT]) is not None


def first_question(record: Record) -> str:
    """The first text of a user; "" where there is none."""
    for message in record.messages or []:
        if message["role"] == "user":
            return str(message["content"])
    return ""


def is_question(text: str) -> bool:
    """Whether a text asks, and does not order: it ends with a question mark, or begins with a question word."""
    stripped = text.strip()
    return stripped.endswith(("?", "？", "؟", "՞")) or _QUESTION_WORD.match(stripped) is not None


def kinds_of(record: Record) -> list[str]:
    """What a conversation is, of KINDS, but for "refusal"; of a text nothing."""
    messages = record.messages or []
    if not messages:
        return []
    question = first_question(record)
    answers = [message for message in messages if message["role"] == "assistant"]
    texts = [message["content"] for message in answers if message["content"].strip()]  # not of calls alone
    found = []
    if texts and is_question(question):
        is_closed = word_count(texts[0]) <= CLOSED_WORDS
        found.append("closed question" if is_closed else "open question")
    thinks = any(message.get("reasoning_content") or "<think>" in str(message["content"]) for message in answers)
    if thinks or STEPS.search(question[:LOOKED_AT]) or any(_calculates(text) for text in texts):
        found.append("reasoning")
    has_code = any("```" in str(message["content"]) for message in messages)
    if has_code or task_in(question) in ("code", "debug"):
        found.append("coding")
    if sum(message["role"] == "user" for message in messages) > 1:
        found.append("conversation")
    return found


def scripts_of(text: str) -> list[str]:
    """The scripts that a text is written in."""
    if text.isascii():
        return ["Latin"]
    return [name for name, letters in SCRIPTS.items() if re.search(f"[{letters}]", text)]


def _calculates(answer: str) -> bool:
    """Whether two or more lines calculate something."""
    lines = answer.split("\n")
    return sum(CALCULATION.search(line) is not None for line in lines) > 1
