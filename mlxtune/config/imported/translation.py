"""What became of another program's configuration, and how it is written down."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mlxtune_convert.shown import brief, shown_name

from mlxtune.config.resolve import Config, load
from mlxtune.config.yaml_text import write_yaml

WIDTH = 100  # columns of a comment


@dataclass
class Translation:
    """The settings of ours that mean what the other file means, and all that they do not say."""

    program: str  # whose configuration it was: "mlx-lm"
    source: str  # the file that was read
    settings: dict[str, Any] = field(default_factory=dict)  # section.key -> value
    origins: dict[str, list[str]] = field(default_factory=dict)  # section.key -> what it was made of, a sentence each
    changed: list[str] = field(default_factory=list)  # what means something else now, a sentence each
    without: list[tuple[str, str]] = field(default_factory=list)  # (a key of theirs, why it has no counterpart)
    next: list[str] = field(default_factory=list)  # commands that take the place of a setting

    def set(self, key: str, value: Any, *origin: str) -> None:
        """Give one of our keys its value, in place of one that it has. origin: what it was made of."""
        self.settings[key] = value
        self.origins[key] = list(origin)

    def change(self, text: str) -> None:
        """Note something that means something else now."""
        self.changed.append(text)

    def leave_out(self, name: str, why: str) -> None:
        """Note a key of theirs that has no counterpart."""
        self.without.append((name, why))

    def config(self) -> Config:
        """Our configuration. Raises UserError for a value that we refuse."""
        return load(None, (), self.settings)

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        left_out = [{"key": name, "why": why} for name, why in self.without]
        said = {"changed": self.changed, "without_counterpart": left_out, "next": self.next}
        return {"program": self.program, "settings": self.settings, **said}

    def to_yaml(self) -> str:
        """A file for `train -c`: first what a person must know, then the settings, each below what it was made of."""
        lines = [*_comment(f"Made of {self.program}'s {self.source} by mlxtune import-config.")]
        lines += _block("What means something else here", self.changed)
        lines += _block("What has no counterpart", [f"{name}: {why}" for name, why in self.without])
        lines += _block("Next", self.next)
        for section in Config.model_fields:
            keys = [key for key in self.settings if key.partition(".")[0] == section]
            if keys:
                lines += ["", f"{section}:"]
            for key in keys:
                for text in self.origins[key]:
                    lines += [f"  {line}" for line in _comment(text, WIDTH - 2)]
                written = write_yaml({key.partition(".")[2]: self.settings[key]}).rstrip("\n")
                lines += textwrap.indent(written, "  ").split("\n")
        return "\n".join(lines) + "\n"


def _block(title: str, texts: list[str]) -> list[str]:
    """Comment lines: a title and its items; none where there are no items."""
    if not texts:
        return []
    lines = ["#", f"# {title}:"]
    for text in texts:
        first, *others = _comment(text, WIDTH - 2)
        lines += [f"# - {first.removeprefix('# ')}", *(f"#   {line.removeprefix('# ')}" for line in others)]
    return lines


def _comment(text: str, width: int = WIDTH) -> Iterator[str]:
    """A text as comment lines. What came from the other file may hold a line break, behind which it would be no comment
    any more: it is shown by its number.
    """
    for line in textwrap.wrap(brief(shown_name(text)), width - 2, break_long_words=False, break_on_hyphens=False):
        yield f"# {line}"
