"""Models that rotate by how long a row is: each row of a batch is computed as it would be alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import conformance
import mlx.core as mx
import numpy as np
import pytest
import tiny
from training import tune

from mlxtune.compute import fast_ways
from mlxtune.config import resolve as configuration
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import collate
from mlxtune.evaluate import generate
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.evaluate.score import score
from mlxtune.model.corrections import extent
from mlxtune.model.load import load
from mlxtune.train.run_data import read_data

LIMIT = 64
PAIRS = range(8)
LONGROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": LIMIT,
        "short_factor": [1 + 0.02 * pair for pair in PAIRS],
        "long_factor": [1 + 4.0 * pair for pair in PAIRS],
    },
    "original_max_position_embeddings": LIMIT,
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("phi3", LONGROPE),
    ("olmo2", {**DYNAMIC, "max_position_embeddings": LIMIT}),  # by mlx-lm's own module
    ("qwen3_moe", {**DYNAMIC, "max_position_embeddings": LIMIT}),
]
LENGTHS = (20, LIMIT + 1, LIMIT + 2, 90, 40)


def rows(lengths: tuple[int, ...]) -> list[Example]:
    draw = np.random.default_rng(3)
    return [Example(draw.integers(3, 250, length).tolist(), [0] * 5 + [1] * (length - 5)) for length in lengths]


def alone(folder: Path, examples: list[Example]) -> float:
    """The mean loss by transformers, one row at a time, its last token seen by nobody."""
    import torch

    reference, total, count = conformance.reference(folder), 0.0, 0
    for example in examples:
        ids = torch.tensor([list(example.ids)], dtype=torch.long)
        with torch.no_grad():
            logits = reference(ids[:, :-1]).logits[0]
        mask = torch.tensor(list(example.mask)[1:], dtype=torch.bool)
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        total, count = total + float(losses[mask].sum()), count + int(mask.sum())
    return total / count


@pytest.mark.parametrize(("family", "changes"), MODELS, ids=str)
def test_rows_of_a_mixed_batch_have_the_loss_that_they_have_alone(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = tiny.make_model(tmp_path / "model", family, **changes)
    model = load(str(folder), "float32").model
    assert extent.longest_alike(model) == LIMIT
    examples = rows(LENGTHS)
    batch = collate(examples, range(len(examples)))
    wanted = alone(folder, examples)
    assert abs(score(model, None, [batch]).loss - wanted) < 2e-6
    together = model(mx.array(batch.ids[:, :-1]))
    targets = mx.array(batch.ids[:, 1:])
    losses = -mx.take_along_axis(mx.log(mx.softmax(together, axis=-1)), targets[..., None], axis=-1)[..., 0]
    mask = mx.array(batch.mask[:, 1:])
    as_one = float(((losses * mask).sum() / mask.sum()).item())  # type: ignore[arg-type]
    assert abs(as_one - wanted) > 1e-5  # what the parts are for


def test_a_batch_is_cut_where_the_rotation_changes_and_nowhere_else() -> None:
    """A row's last token is seen by nobody: one of limit + 1 tokens is within the limit."""
    batch = collate(rows(LENGTHS), range(len(LENGTHS)))
    parts = extent.parts(batch, LIMIT)
    assert [part.rows.tolist() for part in parts] == [[0, 1, 4], [2], [3]]
    assert [part.ids.shape for part in parts] == [(3, LIMIT + 1), (1, LIMIT + 2), (1, 90)]
    assert sum(part.targets for part in parts) == batch.targets
    assert extent.parts(batch, None) == [batch] == extent.parts(batch, 90)
    assert len(extent.parts(collate(rows((20, 30)), [0, 1], 300), LIMIT)) == 1  # padding alone is no long row


def test_a_run_trains_on_the_loss_that_rows_have_alone(tmp_path: Path) -> None:
    """The first step's loss is that of the base: no factor of the adapter moves it yet."""
    folder = tiny.make_model(tmp_path / "model", "olmo2", **DYNAMIC, max_position_embeddings=LIMIT)
    texts = ["Short.", "A longer answer, " * 4, "Once more, " * 9, "Yes."]
    data = tmp_path / "data"
    for split in ("train", "valid"):
        rows_of = [{"prompt": "Say it. ", "completion": text} for text in texts]
        tiny.write_jsonl(data / f"{split}.jsonl", rows_of)
    events = tune(
        folder,
        data,
        tmp_path / "run",
        "train.steps=1",
        "train.accumulate=1",
        "train.batch_rows=4",
        "train.eval_every=1",
    )
    (first,) = [event for event in events if event["kind"] == "train"]
    resolved = configuration.load(None, (), {"model.path": str(folder), "data.path": str(data)})
    read, _ = read_data(resolved)
    examples = list(read.train)
    assert min(map(_length, examples)) < LIMIT < max(map(_length, examples))
    assert abs(first["loss"] - alone(folder, examples)) < 5e-6


def _length(example: Example) -> int:
    return len(example.ids)


def test_no_prefix_is_shared_where_a_row_is_longer_than_the_limit(tmp_path: Path) -> None:
    model = load(str(tiny.make_model(tmp_path / "model", "phi3", **LONGROPE)), "float32").model
    config = configuration.load(None, (), {"model.path": "x", "data.path": "x"})
    same = [7] * 20
    short = [Example(same + [index] * 20, [0] * 25 + [1] * 15) for index in (8, 9)]
    long = [*short, Example(same + [10] * 60, [0] * 25 + [1] * 55)]
    assert fast_ways.shared_prefix(model, short, config) == (20, "")
    length, why = fast_ways.shared_prefix(model, long, config)
    assert length is None and f"rows of more than {LIMIT} tokens are rotated otherwise" in why


@pytest.mark.parametrize("tokens", [LIMIT, LIMIT + 1])
def test_a_long_prompt_is_read_at_once(tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, as prompts are read otherwise, the first would be rotated as the short row that it is."""
    loaded = load(str(tiny.make_model(tmp_path / "model", "phi3", **LONGROPE)), "float32")
    monkeypatch.setattr(generate, "PREFILL", 16)
    widths: list[int] = []
    plain = type(loaded.model).__call__

    def watched(self: Any, ids: mx.array, **given: Any) -> mx.array:
        widths.append(ids.shape[1])
        return plain(self, ids, **given)

    monkeypatch.setattr(type(loaded.model), "__call__", watched)
    list(generate.tokens(loaded, [5] * tokens, Sampling(max_tokens=1)))
    assert widths == ([16, 16, 16, 15, 1] if tokens == LIMIT else [tokens - 1, 1])
