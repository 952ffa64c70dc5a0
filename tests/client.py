"""A user's script, as the type checker sees it: pyproject.toml has it checked as strictly as mypy can.

No expression of it may be of an unknown type, and each ignored line must be wrong: were the API's types lost, mypy
would say that there is nothing to ignore. tests/test_api.py runs it.
"""

from __future__ import annotations

from pathlib import Path

import mlxtune


def tuned(model: Path, data: Path, out: Path) -> mlxtune.Run:
    return mlxtune.tune("quick", {"model.path": str(model), "data.path": str(data), "train.steps": 1}, out=out)


def loss_of(run: mlxtune.Run) -> float:
    scores: mlxtune.Evaluation = mlxtune.evaluate(run)
    return scores.base.loss if scores.tuned is None else scores.tuned.loss


def exported(run: mlxtune.Run, out: Path) -> str:
    return mlxtune.export(run, to="peft", out=out, verify=False).what


def learned(model: Path, data: Path) -> list[int]:
    return [sum(row.mask) for row in mlxtune.render(model, data) if not row.dropped]


def sides_of(model: Path, data: Path) -> list[str]:
    return [row.side for row in mlxtune.render(model, data, settings={"preference.loss": "kto"})]


def scored(model: Path, data: Path) -> int:
    return mlxtune.evaluate(model, data=data, settings={"data.max_tokens": 64}).base.tokens


def wrong(run: mlxtune.Run) -> None:
    """Never called."""
    mlxtune.tune(1)  # type: ignore[arg-type]
    mlxtune.evaluate(run, splitt="valid")  # type: ignore[call-arg]
    mlxtune.export(run, to="onnx", out="x")  # type: ignore[arg-type]
    run.best_loss + 1.0  # type: ignore[operator]
    run.folder = Path("elsewhere")  # type: ignore[misc]
    for row in mlxtune.render("model", "data"):
        print(row.idz)  # type: ignore[attr-defined, misc]
