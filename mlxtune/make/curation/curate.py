"""The act: candidates read, scored, chosen and written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxtune_convert.files import json_text, new_file

from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.writers import to_messages
from mlxtune.data.survey.subjects import is_english
from mlxtune.errors import UserError
from mlxtune.make.curation import candidates as reading
from mlxtune.make.curation.candidates import Candidate
from mlxtune.make.curation.choosing import Accept, Chosen, Wanted, choose
from mlxtune.make.curation.figures import KINDS, LOOKED_AT, figures
from mlxtune.make.curation.losses import Losses
from mlxtune.make.curation.quality import fatal, penalty, qualities
from mlxtune.make.curation.scores_file import ScoresFile
from mlxtune.make.curation.strangers import AT_LEAST, NO_LIKELIER, border, strangers

if TYPE_CHECKING:
    from mlxtune.make.curation.ifd import Scorer


@dataclass
class Curation:
    """Rows on their way to a few of them."""

    # That were read.
    files: Sequence[Path]
    # Their rows that end with an answer, equal ones once.
    candidates: list[Candidate]
    # Rows that are no candidates, by the reason, a key of `choosing.REASONS`.
    others: dict[str, list[Record]]
    # Of each candidate that a model scored, by its key; None: it gives no score.
    losses: dict[str, Losses | None] = field(default_factory=dict)
    # The IFD above which a question explains no more than another row's does; None: it is not known.
    border: float | None = None
    # Of each candidate that a judge rated, by its key, 1 to 5; None: its reply could not be read.
    ratings: dict[str, float | None] = field(default_factory=dict)
    # What a person must know.
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, files: Sequence[Path], columns: Mapping[str, str]) -> Curation:
        """Raises UserError as `candidates.read`, and where no row can be chosen."""
        candidates, others = reading.read(files, columns)
        if not candidates:
            raise UserError(f"{files[0]}: no row ends with an answer", "Curation chooses by questions and answers.")
        return cls(files, candidates, others)

    def score(self, scorer: Scorer, kept: ScoresFile, told: Callable[[int, int], None]) -> None:
        """Take the loss of every candidate, and of rows that show where the border lies. told: how many are done, of
        how many.
        """
        made = strangers(self.candidates)
        wanted = {one.key: one for one in (*self.candidates, *made)}
        waiting = [one for key, one in wanted.items() if key not in kept.known]
        keys = {id(one.record): one.key for one in waiting}
        found = len(wanted) - len(waiting)
        if before := sum(one.key in kept.known for one in self.candidates):
            self.notes.append(f"{kept.path}: {before:,} rows were scored before")

        def done(records: Sequence[Record], losses: Sequence[Losses | None]) -> None:
            nonlocal found
            kept.keep({keys[id(record)]: one for record, one in zip(records, losses, strict=True)})
            found += len(records)
            told(found, len(wanted))

        scorer.losses([one.record for one in waiting], done)
        self.losses = {one.key: kept.known[one.key] for one in self.candidates}
        self.border = border(kept.known[one.key] for one in made)

    def is_explained(self, losses: Losses) -> bool:
        """Whether a row's question is known to explain its answer: without a border none is."""
        return self.border is not None and losses.ifd <= self.border

    def score_of(self, candidate: Candidate) -> float | None:
        """More is better: the judge's rating; without a judge what the question explains (`_explained`); without a
        model either, the same for all. None: it has none.
        """
        if self.ratings:
            return self.ratings[candidate.key]
        if self.losses:
            losses = self.losses[candidate.key]
            return None if losses is None else self._explained(candidate, losses)
        return 0.0

    def _explained(self, candidate: Candidate, losses: Losses) -> float:
        """Rows that their question explains are as good as each other: from 0 to 1 by their hash, which is by chance,
        but the same each time and wherever they stand in their files. The others are worse, the more IFD they have; so
        are all rows where there is no border.
        """
        if not self.is_explained(losses):
            return -losses.ifd
        return int(candidate.key, 16) / 2**64

    def chosen(self, wanted: Wanted, accept: Accept) -> Chosen:
        """The rows to keep, and why the others do not stay. Raises whatever `accept` does."""
        reasons: dict[str, str] = {}
        sound: list[Candidate] = []
        for candidate in self.candidates:
            reasons[candidate.key] = self._reason_against(candidate)
            if not reasons[candidate.key]:
                sound.append(candidate)
        scores = {one.key: self.score_of(one) or 0.0 for one in sound}
        chosen = choose(sound, qualities(sound, scores), wanted, accept)
        chosen.reasons |= {key: reason for key, reason in reasons.items() if reason}
        return chosen

    def _reason_against(self, candidate: Candidate) -> str:
        """Why a candidate cannot be chosen whatever the others are; "" where it can."""
        if fatal(candidate):
            return "faulty"
        losses = self.losses.get(candidate.key)
        if self.losses and losses is None:
            return "unscored"
        if self.score_of(candidate) is None:
            return "unrated"
        return "unexplained" if losses is not None and losses.ifd > NO_LIKELIER else ""

    def report(self, chosen: Chosen, wanted: Wanted) -> dict[str, Any]:
        """What there was, what is kept, why the others are not, and what a person should know of it."""
        counts = Counter({reason: len(records) for reason, records in self.others.items() if records})
        counts.update(chosen.reasons.values())
        sample = min(LOOKED_AT, len(chosen.kept))
        notes = list(self.notes)
        if len(chosen.kept) < wanted.keep:
            notes.append(
                f"{len(chosen.kept):,} rows are kept, not {wanted.keep:,}: no others are good and unlike these"
            )
        if self.losses and not self.ratings and self.border is None:
            notes.append(
                f"IFD orders the rows, the smallest first: fewer than {AT_LEAST} of them have a score with another "
                "row's answer, too few to measure a border"
            )
        if worse := sum(one.key in chosen.below and self._may_be_worse(one) for one in chosen.kept):
            notes.append(f"{worse:,} of the rows are among the worse ones of their kind: others were not enough")
        if unexplained := self._unexplained(chosen.kept):
            notes.append(
                f"{unexplained:,} of the rows are explained no better by their own question than by another row's (IFD "
                f"above {self.border:.2f}): others of their kind were not enough"
            )
        kinds = {one.kind for one in chosen.kept}
        in_english = sum(is_english(one.question) for one in chosen.kept)  # of others the kind is not told
        if len(kinds) < KINDS and in_english * 2 > len(chosen.kept):
            notes.append(
                f"only {len(kinds)} kinds of instruction ({', '.join(sorted(kinds))}): from {KINDS} on a set teaches "
                "more than one thing"
            )
        return {
            "before": figures(self.candidates, self.losses, sample),
            "after": figures(chosen.kept, self.losses, sample) if chosen.kept else {"rows": 0},
            "left_out": dict(counts.most_common()),
            "border": self.border,
            "notes": notes,
        }

    def _may_be_worse(self, kept: Candidate) -> bool:
        """Whether a row below the bar is there for what it is: of rows that their question explains, chance says which
        are, but for those with faults.
        """
        losses = self.losses.get(kept.key)
        by_chance = not self.ratings and losses is not None and self.is_explained(losses)
        return not by_chance or penalty(kept) > 0

    def _unexplained(self, kept: Sequence[Candidate]) -> int:
        """How many of the rows chosen by their losses are above the border; 0 where there is none."""
        if self.border is None or self.ratings:
            return 0
        found = [self.losses[one.key] for one in kept]
        return sum(losses is not None and not self.is_explained(losses) for losses in found)

    def write(self, chosen: Chosen, out: Path, left_out: Path | None, force: bool) -> None:
        """The kept rows, in the order of the files, so that none of a kind stand together by their choice; and the
        others, with why. Where no row is kept, `out` stays as it is: no file of no rows.
        """
        order = {one.key: place for place, one in enumerate(self.candidates)}
        if chosen.kept:
            with new_file(out, force, self.files) as file:
                for candidate in sorted(chosen.kept, key=lambda one: order[one.key]):
                    file.write(json_text(self._row(candidate), default=str) + "\n")
        if left_out is None:
            return
        with new_file(left_out, force, self.files) as file:
            for reason, records in self.others.items():
                for record in records:
                    row = {**record.fields, **to_messages(record), "reason": reason, "from": _place(record)}
                    file.write(json_text(row, default=str) + "\n")
            for candidate in self.candidates:
                if candidate.key in chosen.reasons:
                    row = {**self._row(candidate), "reason": chosen.reasons[candidate.key]}
                    file.write(json_text(row, default=str) + "\n")

    def _row(self, candidate: Candidate) -> dict[str, Any]:
        """A row as it is written: its own columns, and what it was chosen by."""
        scores: dict[str, Any] = {}
        losses = self.losses.get(candidate.key)
        if losses is not None:
            scores["ifd"] = round(losses.ifd, 6)
        if self.ratings:
            scores["rating"] = self.ratings[candidate.key]
        curated = {"from": _place(candidate.record), "kind": candidate.kind, "scores": scores}
        if candidate.faults:
            curated["faults"] = list(candidate.faults)
        return {**candidate.record.fields, **to_messages(candidate.record), "curated": curated}


def _place(record: Record) -> str:
    return f"{record.file} {record.place}"
