"""mlxtune data curate --review: a person looks at each row that would be kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from mlxtune_convert.shown import shown, shown_name

from mlxtune.cli import common

if TYPE_CHECKING:
    from rich.console import Console

    from mlxtune.make.curation.candidates import Candidate
    from mlxtune.make.curation.choosing import Chosen, Wanted
    from mlxtune.make.curation.curate import Curation
    from mlxtune.make.curation.decisions import Decision, Decisions

KEYS = "k keep   d drop   e edit the answer   u undo   q stop, and go on later"


class Stopped(Exception):
    """The person goes on later."""


class Undone(Exception):
    """The last decision was taken back: what follows from it is chosen again."""


def chosen(out: Console, curation: Curation, wanted: Wanted, file: Path) -> Chosen | None:
    """The rows that a person keeps; None where the person stopped. file: of the decisions, each on the disk at once."""
    from mlxtune.make.curation.decisions import Decisions

    file.parent.mkdir(parents=True, exist_ok=True)
    decisions = Decisions(file)
    if decisions.made:
        common.note(f"{file}: {len(decisions.made)} rows were decided before")
    while True:
        review = _Review(out, curation, wanted, decisions)
        try:
            return curation.chosen(wanted, review.accept)
        except Undone:
            continue
        except Stopped:
            out.print(f"{review.kept} of {wanted.keep} kept. The same command goes on.", soft_wrap=True)
            return None


class _Review:
    """One way through the rows; those that were decided before are not shown."""

    def __init__(self, out: Console, curation: Curation, wanted: Wanted, decisions: Decisions) -> None:
        self.out = out
        self.curation = curation
        self.wanted = wanted
        self.decisions = decisions
        self.kept = 0

    def accept(self, candidate: Candidate) -> Candidate | None:
        """What the person says of a row. Raises Stopped and Undone."""
        if candidate.key not in self.decisions.made:
            decision = self._asked(candidate)
            self.decisions.decide(candidate.key, decision)
        kept = self.decisions.made[candidate.key].applied(candidate)
        self.kept += kept is not None
        return kept

    def _asked(self, candidate: Candidate) -> Decision:
        from mlxtune.make.curation.decisions import Decision

        self._show(candidate)
        while True:
            self.out.print(KEYS, style="dim", markup=False, soft_wrap=True)
            typed = _typed()
            if typed == "q":
                raise Stopped
            if typed == "u":
                if self.decisions.undo() is not None:
                    raise Undone
                self.out.print("There is nothing to take back.")
            elif typed == "k":
                return Decision("keep")
            elif typed == "d":
                return Decision("drop")
            elif typed == "e" and not candidate.messages[-1].get("content"):
                self.out.print("It only calls tools: edit the file instead.")
            elif typed == "e":
                answer = _edited(candidate.answer)
                if answer:
                    return Decision("edit", answer)
                self.out.print("The answer is as it was.")

    def _show(self, candidate: Candidate) -> None:
        from rich.rule import Rule
        from rich.text import Text

        title = f"{self.kept + 1} of {self.wanted.keep}: {candidate.kind}{self._scores(candidate)}"
        self.out.print(Rule(shown_name(title)))
        for message in candidate.messages[:-1]:
            self.out.print(Text(f"{shown_name(message['role'])}:", style="bold"))
            self.out.print(Text(shown(str(message.get("content") or "")), style="dim"))
        self.out.print(Text("Answer:", style="bold cyan"))
        self.out.print(Text(shown(candidate.answer)))

    def _scores(self, candidate: Candidate) -> str:
        losses = self.curation.losses.get(candidate.key)
        rating = self.curation.ratings.get(candidate.key)
        text = f", IFD {losses.ifd:.2f}" if losses is not None else ""
        text += f", rated {rating:.1f} of 5" if rating is not None else ""
        return text + "".join(f", {fault}" for fault in candidate.faults)


def _typed() -> str:
    """What the person types; "q" at the end of input and for Ctrl-C."""
    try:
        return input("> ").strip().lower()
    except (EOFError, KeyboardInterrupt):
        click.echo()
        return "q"


def _edited(answer: str) -> str:
    """The answer as the person's editor ($VISUAL, $EDITOR) gives it back; "" where it is the same, or nothing."""
    text = click.edit(answer)
    if text is None:
        return ""
    text = text.strip()
    return "" if text == answer.strip() else text
