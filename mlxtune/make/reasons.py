"""Why something that was made is not kept: a code, and what it means. `rejected.jsonl` has the codes."""

from __future__ import annotations

REASONS = {
    # Of any answer of an engine.
    "unparseable": "the answer has not the form that was asked for",
    "cut": "the answer ended at --max-tokens, in the middle of this",
    "failed": "the engine gave no answer for it",
    "guarded": "too near to a prompt of the suite that --avoid names",
    "duplicate": "made before, word for word",
    # Of an instruction.
    "too short": "has fewer words than --words allows",
    "too long": "has more words than --words allows",
    "first character": "begins with no letter and no digit",
    "blacklisted": "asks for what a text cannot give, such as a picture or a file (--no-blacklist keeps them)",
    "program": "begins with a request for a program, which engines make too many of",
    "near duplicate": "ROUGE-L above 0.7 to a seed, or to what was kept before",
    # Of an example of an instruction.
    "no instance": "no example of the instruction is left",
    "empty": "has no answer",
    "copied": "the answer says what the input says",
    "unfinished": "ends with a colon: what should follow is missing",
    "no input": "a label for nothing: the instruction classifies",
    "contradiction": "one input with two answers",
}
