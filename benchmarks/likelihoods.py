"""Log-likelihoods of 300 rows by `eval --benchmark`'s model beside those of lm_eval's own Hugging Face model.

    python benchmarks/likelihoods.py [MODEL]

MODEL: a 16- or 32-bit Hugging Face folder; without one, tiny models of random weights are made of two families. Rows
are made in the columns of MMLU (five shots) and HellaSwag. Needs the packages of the extra dev, torch among them; both
sides compute in float32.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import benchmark_rows as made
import tiny

from mlxtune.evaluate.benchmarks import package, tasks
from mlxtune.evaluate.benchmarks.asking import instances_of
from mlxtune.evaluate.benchmarks.model import Model
from mlxtune.evaluate.benchmarks.rows import Rows
from mlxtune.model.load import load

FAMILIES = ("llama", "gemma3")
WINDOW = 4096  # tokens that the tiny models take: five examples in bytes


def compare(model: Path, data: Path) -> None:
    """Print how far both are apart on 200 questions and 100 endings of four choices each."""
    from lm_eval.models.huggingface import HFLM

    rows = Rows(data)
    parts = tasks.load(["mmlu"], rows, tasks.Wanted(200, 5, 0)).parts
    parts += tasks.load(["hellaswag"], rows, tasks.Wanted(100, None, 0)).parts
    requests = list(instances_of(parts).values())
    ours = Model(load(str(model), "float32"))
    found = ours.loglikelihood(requests)
    with package.quiet():
        oracle = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=8)
        expected = oracle.loglikelihood(requests, disable_tqdm=True)
    apart = np.abs(np.subtract([value for value, _ in found], [value for value, _ in expected]))
    other = sum(one[1] != two[1] for one, two in zip(found, expected, strict=True))
    choices = np.array([value for value, _ in found]).reshape(-1, 4).argmax(1)
    theirs = np.array([value for value, _ in expected]).reshape(-1, 4).argmax(1)
    plain = sum(len(pair.inputs) for request in requests for pair in ours.pairs_of(request))
    print(f"{model.name}: {len(choices)} rows, {len(requests)} texts, up to {-min(found)[0]:.1f} nats")
    print(
        f"  farthest apart {apart.max():.2e} nats; other choices: {(choices != theirs).sum()}; other `greedy`: {other}"
    )
    print(f"  tokens through the trunk: {ours.scorer.tokens:,}; one by one: {plain:,}")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        data = made.write(Path(name) / "rows", mmlu=made.mmlu(200), hellaswag=made.hellaswag(100))
        if len(sys.argv) > 1:
            compare(Path(sys.argv[1]), data)
            return
        for family in FAMILIES:
            model = tiny.make_model(Path(name) / family, family, max_position_embeddings=WINDOW)
            compare(model, data)


if __name__ == "__main__":
    main()
