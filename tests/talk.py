"""More chat templates of our own writing: families whose answers have thoughts, and one that wants no system prompt."""

from __future__ import annotations

from typing import Any

import masks

# In the manner of Qwen 3.5: the prompt opens the thought; earlier thoughts are stripped, the last answer has one.
OPENED = """
{%- set ns = namespace(asked=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.asked %}
        {{- '<think>\\n' + (m.reasoning_content or '') | trim + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- m.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '<think>\\n') }}
{%- endif %}"""

# In the manner of Gemma 4: thoughts have a channel, which is printed before tool calls alone, and stripped elsewhere.
CHANNEL = """
{{- bos_token }}
{%- for m in messages %}
    {{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
    {%- if m.reasoning and m.tool_calls %}{{- '<|channel>thought\\n' + m.reasoning + '\\n<channel|>' }}{%- endif %}
    {%- for call in m.tool_calls or [] %}{{- '<|tool_call>' + call.function.name + '<tool_call|>' }}{%- endfor %}
    {{- m.content.split('<channel|>')[-1] | trim + '<turn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn>model\\n' }}{%- endif %}"""

# In the manner of Gemma 1 and 2: no system prompt, turns alternate.
STRICT = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Roles must alternate') }}{%- endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
    {{- m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

OWN: dict[str, tuple[str, str, str, str | None]] = {  # name: (template, special tokens, end token, beginning token)
    "opened": (OPENED, *masks.FAMILIES["qwen"]),
    "channel": (CHANNEL, *masks.FAMILIES["gemma"]),
    "strict": (STRICT, "<bos> <eos> <start_of_turn> <end_of_turn>", "<end_of_turn>", "<bos>"),
}


def tokenizer_for(name: str) -> Any:
    """One of these, or of masks.FAMILIES."""
    if name not in OWN:
        return masks.family(name)
    template, special, eos, bos = OWN[name]
    return masks.with_template(masks.byte_tokenizer(special.split()), template, eos, bos)
