"""Which floating type a run computes in, what it says of it, and what it says when a number leaves it."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from training import losses, options, scale_losses, tune

from mlxtune.compute import floats
from mlxtune.config import resolve
from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.model import convert
from mlxtune.model.arrays import named
from mlxtune.model.dense import dense_weight
from mlxtune.model.load import load
from mlxtune.train import checkpoint, events, preparation
from mlxtune.train.run_data import read_data

HALF, BRAIN, FULL = mx.float16, mx.bfloat16, mx.float32
SYSTEM = "You answer questions about numbers, each with a number of its own, and nothing else."
STEPS = ("train.steps=3", "train.save_every=0", "train.accumulate=1")
ALL_WAYS = ("train.steps=8", "train.eval_every=8", "train.save_every=8", "train.checkpoint_layers=all")


def converted(hf: Path, out: Path, bits: int, dtype: str) -> Path:
    target = convert.Quantization.of(bits, 32 if bits < 16 else None, None)
    convert.convert(str(hf), out, target, dtype)
    return out


@pytest.fixture(scope="module")
def half_model(hf_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 bits with float16 scales, as a GGUF file's codes become."""
    return converted(hf_model, tmp_path_factory.mktemp("half") / "model", 4, "float16")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that share a system prompt."""
    system = {"role": "system", "content": SYSTEM}
    shared = [{"messages": [system, *row["messages"]]} for row in tiny.conversations(12)]
    return tiny.write_jsonl(tmp_path_factory.mktemp("rows") / "train.jsonl", shared).parent


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decided by the device is decided as on a Mac; the CPU computes."""
    monkeypatch.setattr(backend, "kind", lambda: "metal")


@pytest.mark.parametrize(
    ("name", "own", "quantized", "expected"),
    [
        ("auto", HALF, True, FULL),
        ("auto", HALF, False, FULL),
        ("auto", BRAIN, True, BRAIN),
        ("auto", BRAIN, False, BRAIN),
        ("auto", FULL, True, FULL),
        ("own", HALF, True, HALF),
        ("own", BRAIN, True, BRAIN),
        ("float16", HALF, True, HALF),
        ("bfloat16", HALF, False, BRAIN),
    ],
)
def test_on_a_gpu_only_the_training_of_a_float16_model_leaves_its_own_type(
    name: str, own: mx.Dtype, quantized: bool, expected: mx.Dtype, gpu: None
) -> None:
    assert backend.dtype_for(name, own, quantized) == expected


@pytest.mark.parametrize("name", ["auto", "own"])
def test_on_the_cpu_every_model_runs_and_trains_in_float32(name: str) -> None:
    assert {backend.dtype_for(name, own, True) for own in (HALF, BRAIN, FULL)} == {FULL}


def test_the_scales_of_a_quantized_base_are_never_rounded(gpu: None) -> None:
    with pytest.raises(UserError, match="would round its scales") as refused:
        backend.dtype_for("bfloat16", HALF, True)
    assert refused.value.hint == "Use auto or float16 or float32."


def test_a_float16_model_is_trained_on_a_gpu_as_the_same_model_in_float32(half_model: Path, gpu: None) -> None:
    run, trained = load(str(half_model)), load(str(half_model), "auto")
    assert (run.dtype, trained.dtype) == (HALF, FULL) and run.own == trained.own == HALF
    theirs = dict(trained.model.named_modules())
    for path, module in run.model.named_modules():
        if "scales" in module:
            np.testing.assert_array_equal(dense_weight(module), dense_weight(theirs[path]), path)
    assert {array.dtype for array in named(trained.model.parameters()).values()} == {mx.uint32, FULL}


def test_such_a_run_says_so_has_the_losses_of_float32_and_its_memory_is_predicted_for_float32(
    half_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = tune(half_model, rows, tmp_path / "cpu", *STEPS)
    assert not any("float16" in event.get("text", "") for event in on_cpu)
    settings = resolve.load(
        None, ("train.batch_rows=2", *STEPS), {"model.path": str(half_model), "data.path": str(rows)}
    )
    data, settings = read_data(settings)
    monkeypatch.setattr(backend, "kind", lambda: "metal")
    found = tune(half_model, rows, tmp_path / "gpu", *STEPS)
    said = [event["text"] for event in found if event["kind"] == "note"]
    assert sum(text.startswith("a float16 model trains in float32") for text in said) == 1
    assert any("on metal, float32" in text for text in said)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-5)
    planned = preparation.plan(settings, data)
    assert "activations take twice the memory of train.dtype=float16" in planned.notes[0]
    narrow = settings.model_copy(update={"train": settings.train.model_copy(update={"dtype": "float16"})})
    in_half = preparation.plan(narrow, data)
    assert "float16 ends at 65,504" in in_half.notes[0] and "model" not in in_half.notes[0]
    wide, half = planned.memory, in_half.memory
    assert wide and half and wide.weights > half.weights
    # Gradients of the adapter, which is float32 in both, are among them.
    assert 1.9 * half.activations < wide.activations <= 2 * half.activations


def test_a_model_that_is_not_quantized_takes_its_weights_twice_too_and_a_refusal_names_the_way_out(
    hf_model: Path, rows: Path, tmp_path: Path, gpu: None
) -> None:
    model = converted(hf_model, tmp_path / "model", 16, "float16")
    flags = {"model.path": str(model), "data.path": str(rows)}
    data, settings = read_data(resolve.load(None, ("train.batch_rows=2", *STEPS), flags))
    planned = preparation.plan(settings, data)
    assert "weights and activations take twice the memory" in planned.notes[0]
    section = settings.train.model_copy(update={"dtype": "float16"})
    wide, half = planned.memory, preparation.plan(settings.model_copy(update={"train": section}), data).memory
    assert wide and half and wide.weights == 2 * half.weights
    for dtype, way_out in (("auto", "set train.dtype=float16, or set"), ("float16", "4-bit model, or set")):
        little = settings.train.model_copy(update={"memory_limit": 1000, "dtype": dtype})
        with pytest.raises(UserError, match="training needs") as refused:
            preparation.plan(settings.model_copy(update={"train": little}), data)
        assert way_out in refused.value.hint


