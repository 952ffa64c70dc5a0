"""How much of the template text behind a turn the model must produce."""

from __future__ import annotations

from mlxtune.data.template.template import Template
from mlxtune.data.template.texts import common_prefix


def up_to_end_token(template: Template, closing: str, closing_alone: str) -> int:
    """How many characters of `closing`, the template text behind a turn, go up to and with its end-of-turn token.

    closing_alone: what the template prints behind the turn when nothing follows it. It decides where none of the
    tokens that end an answer is in `closing`: behind tool calls, say, which others end. For example

        gpt-oss   closing         `"}<|call|><|start|>functions.f to=assistant...`
                  closing_alone   `"}<|call|>`                            the model produces `"}<|call|>`
        GLM       closing         `</tool_call><|observation|>\\n...`
                  closing_alone   `</tool_call>`                          `</tool_call><|observation|>`

    GLM's turns have no end token: its model stops with the first token of the next header.
    """
    for match in template.special.finditer(closing):
        if match.group() in template.stops:
            return match.end()
    shared = closing[: common_prefix(closing, closing_alone)]
    if shared == closing_alone:
        end = len(closing_alone.rstrip())
    else:  # only whole tokens of what both begin with
        end = max((match.end() for match in template.special.finditer(shared)), default=0)
    if not template.stops_at_headers:
        return end
    header = template.special.match(closing, end)
    if header is None or template.request.startswith(header.group()):
        return end
    return header.end()
