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
    # Of an answer to a given prompt.
    "encoding": "the answer has broken characters",
    "template marks": "the answer holds marks of a chat template, or goes on as the user",
    "refusal": "the answer refuses what it was asked for",
    "placeholder": "the answer holds a placeholder such as [Name] or TODO, or speaks of itself as an AI",
    "prompt copied": "the answer repeats its prompt",
    "secret": "the answer seems to hold a key or password",
    "markup": "the answer has HTML entities",
    "cut off": "the answer seems to end inside of a sentence or a code block",
    "language": "the answer is in another language than its prompt",
    "words": "the answer has too few or too many words",
    "check": "the answer fails a check of its row",
    "no majority": "answers to the prompt come to different things, and no party is the largest",
    "not the best": "another answer to the prompt was better, or stood for the majority",
    "no critique": "the criticism of the answer is empty, or ended at --max-tokens",
    "skipped": "the person at the editor skipped it",
    "tools": "its prompt offers tools, and answers that call them are not made here",
    # Of a conversation that was to go on.
    "no user": "no user speaks in it",
    "long enough": "it has as many turns as are wanted, or more",
    "said before": "says nearly what was said before in the conversation",
    # Of a refusal.
    "no refusal": "the answer to a forbidden request does not refuse",
    "no neighbour": "the harmless request is no request, or is the forbidden one",
    # Of a question and its answer out of a document.
    "pointing": "speaks of the text, which nobody has who is asked",
    "short quote": "its quote is too short to show anything",
    "not quoted": "its quote is not in the text",
    "unfounded number": "the answer has a number that is neither in the text nor in the question",
    "unfounded name": "the answer has a name, or a German noun, that is neither in the text nor in the question",
    "unfounded": "most of the answer is neither in the text nor in the question",
    "known": "the engine answers it without the text as well (--closed)",
    "too many": "more were answered than --per-chunk asked for",
}
