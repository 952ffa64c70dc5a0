"""What was learnt about the templates of one tokenizer.

A `Template` learns its forms by rendering probes, and compiles its source: some tens of milliseconds. Whoever holds a
tokenizer for long (a Renderer, a loaded model) holds its `Templates` as well, so that this is done once.
"""

from __future__ import annotations

from datetime import date
from typing import Any

from mlxtune.data.template.template import Template


class Templates:
    """The templates of one tokenizer, by their source and their variables: a run may give it another template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._learnt: dict[str, Template] = {}

    def of(self, variables: dict[str, Any] | None = None, day: date | None = None) -> Template:
        """The template that the tokenizer has now.

        variables: what the template is given beside the messages (data.template_kwargs); day: what templates that print
        the date are given (None: today).
        """
        given = variables or {}
        key = f"{self.tokenizer.chat_template}{sorted(given.items())}{day}"
        if key not in self._learnt:
            self._learnt[key] = Template(self.tokenizer, given, day)
        return self._learnt[key]
