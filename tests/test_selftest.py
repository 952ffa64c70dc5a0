"""`mlxtune doctor --test`: all is well here, and each check sees its bug when that is planted."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlxtune_convert.gguf import adapter_file
from mlxtune_convert.hf.rules import Layout

from mlxtune import cli
from mlxtune.adapter.layers import LoRALinear
from mlxtune.compute import checkpointing, head_loss, loss, prefix
from mlxtune.errors import Interrupted, UserError
from mlxtune.machine import backend
from mlxtune.model import linux_cpu
from mlxtune.selftest import checks, examination, kernels, model, runs, shipping, ways
from mlxtune.selftest.outcome import FAILED, Check, Found, Result, Workshop, advice
from mlxtune.ship import artefacts
from mlxtune.train import checkpoint, optim

Patch = pytest.MonkeyPatch


def test_the_command_passes_offline_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Through the installed command, with every way out of this machine led into a wall."""
    wall = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    found = json.loads(tiny.done("doctor", "--test", "--json", TMPDIR=str(tmp_path), **wall).stdout)
    assert found.keys() == {"facts", "advice", "checks"}
    assert found["facts"]["mlx"]
    status = {check["name"]: check["status"] for check in found["checks"]}
    assert list(status) == [check.name for check in checks.every()]
    assert {name for name, value in status.items() if value == "not here"} == {
        *(f"compiled, {kind}" for kind in ("float32", "float16", "bfloat16")),
        *("compiling one shape of a batch", "plain way, float32", "powers of two, float16", "powers of two, bfloat16"),
    }
    assert sum(value == "measured" for value in status.values()) == 5
    assert sum(value == "ok" for value in status.values()) == len(status) - 12
    assert all(check["value"] <= check["limit"] for check in found["checks"] if check["status"] == "ok")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """With a finished run and its export request, made by a program without bugs."""
    shop = Workshop(tmp_path_factory.mktemp("shop"))
    shop.once("request", lambda: shipping._request(shop))
    return shop


def outcome(name: str, shop: Workshop) -> Result:
    (check,) = (check for check in checks.every() if check.name == name)
    return checks.done(check, shop)


@contextmanager
def elsewhere(patch: Patch) -> Iterator[Callable[[Any, str, Callable[[Any], Any]], None]]:
    """The reference's CPU is another device than the one that is tried: only there `wrong` changes what place.name
    returns.
    """
    here = [True]
    real = model.computing_on_cpu

    @contextmanager
    def computing_on_cpu() -> Iterator[None]:
        before, here[0] = here[0], False
        with real():
            yield
        here[0] = before

    for module in (model, kernels, ways):
        patch.setattr(module, "computing_on_cpu", computing_on_cpu)

    def wrong(place: Any, name: str, change: Callable[[Any], Any]) -> None:
        was = getattr(place, name)
        patch.setattr(place, name, lambda *a, **k: change(was(*a, **k)) if here[0] else was(*a, **k))

    yield wrong


def jitter(place: Any, name: str, size: float) -> Callable[[Patch], None]:
    """A kernel of this device whose numbers are off by such a part."""

    def change(array: mx.array) -> mx.array:
        noise = np.random.default_rng(0).normal(size=array.shape).astype(np.float32)
        return (array.astype(mx.float32) * (1 + size * mx.array(noise))).astype(array.dtype)

    def plant(patch: Patch) -> None:
        with elsewhere(patch) as wrong:
            wrong(place, name, change)

    return plant


def windows_unknown_to_the_kernel(patch: Patch) -> None:
    real = mx.fast.scaled_dot_product_attention
    causal = lambda *a, mask, **k: real(*a, mask=mask if mask is None else "causal", **k)  # noqa: E731
    patch.setattr(mx.fast, "scaled_dot_product_attention", causal)


def head_off_by_one(patch: Patch) -> None:
    real = loss.inputs_of
    patch.setattr(loss, "inputs_of", lambda *a, **k: replace(placed := real(*a, **k), positions=placed.positions - 1))


def no_mask_over_a_prefix(patch: Patch) -> None:
    patch.setattr(prefix.PrefixCache, "make_mask", lambda *_, **__: None)


