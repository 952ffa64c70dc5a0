"""How a template ends an answer: the tokens that a model must produce to stop.

A worked example, Phi-3: behind the last answer it prints `<|end|>\\n<|endoftext|>`, between an answer and the next
question `<|end|>\\n<|user|>\\n`. Both begin with `<|end|>\\n`, so `<|end|>` is what ends a turn wherever it stands;
`<|endoftext|>` only ends the text.

The original Llama 3 always prints the next header as well, so that both begin with `<|eot_id|><|start_header_id|>`:
tokens that begin a message end none.

GLM prints nothing behind its last answer. Its models stop with the first token of the next header: `<|user|>` behind a
text and `<|observation|>` behind tool calls.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxtune.data.template.probes import ASSISTANT, MARKS, NEXT, USER, assistant, tool_call, tool_result, user
from mlxtune.data.template.texts import common_prefix, common_suffix

if TYPE_CHECKING:
    from mlxtune.data.template.template import Template


@dataclass(frozen=True)
class AnswerEnds:
    """What ends an answer."""

    stops: frozenset[str]  # the tokens that end an answer
    end_of_turn: str  # what the model must produce after its last answer: whitespace, and the end-of-turn token; or ""

    @staticmethod
    def of(template: Template) -> AnswerEnds:
        question, answer, next_question = user(USER), assistant(ASSISTANT), user(NEXT)
        behind_last = template.attempt([question, answer]).partition(ASSISTANT)[2]
        behind_answer = template.attempt([question, answer, next_question]).partition(ASSISTANT)[2]
        between = behind_answer.partition(NEXT)[0]  # an answer and the next question
        if between:
            shared = behind_last[: common_prefix(behind_last, between)]
            ends_of_both = _closing_tokens(template, shared)
            if ends_of_both:
                end = _preferred(template, ends_of_both)
                return AnswerEnds(frozenset({end.group()}), behind_last[: end.end()])
        stops = {_first_token(template, _without_next_header(template, between))}
        end_of_turn = ""
        ends_of_last = _closing_tokens(template, behind_last)
        if ends_of_last:
            end = _preferred(template, ends_of_last)
            stops.add(end.group())
            end_of_turn = behind_last[: end.end()]
        stops.discard("")
        if not stops:  # the next turn's header is what the model must produce to end its own
            stops = {_first_token(template, between)} - {""}
        return AnswerEnds(frozenset(stops), end_of_turn)


def _without_next_header(template: Template, between: str) -> str:
    """What stands between an answer and the next question, without the header of the question."""
    header, _, behind_question = template.attempt([user(USER)], prompt=True).partition(USER)
    if _first_token(template, behind_question) == _first_token(template, between):
        return between  # one token ends every message, the user's too: it is no part of a header
    return between[: len(between) - common_suffix(between, header)]


def _closing_tokens(template: Template, text: str) -> list[re.Match[str]]:
    """The special tokens in template text behind an answer, but for those that begin a message."""
    tokens = list(template.special.finditer(text))
    openers = _tokens_before_first_text(template)
    closers = [match for match in tokens if match.group() not in openers]
    return closers or tokens


def _preferred(template: Template, closers: list[re.Match[str]]) -> re.Match[str]:
    """Of several tokens behind an answer, the last that generation stops at; else the last."""
    for match in reversed(closers):
        if match.group() in template.named_ends:
            return match
    return closers[-1]


def _tokens_before_first_text(template: Template) -> set[str]:
    """The special tokens before the first text of a conversation: they open messages."""
    shown = template.attempt([{"role": "system", "content": NEXT}, user(USER)])
    if NEXT not in shown:  # the template takes no system message
        shown = template.attempt([user(USER)])
    return set(template.special.findall(MARKS.split(shown)[0]))


def _first_token(template: Template, text: str) -> str:
    """The first special token of a text; "" for none."""
    match = template.special.search(text)
    return match.group() if match else ""


def header_that_ends(template: Template, calls: bool) -> str:
    """The beginning of the header that follows an answer, up to and with its first special token; "" for none. calls:
    behind tool calls, else behind a text.
    """
    if calls:
        answer = assistant("", tool_calls=[tool_call({ASSISTANT: ASSISTANT})])
        following = tool_result(NEXT)
    else:
        answer = assistant(ASSISTANT)
        following = user(NEXT)
    shown = template.attempt([user(USER), answer, following])
    between = shown.rpartition(ASSISTANT)[2].partition(NEXT)[0]
    header_tokens = _tokens_behind_answers(template)
    for match in template.special.finditer(between):
        if match.group() in header_tokens:
            return match.group()
    return ""


def _tokens_behind_answers(template: Template) -> set[str]:
    """The special tokens that stand between an answer and the message of the roles that follow one."""
    tokens: set[str] = set()
    answers_and_followers = (
        (assistant(ASSISTANT), user(NEXT)),
        (assistant(ASSISTANT, tool_calls=[tool_call({})]), tool_result(NEXT)),
    )
    for answer, follower in answers_and_followers:
        shown = template.attempt([user(USER), answer, follower])
        alone = template.attempt([user(USER), answer])
        tokens |= set(template.special.findall(shown[common_prefix(shown, alone) :]))
    return tokens
