"""The last whole state of a run: held against compiled updates, saved without computing anything."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from mlxtune_convert.files import read_json

from mlxtune.config import resolve
from mlxtune.machine import backend
from mlxtune.model.arrays import named, to_numpy
from mlxtune.train import checkpoint, optim
from mlxtune.train.checkpoint import State
from mlxtune.train.identity import Identity
from mlxtune.train.last_whole import LastWhole
from mlxtune.train.run_folder import RunFolder

MANY = 1 << 18
NOBODY = Identity({}, "", "", "", "")
UPDATE = mx.compile(lambda w, m, g: (w - 0.1 * (0.9 * m + g), 0.9 * m + g))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU; on the CPU a run compiles nothing."""
    monkeypatch.setattr(backend, "policy", lambda: backend.Policy(compiled=True, queued=True, tile=64))
    mx.enable_compile()
    yield
    mx.disable_compile()


def arrays(dtype: mx.Dtype = mx.float32) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """(parameters, the optimizer's state), evaluated; one of them stored in another order than its shape says."""
    square = mx.random.normal((64, 64), key=mx.random.key(0)).astype(dtype).T
    parameters = {"a": mx.random.normal((MANY,), key=mx.random.key(1)).astype(dtype), "b": square}
    state = {"step": mx.array(3, mx.uint64), "a": {"m": mx.ones((MANY,), dtype)}, "b": {"m": square * 0.5}}
    mx.eval(parameters, state)
    return parameters, state


def saved(run: Path) -> dict[str, bytes]:
    """What the newest checkpoint holds, by name."""
    folder = RunFolder(run).newest(pytest.fail).folder
    found: dict[str, Any] = {**mx.load(str(folder / "adapters.safetensors"))}  # type: ignore[dict-item]
    moments: Any = mx.load(str(folder / checkpoint.OPTIMIZER_FILE))
    return {
        name: to_numpy(array).tobytes() for name, array in (found | {f"m.{k}": v for k, v in moments.items()}).items()
    }


def bits(parameters: dict[str, mx.array], state: dict[str, Any]) -> dict[str, bytes]:
    moments = {f"m.{name}": array for name, array in named(state).items()}
    return {name: to_numpy(array).tobytes() for name, array in (parameters | moments).items()}


def peak_of_an_update(held: bool) -> int:
    """Bytes that one compiled update takes beside what was there before."""
    weights, moments, gradients = (mx.random.normal((MANY,), key=mx.random.key(seed)) for seed in range(3))
    mx.eval(weights, moments, gradients)
    weights, moments = UPDATE(weights, moments, gradients)
    whole = LastWhole(RunFolder(Path()), NOBODY, 1)
    if held:
        whole.keep(State(1), {"a": weights}, {"m": moments})
    mx.eval(weights, moments)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    weights, moments = UPDATE(weights, moments, gradients)
    mx.eval(weights, moments)
    return mx.get_peak_memory() - before


@pytest.mark.usefixtures("compiled")
def test_a_compiled_update_leaves_what_is_held_as_it_was(tmp_path: Path) -> None:
    """A run's own, as on a GPU. MLX would write new arrays over old ones, as the memory it takes without and with them
    held shows.
    """
    assert peak_of_an_update(held=True) >= 2 * peak_of_an_update(held=False)
    parameters = arrays()[0]
    optimizer = optim.build(resolve.load(None, ()).train, parameters)
    whole = LastWhole(RunFolder(tmp_path), NOBODY, 2)
    before = bits(parameters, optimizer.state)
    whole.keep(State(7), parameters, optimizer.state)
    update = optim.Update(optimizer, 1.0)
    gradients = tree_map(mx.ones_like, parameters)
    for _ in range(3):
        parameters, optimizer.state, _ = update(gradients, parameters, 5, 1e-2)
        mx.eval(parameters, optimizer.state)
    assert whole.save() == tmp_path / "checkpoints/step-0000007"
    assert saved(tmp_path) == before
    whole.keep(State(8), parameters, optimizer.state)
    whole.save()
    assert saved(tmp_path) == bits(parameters, optimizer.state)