def windows_forgotten(patch: Patch) -> None:
    patch.setattr(prefix.PrefixCache, "make_mask", lambda *_, **__: "causal")


def parameters_closed_over(patch: Patch) -> None:
    patch.setattr(checkpointing, "checkpointed", lambda module, function, *_: mx.checkpoint(function))


def wrong_base(patch: Patch) -> None:
    patch.setattr(linux_cpu, "LOG2_E", 1.45)


def offset_lost_in_the_second_run(patch: Patch) -> None:
    real = prefix.PrefixCache.__init__
    patch.setattr(prefix.PrefixCache, "__init__", lambda self, state=None, *known: real(self, state, 0, *known[1:]))


def last_row_of_a_chunk_left_out(patch: Patch) -> None:
    real = head_loss.chunks
    patch.setattr(head_loss, "chunks", lambda *given: (slice(c.start, c.stop - 1) for c in real(*given)))


def answers_change_places(patch: Patch) -> None:
    real = loss.of_inputs

    def of_inputs(model: Any, way: Any, inputs: loss.LossInputs, *given: Any) -> Any:
        if inputs.answer_of is not None:
            inputs = replace(inputs, answer_of=inputs.answers - 1 - inputs.answer_of)
        return real(model, way, inputs, *given)

    patch.setattr(loss, "of_inputs", of_inputs)


WRONG = {
    "quantized product, float32": jitter(mx, "quantized_matmul", 0.01),
    "quantized product, float16": jitter(mx, "quantized_matmul", 0.01),
    "experts' product, float32": jitter(mx, "gather_qmm", 0.01),
    "attention, float32": windows_unknown_to_the_kernel,
    "attention, bfloat16": windows_unknown_to_the_kernel,
    "plain way, float16": jitter(mx.fast, "rms_norm", 0.01),
    "plain way, bfloat16": jitter(mx.fast, "rms_norm", 0.1),
    "head on targets only, float32": head_off_by_one,
    "head on targets only, float16": head_off_by_one,
    "head on targets only, bfloat16": head_off_by_one,
    "shared prefix once, float32": no_mask_over_a_prefix,
    "shared prefix once, bfloat16": no_mask_over_a_prefix,
    "blocks checkpointed, float32": parameters_closed_over,
    "blocks in pieces of rows, float32": offset_lost_in_the_second_run,
    "powers of two, float32": wrong_base,
    "all of these combined, float32": offset_lost_in_the_second_run,
    "a trained head, every way, float32": last_row_of_a_chunk_left_out,
    "attention in windows, every way, float32": windows_forgotten,
    "experts, every way, float32": jitter(mx, "gather_mm", 0.01),
    "answers of a pair apart, every way, float32": answers_change_places,
}


