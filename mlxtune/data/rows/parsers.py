"""One raw row of each format -> the conversations or texts in it.

Each parser takes a row, column -> value, and returns what it holds; nearly every row holds one conversation. It raises
RowError, whose words say which column or turn is wrong and what it must be.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from mlxtune.data.rows import human_assistant
from mlxtune.data.rows.messages import checked
from mlxtune.data.rows.sides import Side
from mlxtune.data.rows.tool_calls import arguments_of
from mlxtune.data.rows.tool_schemas import tools_of
from mlxtune.data.rows.values import RowError, from_json, listed, text_of

SHAREGPT_ROLES = {  # who speaks in ShareGPT -> the role of OpenAI's messages
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}


class Parsed(NamedTuple):
    """One conversation or text of a row: exactly one of `messages` and `text` is set."""

    messages: list[dict[str, Any]] | None = None  # OpenAI messages
    tools: list[dict[str, Any]] | None = None  # in OpenAI's form
    text: str | None = None  # trained on as it stands
    side: Side = Side.NONE  # what was said of its answer
    prompt: int = 0  # how many of the messages are those that the answer answers, where the row tells them apart
    teaches_nothing: str = ""  # why nothing can be learnt from it, though it can be read; "" for nearly all
    may_be_rated: bool = False  # its label may be a rating or a class: nobody said that labels are ratings


def openai(row: dict[str, Any]) -> list[Parsed]:
    """OpenAI: {"messages": [{"role": "user", "content": "Hi"}, ...], "tools": [...]}"""
    return conversation(row, checked(row.get("messages"), "messages"))


def sharegpt(row: dict[str, Any]) -> list[Parsed]:
    """ShareGPT: {"conversations": [{"from": "human", "value": "Hi"}, ...], "tools": "[...]"}; some write OpenAI's
    messages under this name.
    """
    turns = listed(row.get("conversations"), "conversations must be a non-empty list of turns")
    if not all(isinstance(turn, dict) and "role" in turn for turn in turns):
        turns = from_sharegpt(turns)
    return conversation(row, checked(turns, "conversations"))


def alpaca(row: dict[str, Any]) -> list[Parsed]:
    """Alpaca: {"instruction": "Translate", "input": "cat", "output": "chat"}; some write response for output."""
    answer_column = "response" if row.get("response") is not None else "output"
    answer = text_of(row, answer_column)
    return instructed(row, text_of(row, "input", optional=True), answer)


def self_instruct(row: dict[str, Any]) -> list[Parsed]:
    """Self-Instruct: {"instruction": "Translate", "instances": [{"input": "cat", "output": "chat"}, ...]}; each
    instance is a conversation.
    """
    what = "instances must be a non-empty list of objects with input and output"
    instances = listed(row.get("instances"), what)
    if any(not isinstance(instance, dict) for instance in instances):
        raise RowError(what)
    pairs = [(text_of(instance, "input", optional=True), text_of(instance, "output")) for instance in instances]
    out: list[Parsed] = []
    for given, answer in pairs:
        out += instructed(row, given, answer)
    return out


def prompt_completion(row: dict[str, Any]) -> list[Parsed]:
    """{"prompt": "Hi", "completion": "Hello"}; both may be lists of messages.

    Texts may have Anthropic's form, as those of pairs: "\\n\\nHuman: Hi\\n\\nAssistant:" and " Hello".
    """
    if isinstance(row.get("prompt"), list):
        prompt, completion = checked(row["prompt"], "prompt"), checked(row.get("completion"), "completion")
    else:
        asked, answer = text_of(row, "prompt"), text_of(row, "completion")
        prompt = human_assistant.asked(asked)
        completion = human_assistant.answered(answer)
        is_of_speakers = bool(prompt) and prompt[-1]["role"] == "user" and completion[0]["role"] == "assistant"
        if not is_of_speakers:
            prompt = [{"role": "user", "content": asked}]
            completion = [{"role": "assistant", "content": answer}]
    (whole,) = conversation(row, [*prompt, *completion])
    return [whole._replace(prompt=len(whole.messages or []) - len(completion))]


def without_weight(message: dict[str, Any]) -> dict[str, Any]:
    """The message as context: an answer that is not trained."""
    return {**message, "weight": 0} if message["role"] == "assistant" else message


def plain_text(row: dict[str, Any]) -> list[Parsed]:
    """{"text": "Once upon a time"}"""
    return [Parsed(text=text_of(row, "text"))]


def conversation(row: dict[str, Any], messages: list[dict[str, Any]]) -> list[Parsed]:
    """A conversation with the row's `system` column, as the first turn where it has none, and its tools."""
    system = text_of(row, "system", optional=True)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return [Parsed(messages, tools_of(row))]