def test_a_risk_is_said_of_float16_only_with_what_others_report_of_the_family(gpu: None) -> None:
    for family, when in floats.REPORTED.items():
        (said,) = floats.notes("float16", HALF, HALF, {"model_type": family})
        assert f"reported of {family} models {when}" in said and "train.dtype=float32" in said
    (said,) = floats.notes("float16", HALF, HALF, {"model_type": "llama"})
    assert "reported" not in said and "train.dtype=float32" in said
    for asked, own in (("auto", BRAIN), ("bfloat16", BRAIN), ("auto", FULL), ("float32", HALF)):
        used = backend.dtype_for(asked, own, True)
        assert floats.notes(asked, own, used, {"model_type": "qwen3_moe", "quantization": {}}) == []
    (said,) = floats.notes("bfloat16", HALF, BRAIN, {})
    assert said == "float16 weights, rounded to bfloat16 to train on; exports keep the float16 weights"


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_a_run_in_16_bits_goes_every_fast_way_and_has_the_losses_of_float32(
    dtype: str, bits: int, hf_model: Path, rows: Path, tmp_path: Path
) -> None:
    """bits: of a number's significand. The loss of some twenty tokens averages their roundings: measured 1e-5 and 1e-4,
    a tenth of the limit; softmax in 16 bits passes it. What is trained stays float32.
    """
    model = converted(hf_model, tmp_path / "model", 4, dtype)
    tiny.done(*options(model, rows, tmp_path / "run", *ALL_WAYS, f"train.dtype={dtype}"))
    said = " ".join(event["text"] for event in events.read(tmp_path / "run") if event["kind"] == "note")
    assert f"on cpu, {dtype}" in said
    assert "computed: the head on supervised tokens only, the shared prefix of" in said
    assert "every block checkpointed" in said
    tune(model, rows, tmp_path / "wide", *ALL_WAYS, "train.dtype=float32")
    found, wanted = losses(tmp_path / "run"), losses(tmp_path / "wide")
    assert found.keys() == wanted.keys() and len(wanted) == 10
    off = max(abs(found[place] / wanted[place] - 1) for place in wanted)
    assert 0 < off < 2.0**-bits / 4
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    kept = [
        mx.load(str(file)) for file in (tmp_path / "run" / "adapters.safetensors", folder / checkpoint.OPTIMIZER_FILE)
    ]
    arrays = [array for part in kept for array in part.values()]  # type: ignore[union-attr]
    assert {array.dtype for array in arrays if mx.issubdtype(array.dtype, mx.floating)} == {FULL}


@pytest.fixture(scope="module")
def steep(hf_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 model with an ordinary loss and a gradient that float16 does not hold: what its blocks add up is so
    small that the final norm, of large weight, multiplies gradients by some 3e6 on their way back.
    """
    folder = tmp_path_factory.mktemp("steep")
    tiny.make_model(folder / "hf")
    weights = load_file(folder / "hf" / "model.safetensors")
    for name, array in weights.items():
        if any(part in name for part in ("embed", "o_proj", "down_proj")):
            weights[name] = array * np.float32(1e-5)
    weights["model.norm.weight"] = weights["model.norm.weight"] * np.float32(3000)
    save_file(weights, folder / "hf" / "model.safetensors", {"format": "pt"})
    return converted(folder / "hf", folder / "model", 16, "float16")


def test_a_gradient_that_float16_does_not_hold_is_named_as_that(steep: Path, rows: Path, tmp_path: Path) -> None:
    told = tiny.refused(
        *(tmp_path / "run", *options(steep, rows, tmp_path / "run", *STEPS, "train.dtype=float16")),
        expected=("step 1: the gradient is not finite in float16 (the loss is, ", "rows in the step: line"),
    )
    assert told.strip().endswith("Set train.dtype=float32, for float16 ends at 65,504.")
    assert "note: float16 ends at 65,504" in told
    tune(steep, rows, tmp_path / "run", *STEPS, "train.dtype=float32")  # what the hint promises


@pytest.mark.parametrize(
    ("dtype", "from_step", "expected"),
    [
        ("float32", 1, "Nothing was trained before it: look at these rows (mlxtune data show) and at the model"),
        ("float32", 2, "Try a lower train.lr or more train.warmup_steps."),
        ("bfloat16", 2, "Try a lower train.lr or more train.warmup_steps. If that is not it: train.dtype=float32"),
        ("float16", 2, "Set train.dtype=float32, for float16 ends at 65,504; or try a lower train.lr."),
    ],
)
def test_what_helps_against_bad_numbers_depends_on_the_type_and_on_what_was_trained(
    dtype: str,
    from_step: int,
    expected: str,
    hf_model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scale_losses(monkeypatch, lambda count: math.nan if count >= from_step else 1.0)
    with pytest.raises(UserError, match=f"step {from_step}: the loss is not finite in {dtype} ") as failed:
        tune(hf_model, rows, tmp_path / "run", *STEPS, f"train.dtype={dtype}")
    assert expected in failed.value.hint
    assert (dtype == "float32") == ("train.dtype" not in failed.value.hint)