@pytest.mark.parametrize("name", WRONG)
def test_what_computes_wrongly_is_seen(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    WRONG[name](monkeypatch)
    result = outcome(name, Workshop(tmp_path))
    assert result.status == FAILED and result.limit is not None and result.value is not None
    assert result.value > result.limit or "the loss is off" in result.said


@pytest.mark.parametrize("planted", [windows_forgotten, offset_lost_in_the_second_run])
def test_a_check_does_not_see_the_bug_of_another(planted: Any, tmp_path: Path, monkeypatch: Patch) -> None:
    planted(monkeypatch)
    for name in ("head on targets only", "shared prefix once", "blocks checkpointed"):
        assert outcome(f"{name}, float32", Workshop(tmp_path)).status == "ok"


def test_what_computes_wrongly_when_it_is_compiled_is_seen(tmp_path: Path, monkeypatch: Patch) -> None:
    """As on a GPU, with a compiler that leaves functions as they are; the targets that fill one up count as others."""
    policy = replace(backend.policy(), compiled=True)
    monkeypatch.setattr(backend, "policy", lambda: policy)
    monkeypatch.setattr(mx, "compile", lambda function: function)
    assert outcome("compiled, float32", Workshop(tmp_path)).status == "ok"
    real = loss.inputs_of
    monkeypatch.setattr(loss, "inputs_of", lambda *a: replace(real(*a), weights=None))
    assert outcome("compiled, float32", Workshop(tmp_path)).status == FAILED


def test_steps_that_differ_from_the_cpus_are_seen(right: Workshop, tmp_path: Path, monkeypatch: Patch) -> None:
    runs._reference(right, mx.float32)
    anew = Workshop(tmp_path)
    anew._made = {key: made for key, made in right._made.items() if key[0] != "run" or key[2] == runs.PLAIN}  # type: ignore[index]
    with elsewhere(monkeypatch) as wrong:
        wrong(optim, "learning_rate", lambda rate: 1.001 * rate)
        result = outcome("20 steps, float32, against the CPU", anew)
    assert result.status == FAILED and result.value is not None and 1e-4 < result.value < 1e-2
    assert result.said.startswith("step ")


def test_a_run_that_finds_a_way_wrong_itself_is_seen(right: Workshop, monkeypatch: Patch) -> None:
    real = runs._notes
    note = "not used, for it does not reproduce this model: compiled"
    monkeypatch.setattr(runs, "_notes", lambda folder: [*real(folder), note])
    result = outcome("20 steps, float32, against the CPU", right)
    assert (result.status, result.said) == (FAILED, note)
    monkeypatch.setattr(runs, "_notes", lambda folder: ["computed: everything, no short cut"])
    assert "did not use: the head on supervised tokens only" in outcome(result.name, right).said


def test_a_checkpoint_that_loses_a_moment_is_seen(right: Workshop, monkeypatch: Patch) -> None:
    real = checkpoint.load_into

    def restore(saved: Any, model: Any, optimizer: Any) -> None:
        real(saved, model, optimizer)
        factor = optimizer.state["model"]["layers"][1]["mlp"]["up_proj"]["lora_a"]
        factor["v"] = mx.zeros_like(factor["v"])

    monkeypatch.setattr(checkpoint, "load_into", restore)
    result = outcome("checkpoint and resume", right)
    assert result.status == FAILED and result.value is not None and result.value > 0
    assert "differs" in result.said


def swapped(pairs: Any) -> Any:
    """Two tensors of one shape under each other's names."""
    found = dict(pairs)
    one, other = (next(name for name in found if f"{layer}." in name and "q_proj" in name) for layer in (0, 1))
    found[one], found[other] = found[other], found[one]
    return found


def scale_forgotten(patch: Patch) -> None:
    patch.setattr(LoRALinear, "delta", lambda self: self.lora_b.T @ self.lora_a.T)


def tensors_swapped(patch: Patch) -> None:
    real = Layout.to_hf
    patch.setattr(Layout, "to_hf", lambda self, pairs, numpy: iter(swapped(real(self, pairs, numpy)).items()))


def factors_swapped(patch: Patch) -> None:
    real = artefacts.from_model
    patch.setattr(artefacts, "from_model", lambda *a: replace(made := real(*a), updates=swapped(made.updates)))


def updates_swapped(patch: Patch) -> None:
    real = adapter_file.write_adapter
    patch.setattr(adapter_file, "write_adapter", lambda p, f, c, updates, b: real(p, f, c, swapped(updates), b))


EXPORTS = {
    "fuse": scale_forgotten,
    "export hf": tensors_swapped,
    "export peft": factors_swapped,
    "export gguf": scale_forgotten,
    "export gguf-lora": updates_swapped,
}


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_that_is_not_the_trained_model_is_seen(name: str, right: Workshop, monkeypatch: Patch) -> None:
    EXPORTS[name](monkeypatch)
    result = outcome(name, right)
    assert result.status == FAILED
    assert "not the model that was trained" in result.said


def test_no_value_at_all_never_passes() -> None:
    assert Found(math.nan, 1.0).status == FAILED
    assert Found(math.nan).status == FAILED
    assert Found(0.0, 1.0, wrong="something else").status == FAILED
    assert (Found(1.0, 1.0).status, Found(1.1, 1.0).status, Found(7.0).status) == ("ok", FAILED, "measured")


def test_whatever_a_check_raises_is_its_result(tmp_path: Path) -> None:
    """And what several checks need fails once, the same for all of them."""
    shop, tries = Workshop(tmp_path), []

    def fails(shop: Workshop) -> Found:
        def make() -> None:
            tries.append(1)
            raise RuntimeError("[METAL] Command buffer execution failed\nmore")

        return shop.once("run", make)

    for name in ("one", "other"):
        result = checks.done(Check("", name, fails), shop)
        assert (result.status, result.said) == (FAILED, "RuntimeError: [METAL] Command buffer execution failed")
    assert len(tries) == 1

    def stopped(_: Workshop) -> Found:
        raise Interrupted("stopped", 130)

    with pytest.raises(Interrupted):
        checks.done(Check("", "stopped", stopped), shop)


CHILD = """
import json, os, signal, sys, time
for number in range(int(sys.argv[2]), 4):
    print(json.dumps({"begun": number, "of": 4, "group": "g", "name": f"check {number}"}), flush=True)
    if number == 1:
        print("libc++abi: terminating", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGABRT)
    if number == 2:
        time.sleep(60)
    print("a library's own words")
    print(json.dumps({"group": "g", "name": f"check {number}", "status": "ok", "seconds": 1.0}), flush=True)
"""


def test_a_check_that_kills_its_process_or_hangs_fails_and_the_rest_is_done(monkeypatch: Patch) -> None:
    monkeypatch.setattr(examination, "COMMAND", (sys.executable, "-c", CHILD))
    monkeypatch.setattr(examination, "SECONDS", 2.0)
    begun: list[str] = []
    found = list(examination.results(begun.append))
    assert begun == [result.name for result in found] == [f"check {number}" for number in range(4)]
    assert [result.status for result in found] == ["ok", FAILED, FAILED, "ok"]
    assert found[1].said == "the process ended (SIGABRT): libc++abi: terminating"
    assert found[2].said == "did not end within 2 s" and found[2].seconds >= 2
    monkeypatch.setattr(examination, "PROCESSES", 1)
    assert [result.name for result in examination.results(begun.append)] == ["check 0", "check 1", "the rest"]


def test_one_signal_ends_it_and_cleans_up(tmp_path: Path) -> None:
    process = tiny.started("doctor", "--test", TMPDIR=str(tmp_path))
    assert process.stdout is not None
    while "quantized product" not in process.stdout.readline():
        assert process.poll() is None
    (folder,) = tmp_path.iterdir()
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.strip().endswith("stopped") and "Traceback" not in said
    assert time.monotonic() - began < 20
    assert not folder.exists()


def test_a_failure_is_shown_with_what_to_do_and_ends_with_2(
    monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [
        Result("Kernels", "product, float32", "ok", 1e-7, 1e-5, seconds=0.5),
        Result("Kernels", "product, bfloat16", FAILED, math.nan, 8e-3, said="4 bits, groups of 32", seconds=1.0),
        Result("Time", "one step", "measured", 12.345, unit="ms"),
    ]
    monkeypatch.setattr(examination, "results", lambda begun: (result for result in results))
    with pytest.raises(UserError, match=r"1 of 2 checks failed: product, bfloat16") as raised:
        cli.cli.main(["doctor", "--test"], standalone_mode=False)
    assert "doctor --test --json" in raised.value.hint and "train.dtype=float32" in raised.value.hint
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("Kernels")
    assert [line.split() for line in lines[at + 1 : at + 4]] == [
        *(["ok", "product,", "float32", "1.0e-07", "<=", "1e-05", "0.5", "s"],),
        *(["FAILED", "product,", "bfloat16", "nan", "<=", "8e-03", "1.0", "s"], ["4", "bits,", "groups", "of", "32"]),
    ]
    with pytest.raises(UserError):
        cli.cli.main(["doctor", "--test", "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert [check["value"] for check in found["checks"]] == [1e-7, None, 12.345]
    assert "train.dtype" not in advice([replace(results[1], name="fuse")])
    assert advice([replace(results[1], name="fuse")]).endswith("pip install --upgrade 'mlx<0.33'")
    assert "MLX" not in advice([replace(results[1], name="fuse", value=None, limit=None, said="the process ended")])