def instructed(row: dict[str, Any], given: str, answer: str) -> list[Parsed]:
    """As a chat: the instruction, then the input after a blank line, as Alpaca's own prompt orders them.

    given: the input, "" for none.
    """
    instruction = text_of(row, "instruction")
    question = {"role": "user", "content": instruction}
    if given:
        question["content"] = f"{instruction}\n\n{given}"
        question |= {"instruction": instruction, "input": given}  # for templates that print them apart
    earlier = row.get("history") or []
    if not isinstance(earlier, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in earlier):
        raise RowError("history must be a list of [question, answer] pairs")
    turns: list[dict[str, Any]] = []
    for earlier_question, earlier_answer in earlier:
        turns.append({"role": "user", "content": earlier_question})
        turns.append({"role": "assistant", "content": earlier_answer})
    turns += [question, {"role": "assistant", "content": answer}]
    return conversation(row, checked(turns, "history"))


# ShareGPT.


def from_sharegpt(turns: list[Any]) -> list[dict[str, Any]]:
    """OpenAI messages. What the assistant does without another speaking in between is one message: calls that follow
    one another, and a text before them. Observations answer the calls before them, in order. For example

        human "?", gpt "Let me look.", function_call {f}, function_call {g}, observation "1", observation "2"

    is a user's message, one of the assistant with that text and the calls f and g, and two of tools, for f and for g.
    """
    messages: list[dict[str, Any]] = []
    has_calls = any(isinstance(turn, dict) and turn.get("from") == "function_call" for turn in turns)
    unanswered: list[str] = []  # ids of calls without an observation so far
    for index, turn in enumerate(turns, 1):
        speaker = _speaker_of(index, turn)
        role = SHAREGPT_ROLES[speaker]
        others = {key: value for key, value in turn.items() if key not in ("from", "value") and value is not None}
        message = {**others, "role": role, "content": turn["value"]}
        if speaker == "function_call":
            calls = _sharegpt_calls(index, turn["value"])
            unanswered += [call["id"] for call in calls]
            if messages and _is_one_turn(messages[-1], others):
                messages[-1]["tool_calls"] = [*messages[-1].get("tool_calls", []), *calls]
                continue
            message["content"] = ""
            message["tool_calls"] = calls
        elif role == "tool":
            if has_calls and not unanswered:
                raise RowError(f"turn {index} ({speaker}) answers no call: each function_call has one already")
            message["tool_call_id"] = unanswered.pop(0) if unanswered else f"call{index:05d}"
        elif role != "assistant":
            unanswered = []  # a call that was passed over gets no later observation
        messages.append(message)
    return messages


def _speaker_of(index: int, turn: Any) -> str:
    """Who speaks in a turn that has text. index: of the turn, from 1."""
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise RowError(f"turn {index} is from {speaker!r}; allowed: {', '.join(SHAREGPT_ROLES)}")
    if not isinstance(turn.get("value"), str):
        raise RowError(f"turn {index} ({speaker}) must have text as its value")
    return speaker


def _is_one_turn(before: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether calls belong to the message before them; others: what else their turn has, such as a weight."""
    others_before = {key: value for key, value in before.items() if key not in ("role", "content", "tool_calls")}
    return before["role"] == "assistant" and others_before == others


def _sharegpt_calls(index: int, value: str) -> list[dict[str, Any]]:
    """The tool calls of one turn, as OpenAI writes them; value: a JSON object, or a list of them."""
    wrong = f"turn {index}: a function_call must be a JSON object with name and arguments"
    found = from_json(value, wrong)
    functions = found if isinstance(found, list) else [found]
    if any(not isinstance(function, dict) or not isinstance(function.get("name"), str) for function in functions):
        raise RowError(wrong)
    calls = []
    for at, function in enumerate(functions):
        arguments = arguments_of(function, f"turn {index}")
        call_id = f"call{index:03d}{at:02d}"  # nine letters: Mistral wants them
        calls.append({"id": call_id, "function": {"name": function["name"], "arguments": arguments}})
    return calls
