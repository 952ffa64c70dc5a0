"""4-bit codes chosen by calibration keep a tune that rounding loses; `mlxtune verify` tells one from the other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from mlxtune.cli import cli
from mlxtune.errors import UserError
from mlxtune.model.load import open_model
from mlxtune.ship import gptq
from mlxtune.ship.artefacts import FusedMlx, HuggingFace
from mlxtune.ship.export import ship
from mlxtune.ship.request import Request
from mlxtune.ship.verify import Report
from mlxtune.train.run_data import Data, read_data
from mlxtune.train.run_folder import RunFolder


def layer(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(weight [48, 128], H [128, 128], other inputs): as layers get them, few directions much stronger than others."""
    draw = np.random.default_rng(seed)
    inputs = (draw.normal(size=(600, 24)) * 3) @ draw.normal(size=(24, 128)) + draw.normal(size=(600, 128))
    weight = draw.normal(size=(48, 128)).astype(np.float32) * 0.05
    seen, fresh = inputs[:500].astype(np.float32), inputs[500:].astype(np.float32)
    return weight, seen.T @ seen, fresh


def dense(parts: tuple[mx.array, ...], group: int, bits: int) -> np.ndarray:
    return np.array(mx.dequantize(parts[0], *(x.astype(mx.float32) for x in parts[1:]), group_size=group, bits=bits))


@pytest.mark.parametrize(("group", "bits"), [(32, 4), (64, 4), (64, 3), (32, 2)])
def test_calibrated_codes_move_the_outputs_less_than_rounding(group: int, bits: int) -> None:
    """On inputs that calibration never saw, at most a quarter of the error of mx.quantize."""
    weight, hessian, fresh = layer()
    ours = dense(gptq.quantize(weight, hessian, group, bits, mx.float32), group, bits)
    nearest = dense(mx.quantize(mx.array(weight), group, bits), group, bits)
    moved, rounded = (float(np.square(fresh @ (w - weight).T).sum()) for w in (ours, nearest))
    assert moved < 0.25 * rounded


def test_a_layer_that_was_not_changed_keeps_its_codes() -> None:
    """The base's own matrix, offered with the base's scales: every code comes back."""
    weight, hessian, _ = layer(1)
    codes, scales, biases = mx.quantize(mx.array(weight), 32, 4)
    own = np.array(mx.dequantize(codes, scales, biases, 32, 4))
    again = gptq.quantize(own, hessian, 32, 4, mx.float32, (np.array(scales), np.array(biases)))
    np.testing.assert_allclose(dense(again, 32, 4), own, atol=1e-6)


def test_an_input_that_never_comes_does_no_harm() -> None:
    weight, hessian, _ = layer(2)
    hessian[5], hessian[:, 5] = 0, 0
    assert np.isfinite(dense(gptq.quantize(weight, hessian, 64, 4, mx.float32), 64, 4)).all()


def digests(*folders: Path) -> dict[Path, str]:
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def rows(mlx_model: Path, run: Path) -> Data:
    return read_data(RunFolder(run).config())[0]


def proof(request: Request, artefact: FusedMlx) -> Report:
    report = ship(request, artefact).proof
    assert isinstance(report, Report)
    return report


@pytest.mark.parametrize("group", [None, 64])
def test_a_4_bit_fuse_keeps_more_of_the_tune_than_rounding_does(
    group: int | None, mlx_model: Path, run: Path, rows: Data, tmp_path: Path
) -> None:
    """The same request with and without the training rows; neither the model nor the run is touched."""
    before = digests(mlx_model, run)
    request = Request(mlx_model, run, tmp_path / "rounded", examples=rows.valid)
    rounded = proof(request, FusedMlx(4, group))
    request = Request(mlx_model, run, tmp_path / "fused", examples=rows.valid)
    calibrated = proof(request, FusedMlx(4, group, calibration=rows.train))
    assert calibrated.mean_kl < 0.5 * rounded.mean_kl
    assert calibrated.gain_kept > 0.95
    assert calibrated.verdict == "passed"
    assert digests(mlx_model, run) == before
    model, _ = open_model(tmp_path / "fused")
    assert model.layers[0].mlp.up_proj.group_size == (group or 32)


