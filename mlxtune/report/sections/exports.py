"""The section of exports: what lies beside the run, with the proof that was made of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune_convert.files import contents, read_json
from mlxtune_convert.sizes import size

from mlxtune.errors import UserError
from mlxtune.report.evaluations import adapter_in
from mlxtune.report.html import Child, Html, joined, prose, tag
from mlxtune.report.page import Section
from mlxtune.report.run_record import RunRecord, number_of
from mlxtune.report.secrets import masked
from mlxtune.report.tables import callout, table
from mlxtune.ship.verify import REPORT_FILE

MOST = 50  # that are shown
LOOKED_AT = 500  # folders beside a run; who keeps more there keeps no exports
INTRODUCTION = "What was exported of this very adapter, in the run's folder and beside it, and of its base."
UNSAID = "was proven by an earlier mlxtune, whose proofs do not say which adapter they are of"


@dataclass(frozen=True)
class Export:
    """An artefact, and what its proof says."""

    name: str  # of its folder, or of the folder and the file in it
    proof: Mapping[str, Any]  # as verification.json has it; {}: it cannot be read
    bytes: int  # on the disk

    @property
    def unsaid(self) -> bool:
        """Whether its proof does not say which adapter it is of."""
        return bool(self.proof) and "adapter" not in self.proof


def found(record: RunRecord) -> list[Export]:
    """The exports in the run's folder and beside it, by name; not those that were proven to be another adapter."""
    run = record.folder.resolve()
    places = [run]
    try:
        beside = sorted(path for path in contents(run.parent) if path.is_dir() and not path.is_symlink())
        places += [path for path in beside[:LOOKED_AT] if path != run]
        places += sorted(path for path in contents(run) if path.is_dir() and not path.is_symlink())[:LOOKED_AT]
    except OSError:  # folders of other people
        pass
    own = adapter_in(record.folder)
    out = []
    for place in places:
        out += [export for export in _in(place) if export.proof.get("adapter", "") in ("", own)]
    return out[:MOST]


def _in(folder: Path) -> list[Export]:
    """The exports that a folder is or holds: a folder's proof has its plain name, a file's begins with the file's."""
    out = []
    try:
        names = sorted(path for path in folder.glob(f"*{REPORT_FILE}") if path.is_file())
        for file in names:
            stem = file.name.removesuffix(REPORT_FILE).removesuffix(".")
            if stem:
                mine = [path for path in folder.glob("*.gguf") if path.stem == stem]
                name = f"{folder.name}/{mine[0].name if mine else stem}"
            else:
                mine, name = list(folder.iterdir()), folder.name
            out.append(Export(name, _proof(file), sum(path.stat().st_size for path in mine if path.is_file())))
    except OSError:
        return []
    return out


def _proof(file: Path) -> dict[str, Any]:
    try:
        return read_json(file, "a proof")
    except (UserError, OSError):
        return {}


def section(exports: Sequence[Export]) -> Section | None:
    if not exports:
        return None
    columns = ["export", "proof", "run by", "largest difference of a logit", "same first token", "gain kept", "size"]
    rows = [_row(export) for export in exports]
    wrong = [
        export.name for export in exports if export.proof.get("verdict") not in ("passed", "measured", "read back")
    ]
    body: list[Html] = [tag("p", prose(INTRODUCTION)), table("Exports", columns, rows, {3, 4, 5, 6})]
    unsaid = [export.name for export in exports if export.unsaid]
    if unsaid:
        body.append(tag("p", f"{', '.join(unsaid)}: {UNSAID}."))
    if wrong:
        body.append(callout("warning", f"Not proven, or with loss: {', '.join(wrong)}."))
    return Section("exports", "Exports and their proofs", joined(body))


def _row(export: Export) -> list[Child]:
    proof = export.proof
    if not proof:
        return [masked(export.name), "cannot be read", "", "", "", "", size(export.bytes)]
    difference = number_of(dict(proof), "max_difference")
    return [
        masked(export.name),
        str(proof.get("verdict", "unknown")),
        str(proof.get("candidate") or ""),
        "" if difference is None else f"{difference:.1e}",
        _percent(proof, "top1"),
        _percent(proof, "gain_kept"),
        size(export.bytes),
    ]


def _percent(proof: Mapping[str, Any], name: str) -> str:
    value = number_of(dict(proof), name)
    return "" if value is None else f"{value:.1%}"
