"""What a run is made of, for whoever looks at it later: its `begin` event carries this.

A checkpoint holds the run's whole identity; but a run may save none, and its folder should still say which model and
rows it was, by which versions, and on what machine. No path and no name of a machine or a person is among it.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from mlxtune_convert.sizes import size

import mlxtune
from mlxtune.machine import backend
from mlxtune.train.step import Job

LIBRARIES = ("mlx-lm", "transformers", "numpy")  # what else decides what is computed; MLX stands in the identity


def of_job(job: Job) -> dict[str, Any]:
    """Fields of a `begin` event:

    predicted_bytes   the peak of memory as predicted; None where nobody can say
    processes         how many share the run
    digests           of the base model, the training and the held-out examples (`identity`)
    versions          of what computes, by name
    machine           its processor, memory and system, in words
    preference        of a run on preferences: its objective (`loss`), `beta`, `sft`, and what its `rows` are: pairs or
                      rated
    """
    identity = job.identity
    versions = {"mlxtune": mlxtune.__version__, "MLX": identity.mlx}
    versions |= {name: version(name) for name in LIBRARIES}
    if identity.blas:
        versions["products of matrices"] = identity.blas
    versions["Python"] = platform.python_version()
    made_of: dict[str, Any] = {
        "predicted_bytes": job.predicted,
        "processes": job.ranks.size,
        "digests": {"model": identity.model, "train": identity.train, "valid": identity.valid},
        "versions": versions,
        "machine": f"{backend.chip()}, {size(backend.memory_bytes())} of memory, {platform.system()}",
    }
    if job.preference is not None:
        settings, rows = job.preference.settings, "pairs" if job.preference.of_pairs else "rated"
        made_of["preference"] = {
            "loss": settings.objective,
            "beta": settings.beta,
            "sft": settings.sft,
            "rows": rows,
        }
    return made_of
