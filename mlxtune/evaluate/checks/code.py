"""A check that runs the program of an answer, in the sandbox."""

from __future__ import annotations

import re

from mlxtune.evaluate.checks.arguments import Arguments, CheckError, Kind, Place
from mlxtune.evaluate.checks.blocks import blocks_in
from mlxtune.evaluate.checks.check import Rule, Score, SuiteRow
from mlxtune.evaluate.checks.sandbox.sandbox import SECONDS
from mlxtune.evaluate.engines.request import Answer

MOST_SECONDS = 60.0  # that a suite may ask for
PYTHON = ("python", "python3", "py", "")  # languages of a fenced block that is taken for Python
ALLOW = "Allow it with --run-code: programs then run in a sandbox."
# Where a model goes on behind the function that it had to complete: what stands at the left edge of a line.
_NEXT = re.compile(r"^(?:def |class |if |print|@|#|assert |```)", re.MULTILINE)


def program_of(text: str, prompt: str = "", entry: str = "") -> str:
    """The program of an answer.

    prompt: its beginning, which the answer completes, as in HumanEval; entry: the function that must be in it. An
    answer that defines it is put behind the prompt, of which it may need the imports; another one is the prompt's rest.
    """
    blocks = [block.text for block in blocks_in(text) if block.language.lower() in PYTHON]
    defining = [block for block in blocks if _defines(block, entry)]
    if defining and entry:
        code = defining[-1]
    elif blocks:
        code = "\n".join(blocks)
    else:
        code = text
    if not prompt:
        return code
    if _defines(code, entry):
        return f"{prompt}\n{code}"
    end = _NEXT.search(code)
    return prompt + (code[: end.start()] if end else code)


def _defines(code: str, entry: str) -> bool:
    """Whether a function of that name is defined at the left edge; "" for any."""
    name = re.escape(entry) if entry else r"\w+"
    return re.search(rf"^(?:async )?(?:def|class) {name}\b", code, re.MULTILINE) is not None


def _code(arguments: Arguments, place: Place) -> Rule:
    """The answer's Python program passes the tests, a text with assertions, within `seconds`. Python's own library is
    there. The tests run in a process of their own: they can call what the program defines, with plain data.
    """
    tests = arguments.text("code")
    entry, prompt = arguments.text("entry", ""), arguments.text("prompt", "")
    seconds = arguments.number("seconds", SECONDS, 0.1, MOST_SECONDS)
    try:
        compile(tests, "tests", "exec")
    except (SyntaxError, ValueError) as error:
        raise CheckError(f"the tests of code are no Python ({error})") from error
    if not re.search(r"\b(?:assert|raise)\b", tests):
        raise CheckError("the tests of code assert nothing: every program would pass", "Write: assert add(1, 2) == 3")
    if not place.programs.allowed:
        raise CheckError("the check code runs programs that a model wrote", ALLOW)
    sandbox = place.programs.sandbox()

    def judge(answer: Answer, row: SuiteRow) -> Score:
        program = program_of(answer.text, prompt, entry)
        return float(sandbox.run(program, tests, seconds).passed)

    return Rule(judge)


KINDS = {"code": Kind(_code, ("entry", "prompt", "seconds"))}
