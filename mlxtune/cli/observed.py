"""How what went wrong with the answers is said on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlxtune_convert.shown import shown_name

if TYPE_CHECKING:
    from rich.console import Console


def draw(out: Console, observations: Sequence[Mapping[str, Any]]) -> None:
    """Print each observation with what was measured, its threshold and what is likely to help; nothing for none."""
    from rich.text import Text

    for one in observations:
        out.print(Text(f"Observed: {one['observation']}", style="bold yellow"))
        out.print(Text(f"  {shown_name(one['measure'])} (said from: {one['limit']})"), soft_wrap=True)
        if one["examples"]:
            out.print(Text(f"  prompts: {shown_name(', '.join(one['examples']))}"), soft_wrap=True)
        out.print(Text(f"  likely fix: {shown_name(one['fix'])}"), soft_wrap=True)