@pytest.fixture(scope="module")
def hf(mlx_model: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "hf"
    options = ("--adapter", run, "--to", "hf", "--out", out, "--dtype", "float32", "--no-verify")
    tiny.done("export", "--model", mlx_model, *options)
    return out


def test_verify_proves_an_export_that_is_already_there(mlx_model: Path, run: Path, hf: Path) -> None:
    result = tiny.done("verify", hf, "--model", mlx_model, "--adapter", run, "--json")
    report = json.loads(result.stdout)
    assert (report["verdict"], report["candidate"]) == ("passed", "transformers, float32")
    assert report == json.loads((hf / "verification.json").read_text())
    assert "# Verification: passed" in (hf / "verification.md").read_text()


def test_verify_fails_on_a_changed_export_and_marks_it(mlx_model: Path, run: Path, hf: Path, tmp_path: Path) -> None:
    """One matrix scaled by 1%: exit status 2, and the report beside the artefact says so."""
    copy = tmp_path / "changed"
    copy.mkdir()
    for file in hf.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"] * np.float32(1.01)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    result = tiny.mlxtune("verify", copy, "--model", mlx_model, "--adapter", run)
    tiny.one_clear_line(result, "is not the model that was trained")
    assert json.loads((copy / "verification.json").read_text())["verdict"] == "failed"


def test_verify_refuses_what_is_no_export(mlx_model: Path, run: Path, data: Path) -> None:
    for folder, expected in ((data, "neither a model folder nor a PEFT adapter"), (data / "nowhere", "no folder")):
        tiny.one_clear_line(tiny.mlxtune("verify", folder, "--model", mlx_model, "--adapter", run), expected)


def test_a_run_whose_rows_are_gone_is_fused_by_rounding_and_that_is_said(
    mlx_model: Path, run: Path, data: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "run"
    moved.mkdir()
    for name in ("adapters.safetensors", "adapter_config.json"):
        (moved / name).write_bytes((run / name).read_bytes())
    options = ("--adapter", moved, "--out", tmp_path / "fused", "--bits", "4", "--data", data / "valid.jsonl")
    result = tiny.done("fuse", "--model", mlx_model, *options)
    assert "no training rows to choose codes by" in result.stderr


def test_a_group_size_without_quantization_is_refused(mlx_model: Path, run: Path, tmp_path: Path) -> None:
    options = ("--adapter", run, "--out", tmp_path / "fused", "--group-size", "64")
    tiny.refused(tmp_path / "fused", "fuse", "--model", mlx_model, *options, expected=("--group-size", "--bits 16"))


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("fuse", ("--no-verify", "--data", "rows.jsonl"), "--data has no effect with --no-verify"),
        ("export", ("--to", "hf", "--no-verify", "--data", "rows.jsonl"), "--data has no effect with --no-verify"),
        ("export", ("--to", "gguf", "--push", "me/mine"), "--push has no effect with --to gguf"),
        ("export", ("--to", "gguf-lora", "--push", "me/mine"), "--push has no effect with --to gguf-lora"),
        ("export", ("--to", "gguf", "--base", "MODEL", "--no-verify"), "--base has no effect without --adapter"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    command: str, options: tuple[str, ...], expected: str, mlx_model: Path, run: Path, tmp_path: Path
) -> None:
    """Before any work: in this process, where a refusal is the exception that the command prints."""
    given = [str(mlx_model) if option == "MODEL" else option for option in options]
    adapter = [] if "--base" in options else ["--adapter", str(run)]
    arguments = [command, "--model", str(mlx_model), *adapter, "--out", str(tmp_path / "out"), *given]
    with pytest.raises(UserError, match=expected):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "artefact", [FusedMlx(), FusedMlx(8), FusedMlx(4), HuggingFace("float32")], ids=["dense", "8 bits", "4 bits", "hf"]
)
def test_how_far_a_merge_has_come_is_told_weight_by_weight(
    artefact: FusedMlx | HuggingFace, mlx_model: Path, run: Path, rows: Data, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    fewest = 10
    if artefact == FusedMlx(4):  # first the rows go through the layers, and that is told too
        artefact = FusedMlx(4, calibration=rows.train)
        fewest += len(rows.train)
    ship(Request(mlx_model, run, tmp_path / "out"), artefact, lambda done, total: told.append((done, total)))
    done, total = zip(*told, strict=True)
    assert len(set(total)) == 1 and len(done) > fewest
    assert list(done) == sorted(set(done)) and done[-1] == total[0]
