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
    """
    identity = job.identity
    versions = {"mlxtune": mlxtune.__version__, "MLX": identity.mlx}
    versions |= {name: version(name) for name in LIBRARIES}
    if identity.blas:
        versions["products of matrices"] = identity.blas
    versions["Python"] = platform.python_version()
    return {
        "predicted_bytes": job.predicted,
        "processes": job.ranks.size,
        "digests": {"model": identity.model, "train": identity.train, "valid": identity.valid},
        "versions": versions,
        "machine": f"{backend.chip()}, {size(backend.memory_bytes())} of memory, {platform.system()}",
    }
