"""Benchmarks asked of one model or two, and what that shows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from mlxtune_convert.files import contents, json_text

from mlxtune.errors import UserError
from mlxtune.evaluate.benchmarks import package
from mlxtune.evaluate.benchmarks.asking import instances_of
from mlxtune.evaluate.benchmarks.scoring import Measured, joined, measure, prompts_of
from mlxtune.evaluate.benchmarks.tasks import Loading, Wanted
from mlxtune.evaluate.comparison import folder as kept
from mlxtune.evaluate.comparison.gate import Gate, require_known, results
from mlxtune.evaluate.comparison.scores import PromptScores, Side
from mlxtune.evaluate.comparison.summary import document
from mlxtune.evaluate.engines.journal import Journal, Told
from mlxtune.evaluate.engines.request import Answer, Engine, Request
from mlxtune.machine import backend

ASKED = "requests"  # the folder, in an evaluation's, of what was asked of the models: a choice each, not a prompt
PLAIN = "texts are given without the chat template, as the tasks are written"


@dataclass(frozen=True)
class Answering:
    """One side."""

    open: Callable[[dict[str, Any]], Engine]  # given the requests; called where something is left to answer
    described: dict[str, Any]  # what it is, for the document; JSON
    identity: dict[str, Any]  # what of it decides its answers; JSON


@dataclass(frozen=True)
class Asked:
    """What is asked."""

    loading: Loading  # the tasks
    wanted: Wanted  # how much of them
    digest: str  # of the rows' files
    gates: Sequence[Gate] = ()  # that the result is held to


def evaluate(
    asked: Asked, sides: Mapping[Side, Answering], out: Path | None = None, told: Told = lambda *_: None
) -> tuple[dict[str, Any], int]:
    """(The document as `--json` prints it, how many results an earlier process had left).

    sides, out, told: as `before_after.evaluate` takes them.
    """
    parts = asked.loading.parts
    instances = instances_of(parts)
    requests = [Request(id, [{"role": "user", "content": one.args[0]}]) for id, one in instances.items()]
    computed = f"MLX {version('mlx')} on {backend.kind()}, mlx-lm {version('mlx-lm')}, {package.installed()}"
    settings = {"benchmarks": asked.loading.settings, **asdict(asked.wanted)}
    digest = hashlib.sha256(json_text([asked.digest, settings, list(instances)]).encode()).hexdigest()
    identity = {
        "benchmarks": digest,
        "sides": {side: answering.identity for side, answering in sides.items()},
        "computed by": computed,
    }
    if out is not None:
        _require_own(out)
    measured: dict[Side, Measured] = {}
    with closing(Journal(None if out is None else out / ASKED, identity)) as journal:
        for side, answering in sides.items():
            answers = journal.answers(side, requests, lambda a=answering: a.open(instances), told)  # type: ignore[misc]
            measured[side] = measure(parts, {answer.id: answer for answer in answers})
    scores = joined(measured)
    require_known(asked.gates, list(dict.fromkeys(one.check for one in scores)))
    rows = prompts_of(parts)
    provenance = {
        "suite": {"name": ", ".join(asked.loading.settings), "digest": digest},
        "sides": {side: answering.described for side, answering in sides.items()},
        "sampling": {"samples": 1},
        "benchmarks": _of_benchmarks(asked.loading, scores),
        "computed by": computed,
    }
    summary = document(len(rows), scores, provenance, _notes(asked, journal, measured))
    if asked.gates:
        summary["gates"] = results(asked.gates, dict(summary["checks"]), {})
    if out is not None:
        _keep(out, rows, measured, scores, summary)
    return summary, journal.found


def _require_own(out: Path) -> None:
    """Raise UserError for a folder that holds something else."""
    if out.is_dir() and not (out / ASKED).is_dir() and (found := contents(out)):
        raise UserError(f"{out} holds {found[0].name}, and no benchmark", "Choose another --out.")


def _keep(
    out: Path, rows: Any, measured: Mapping[Side, Measured], scores: Sequence[PromptScores], summary: dict[str, Any]
) -> None:
    kept.write_prompts(out, rows)
    lines = [{"side": side, **asdict(answer)} for side, found in measured.items() for answer in found.answers]
    kept.write_lines(out / kept.ANSWERS, lines)
    kept.write_results(out, scores, summary)


def _of_benchmarks(loading: Loading, scores: Sequence[PromptScores]) -> dict[str, Any]:
    """Each benchmark's settings, and the means of its subjects where it has some."""
    found = {name: dict(settings) for name, settings in loading.settings.items()}
    for part in loading.parts:
        if part.subject is not None:
            means: dict[str, Any] = {}
            own = [one for one in scores if one.id.rpartition("/")[0] == part.name]
            for check in dict.fromkeys(one.check for one in own):
                some = [one for one in own if one.check == check]
                means[check] = {"n": len(some), "base": fmean(one.base[0] for one in some)}
                if some[0].tuned is not None:
                    means[check]["tuned"] = fmean(one.tuned[0] for one in some if one.tuned)
            found[part.benchmark].setdefault("subjects", {})[part.subject] = means
    return found


def _notes(asked: Asked, journal: Journal, measured: Mapping[Side, Measured]) -> list[str]:
    notes = [*asked.loading.notes, PLAIN]
    for side, found in measured.items():
        notes += journal.notes.get(side, [])
        notes += [
            f"{side}: {count} answers were cut at the task's longest length" for count in [_cut(found.answers)] if count
        ]
        notes += [f"{check}: no score of a row, left out" for check in sorted(found.left_out)]
    if asked.loading.notes:
        notes.append("not to be compared with published numbers, for these differences")
    return list(dict.fromkeys(notes))


def _cut(answers: Sequence[Answer]) -> int:
    return sum(answer.finish == "length" for answer in answers)
