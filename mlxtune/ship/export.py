"""The act: an artefact is written under a temporary name, proven, and only then given its name.

    refuse      what this form cannot hold, before anything is written
    write       the files, into a temporary folder
    prove       run by the program that will use them, and compared with the trained model (`verify`);
                where that program is not installed, read back tensor by tensor
    name        the temporary folder is renamed; whatever failed before leaves nothing behind

The forms are in `artefacts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune_convert.files import explained, new_artefact, new_folder
from mlxtune_convert.sizes import size

from mlxtune.data.chat.masking import Example
from mlxtune.errors import UserError
from mlxtune.ship import artefacts, differences, verify
from mlxtune.ship.artefacts import Artefact
from mlxtune.ship.differences import Trained
from mlxtune.ship.merge import Progress
from mlxtune.ship.request import MergedModel, Request
from mlxtune.ship.runners import require_memory
from mlxtune.ship.verify import ANOTHER_BASE, Proof, ReadBack, Report, digest_of


@dataclass(frozen=True)
class Shipped:
    """What came of it."""

    what: str  # the form, for people: "gguf q8_0"
    proof: Proof | None  # None: none was asked for
    notes: list[str]  # what a person must know
    bytes: int | None = None  # of its file; None: it is a folder

    def to_json(self) -> dict[str, Any]:
        """For programs. proof: as verification.json has it; null: none was asked for."""
        proof = None if self.proof is None else self.proof.to_json()
        return {"what": self.what, "bytes": self.bytes, "proof": proof, "notes": self.notes}

    def line(self) -> str:
        """Form, size and proof, for people."""
        parts = [self.what]
        if self.bytes is not None:
            parts.append(size(self.bytes))
        if self.proof is not None:
            parts.append(self.proof.line())
        return ", ".join(parts)


def ship(request: Request, artefact: Artefact, progress: Progress | None = None) -> Shipped:
    """Make an artefact of a trained model at `request.out`. progress: hears how many weights are written.

    Raises UserError for anything wrong with the request, and when the proof fails; nothing is kept then.
    """
    model = MergedModel(request)
    artefact.refuse(model)
    if request.examples is not None and artefact.is_run_dense() and not artefact.not_installed():
        require_memory(model.facts.count)
    with _temporary_place(request, artefact) as work:
        notes = artefact.write(model, work, progress)
        proof = None
        if request.examples is not None:
            proof, remarks = _proven(artefact, model, request.examples, work)
            notes += remarks
        file_bytes = (work / artefact.file).stat().st_size if artefact.file else None
        return Shipped(artefact.label(model), proof, notes, file_bytes)


def _temporary_place(request: Request, artefact: Artefact) -> AbstractContextManager[Path]:
    """A folder whose contents get their name at the end, if nothing fails."""
    if artefact.file:
        return new_artefact(request.out, artefact.file, request.force, request.sources)
    return new_folder(request.out, request.force, request.sources)


def _proven(artefact: Artefact, model: MergedModel, examples: Sequence[Example], work: Path) -> tuple[Proof, list[str]]:
    """(The proof of what is in `work`, written beside it; what a person must know). Raises UserError when it fails."""
    request = model.request
    missing = artefact.not_installed()
    if missing:
        read_back = ReadBack(artefact.read_back(model, work), missing, adapter=digest_of(request.adapter))
        read_back.write(work)
        return read_back, []
    ref = verify.reference(str(request.model), request.adapter, examples)
    # On another base than the trained one the difference is that of the bases: it is measured, and not judged.
    storage = artefact.storage(model) if request.base is None else ANOTHER_BASE
    with artefact.run(model, work) as candidate:
        report = verify.measure(ref, candidate.run, candidate.program, storage)
        if report.verdict == "failed":
            trained = Trained(str(request.model), request.adapter, ref)
            why = differences.found_out(lambda: artefact.why_different(model, work, trained, candidate.run))
            raise UserError(
                f"the export is not the model that was trained, so it was not kept ({report.line()})",
                f"{why} --no-verify keeps it all the same.",
            )
        report.write(work)
        remarks = list(candidate.notes)
        if report.verdict == "measured" and storage != ANOTHER_BASE and (warning := report.warning()):
            remarks.append(f"{artefact.label(model)}: {warning}")
        return report, remarks


def check(export: Path, model: Path, adapter: Path | None, examples: Sequence[Example]) -> tuple[Report, str]:
    """Compare an artefact that is already there with the trained model, and write the report into it. Returns it with
    what differs, "" when nothing does.

    Raises UserError for a folder that is no export, or whose runtime is not installed.
    """
    if export.is_file():
        raise UserError(
            f"{export} is a file: verify compares folders",
            "A GGUF file was proven when it was exported; export it again to see the proof.",
        )
    if not export.is_dir():
        raise UserError(f"no folder {export}", "Name what fuse or export wrote.")
    merged = MergedModel(Request(model, adapter, export, examples=examples))
    artefact = artefacts.of_folder(export)
    with artefact.run(merged, export) as candidate:
        ref = verify.reference(str(model), adapter, examples)
        report = verify.measure(ref, candidate.run, candidate.program, artefact.storage(merged))
        with explained(export):
            report.write(export)
        if report.verdict == "lossy":
            better = "Codes of more bits lose less (fuse --bits 8 or 16), and the adapter beside its base nothing."
            return report, better
        if report.verdict != "failed":
            return report, ""
        trained = Trained(str(model), adapter, ref)
        return report, differences.found_out(lambda: artefact.why_different(merged, export, trained, candidate.run))
