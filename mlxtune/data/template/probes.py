"""Probes: small conversations whose contents are marks, private-use characters that no template prints by itself.

What stands between marks in the rendering of a probe is the template's own text, so its forms are found without knowing
a family of models. For example (ChatML; U and A are the marks USER and ASSISTANT):

    probe      user U, assistant A
    rendering  <|im_start|>user\\nU<|im_end|>\\n<|im_start|>assistant\\nA<|im_end|>\\n
    found      an answer begins behind `<|im_start|>assistant\\n` and ends with `<|im_end|>`
"""

from __future__ import annotations

import re
from typing import Any

MARKS = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd]")  # Unicode's private use
USER, ASSISTANT, NEXT = "\ue000", "\ue001", "\ue002"  # the marks of probes: a question, its answer, a further text
CALL_ID = "call00001"  # nine letters or digits, as Mistral's templates demand


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tool_call(arguments: Any, call_id: str = CALL_ID) -> dict[str, Any]:
    """A call of the function f; arguments: an object, or JSON text of one."""
    return {"type": "function", "id": call_id, "function": {"name": "f", "arguments": arguments}}


def tool_result(content: str, call_id: str = CALL_ID) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "name": "f", "content": content}
