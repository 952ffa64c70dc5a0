"""A run's numbers for TensorBoard, Weights & Biases or Trackio, through their own packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mlxtune.errors import UserError
from mlxtune.train.events import Event, Listener

PROJECT = "mlxtune"
# What each logger needs to be installed.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
Write = Callable[[dict[str, float], int], None]  # numbers by the name of their curve, and the step
# Of steps and evaluations on preferences, beside the loss.
PREFERRED = ("margin", "accuracy", "reward_chosen", "reward_rejected", "drift", "baseline")


def require(names: Sequence[str]) -> None:
    """Raise UserError for a logger whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"train.loggers: {name} needs the package {PACKAGES[name]}, which is not installed",
                f"pip install 'mlxtune[{name}]', or leave it out.",
            )


@contextmanager
def opened(
    names: Sequence[str], run: Path, config: dict[str, Any], step: int, note: Callable[[str], None]
) -> Iterator[list[Listener]]:
    """Listeners that write to each logger, closed afterwards.

    run: its folder; config: what the logger shows of the run; step: where the run goes on; note: called with a line on
    a logger that fails later, which does not end the run. Raises UserError when one does not start.
    """
    with ExitStack() as stack:
        listeners: list[Listener] = []
        for name in names:
            try:
                write, close = OPENERS[name](run, config, step)
            except Exception as error:  # each package has errors of its own
                raise UserError(f"train.loggers: {name} does not start ({type(error).__name__}: {error})") from error
            stack.callback(_surviving(name, close, note))
            listeners.append(_listener(_surviving(name, write, note)))
        yield listeners


def _surviving(name: str, call: Callable[..., None], note: Callable[[str], None]) -> Callable[..., None]:
    """The same call; once it failed it is not made again."""
    failed = False

    def run(*args: Any) -> None:
        nonlocal failed
        if failed:
            return
        try:
            call(*args)
        except Exception as error:  # a network, a quota: nothing that a night's run should end for
            failed = True
            note(f"{name} takes no more numbers ({type(error).__name__}: {error}); they are in events.jsonl")

    return run


def _listener(write: Write) -> Listener:
    """Writes the curves of events."""

    def listen(event: Event) -> None:
        numbers = numbers_of(event)
        if numbers:
            write(numbers, event["step"])

    return listen


def numbers_of(event: Event) -> dict[str, float]:
    """What of an event is drawn as a curve."""
    if event["kind"] == "train":
        curves = {f"train/{name}": event[name] for name in ("loss", "lr", "grad_norm", "peak_bytes")}
        curves |= _preferred("train", event)
        return {**curves, "train/tokens_per_second": event["tokens"] / max(event["seconds"], 1e-9)}
    if event["kind"] == "eval" and event["loss"] is not None:
        checks = {f"valid/{name}": value for name, value in event.get("checks", {}).items()}
        return {"valid/loss": event["loss"], **_preferred("valid", event), **checks}
    return {}


def _preferred(split: str, event: Event) -> dict[str, float]:
    """What of it is drawn beside the loss of preferences. A number is None where no answer of its kind was there."""
    known = [name for name in PREFERRED if event.get(name) is not None]
    return {f"{split}/{name}": event[name] for name in known}


def _tensorboard(run: Path, config: dict[str, Any], step: int) -> tuple[Write, Callable[[], None]]:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(numbers: dict[str, float], at: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, at)

    return write, writer.close


def _wandb(run: Path, config: dict[str, Any], step: int) -> tuple[Write, Callable[[], None]]:
    import wandb

    begun = wandb.init(project=PROJECT, name=run.name, dir=str(run), config=config)
    return lambda numbers, at: begun.log(numbers, step=at), begun.finish


def _trackio(run: Path, config: dict[str, Any], step: int) -> tuple[Write, Callable[[], None]]:
    import trackio

    trackio.init(project=PROJECT, name=run.name, config=config, resume="allow" if step else "never")
    return lambda numbers, at: trackio.log(numbers, step=at), trackio.finish


# name -> a function of (the run's folder, its configuration, the step where it goes on) that begins to log, and returns
# what writes numbers and what ends it.
OPENERS: dict[str, Callable[[Path, dict[str, Any], int], tuple[Write, Callable[[], None]]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