def test_what_is_held_does_not_change_with_the_trees_it_came_in(tmp_path: Path) -> None:
    parameters, state = arrays()
    before = bits(parameters, state)
    whole = LastWhole(RunFolder(tmp_path), NOBODY, 2)
    whole.keep(State(1), parameters, state)
    parameters["b"], state["a"]["m"] = parameters["b"] + 1, state["a"]["m"] + 1
    whole.save()
    assert saved(tmp_path) == before


def elsewhere(call: Callable[[], Any]) -> Any:
    """Call it in another thread, where MLX refuses to compute what was begun in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_saving_computes_nothing(dtype: mx.Dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No function of MLX is called and no method of an array; nor is anything left to compute by reading it."""
    parameters, state = arrays(dtype)
    before = bits(parameters, state)
    whole = LastWhole(RunFolder(tmp_path), NOBODY, 2)
    left = parameters["b"] + 1
    with pytest.raises(RuntimeError, match="no Stream"):  # what tells
        elsewhere(lambda: to_numpy(left))
    whole.keep(State(1), {**parameters, "b": parameters["b"] + 1}, state)

    def computes(*_: Any, **__: Any) -> None:
        raise AssertionError("saving computes")

    with monkeypatch.context() as patch:
        for place in (mx, mx.array):
            for name, value in vars(place).items():
                if callable(value) and not isinstance(value, type) and not name.startswith("__"):
                    patch.setattr(place, name, computes)
        with pytest.raises(AssertionError, match="saving computes"):
            mx.eval(parameters["a"].astype(mx.float32))
        elsewhere(whole.save)
    assert saved(tmp_path) == {**before, "b": to_numpy(left).tobytes()}


def test_another_thread_saves_while_this_one_is_inside_a_computation(tmp_path: Path) -> None:
    parameters, state = arrays()
    whole = LastWhole(RunFolder(tmp_path), NOBODY, 2)
    whole.keep(State(1), parameters, state)
    product = parameters["b"]
    for _ in range(4_000):
        product = mx.tanh(product @ parameters["b"])
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(lambda: (time.sleep(0.05), whole.save(), time.monotonic())[-1])
        began = time.monotonic()
        mx.eval(product)
        ended = time.monotonic()
    assert began < done.result() < ended, (done.result() - began, ended - began)
    assert saved(tmp_path) == bits(parameters, state)


def test_a_state_is_saved_once_and_nothing_is_saved_before_the_first_step(tmp_path: Path) -> None:
    parameters, state = arrays()
    whole = LastWhole(RunFolder(tmp_path), NOBODY, 1)
    whole.keep(State(), parameters, state)
    assert whole.save() is None
    whole.keep(State(1), parameters, state)
    assert whole.save() is not None and whole.save() is None
    whole.keep(State(1, evaluated=1), parameters, state)
    assert whole.save() is not None
    assert read_json(tmp_path / "checkpoints/step-0000001" / checkpoint.STATE_FILE, "")["state"]["evaluated"] == 1
    resumed = LastWhole(RunFolder(tmp_path), NOBODY, 1, saved=State(1, evaluated=1))
    resumed.keep(State(1, evaluated=1), parameters, state)
    assert resumed.save() is None


def test_what_is_kept_is_computed_before_it_replaces_what_was(tmp_path: Path) -> None:
    """A step whose computation fails leaves the state before it."""
    parameters, state = arrays()
    whole = LastWhole(RunFolder(tmp_path), NOBODY, 1)
    whole.keep(State(1), parameters, state)
    before = bits(parameters, state)
    np.save(tmp_path / "a.npy", np.ones((MANY,), np.float32))
    parameters["a"] = mx.load(str(tmp_path / "a.npy"))  # type: ignore[assignment]
    os.truncate(tmp_path / "a.npy", 1000)  # MLX reads it only when it computes
    with pytest.raises(RuntimeError, match="read"):
        whole.keep(State(2), parameters, tree_map(lambda a: a + 1, state))
    assert whole.state.step == 1
    whole.save()
    assert saved(tmp_path) == before
