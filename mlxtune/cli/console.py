"""Where the commands print: rich's console, that obeys no text of other people."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mlxtune_convert.shown import shown, shown_name
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

if TYPE_CHECKING:
    from rich.style import StyleType


class SafeConsole(Console):
    """A rich console that obeys its own styles, and nothing in the texts that it prints."""

    def print(self, *objects: Any, style: StyleType | None = None, **how: Any) -> None:
        """A str is one line: a line break in it came with a name or a reason, and is shown as any other control
        character. What has several lines is a Text.
        """
        # rich itself would leave a carriage return and its like out of a text without a word.
        super().print(*(shown_name(item) if isinstance(item, str) else item for item in objects), style=style, **how)

    def status(self, status: RenderableType, **how: Any) -> Status:
        """A str is one line. (rich would read a str as its markup, though this console reads none.)"""
        return super().status(Text(shown_name(status)) if isinstance(status, str) else status, **how)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(self._written(shown(segment.text)), segment.style)

    def _written(self, text: str) -> str:
        """The text with what the stream cannot write by its number: another locale than UTF-8 ends no command."""
        if self.encoding.startswith("utf"):
            return text
        return text.encode(self.encoding, "backslashreplace").decode(self.encoding)


def console(**settings: Any) -> SafeConsole:
    """A console without rich's markup: a row may hold [bold]."""
    if os.environ.get("TERM", "").lower() in ("dumb", "unknown"):  # of which rich takes 80 columns for granted
        size = shutil.get_terminal_size()
        settings = {"width": size.columns, "height": size.lines, **settings}
    return SafeConsole(highlight=False, emoji=False, markup=False, **settings)
