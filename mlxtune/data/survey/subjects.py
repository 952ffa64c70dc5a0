"""What a row is about: what its first question asks for, and the scripts that it is written in."""

from __future__ import annotations

import re

from mlxtune.data.rows.formats import Record

LOOKED_AT = 400  # characters of a question: what it asks for is said early
TASKS = {  # what a question asks for -> how it is said; the first one that fits counts
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
    """What the first question asks for: a name of TASKS, or "other"."""
    for message in record.messages or []:
        if message["role"] == "user":
            return _task_in(str(message["content"])[:LOOKED_AT])
    return "other"


def _task_in(question: str) -> str:
    for name, pattern in TASKS.items():
        if re.search(pattern, question, re.IGNORECASE):
            return name
    return "other"


def scripts_of(text: str) -> list[str]:
    """The scripts that a text is written in."""
    if text.isascii():
        return ["Latin"]
    return [name for name, letters in SCRIPTS.items() if re.search(f"[{letters}]", text)]
